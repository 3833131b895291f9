"""What of the model changes at points of a run: fake quantisation, and how often the looped layers run."""

from __future__ import annotations

from dataclasses import dataclass

from paramgolf.errors import GolfError
from paramgolf.model.documents import BOS_ID
from paramgolf.model.gpt import GPT
from paramgolf.optim.schedule import loop_passes
from paramgolf.recipe.sections import Recipe
from paramgolf.train.budget import all_shapes
from paramgolf.train.qat import QatSwitch


@dataclass(frozen=True)
class Mode:
    """One state of the model: fake quantisation on or off, further passes of the looped layers."""

    qat: bool
    loops: int


def check_switches(recipe: Recipe) -> None:
    """GolfError for switches of training that do not fit the model's."""
    if recipe.data.order == "packed" and not recipe.model.document_mask:
        raise GolfError(
            "data.order=packed puts many documents into a row: set model.document_mask=true to keep them apart, or "
            "use another data.order"
        )
    at, extra = recipe.schedule.loop_at, recipe.model.loop_extra
    if len(at) not in (1, extra) or list(at) != sorted(at):
        raise GolfError(
            f"schedule.loop_at={list(at)} must be one fraction, or one for each of model.loop_extra={extra} passes "
            "in rising order"
        )
    for shape in all_shapes(recipe):  # of later stages too, which the loader meets in the middle of the run
        if shape.batch_tokens % shape.seq_len:
            fits = max(1, shape.batch_tokens // shape.seq_len) * shape.seq_len
            raise GolfError(
                f"a step of {shape.batch_tokens} tokens is no whole number of rows of {shape.seq_len}: change seq_len "
                f"or batch_tokens ({fits} fits) of train or of that stage"
            )


def check_documents(recipe: Recipe, bos_id: int) -> None:
    """GolfError where the recipe looks for beginnings of documents by another token than the tokenizer's `bos_id`."""
    smear = recipe.model.parts.get("smear_gate2")
    if smear is not None and smear.get("bos_id", BOS_ID) not in (bos_id, -1):
        raise GolfError(
            f"model.parts.smear_gate2: this tokenizer begins documents with {bos_id}; set its bos_id={bos_id}"
        )
    if bos_id == BOS_ID:
        return
    for key, needed in (
        ("data.order=packed", recipe.data.order == "packed"),
        ("model.document_mask=true", recipe.model.document_mask),
    ):
        if needed:
            raise GolfError(
                f"{key} finds documents by token {BOS_ID}, and this tokenizer begins them with {bos_id}; use one whose "
                f"bos_id is {BOS_ID}, or do without"
            )


class ModeSwitch:
    """Puts the model into the mode of each point of training; `states` are those the run will pass through."""

    def __init__(self, model: GPT, recipe: Recipe) -> None:
        check_switches(recipe)
        self._model, self._recipe = model, recipe
        self._qat = QatSwitch(model, recipe)
        points = sorted({0.0, recipe.quant.qat_start, *recipe.schedule.loop_at})
        self.states = list(dict.fromkeys(self.wanted(point) for point in points))
        self._loops = -1
        self.set(self.states[0])

    def wanted(self, fraction: float) -> Mode:
        """The mode at `fraction` of the training window."""
        loops = loop_passes(self._recipe.schedule, self._recipe.model.loop_extra, fraction)
        return Mode(self._qat.wanted(fraction), loops)

    def set(self, mode: Mode) -> bool:
        """Switch; whether a step's amount of work has changed."""
        self._qat.set(mode.qat)
        changed = mode.loops != self._loops
        if changed:
            self._model.set_loops(mode.loops)
            self._loops = mode.loops
        return changed
