"""From a trained model to `model.golf` and back: quantise, code, check against the byte cap, write; read, rebuild."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from paramgolf.errors import GolfError
from paramgolf.files import atomic_write
from paramgolf.model.gpt import GPT
from paramgolf.pack.container import Artifact, encode_artifact, read_artifact
from paramgolf.pack.curves import Curves, Group, Loss
from paramgolf.pack.ledger import Ledger, attribute
from paramgolf.pack.solver import LOWEST, Fit, cap_of, rough_plan, solve
from paramgolf.pack.stored import StoredTensor
from paramgolf.quant.export import export, restore
from paramgolf.quant.sensitivity import mixed
from paramgolf.recipe.sections import ModelSection, QuantSection, Recipe, scored_seq_len, trained_seq_len
from paramgolf.score.ttt.settings import manifest_part

FORMAT = "paramgolf"
_MODEL: TypeAdapter[ModelSection] = TypeAdapter(ModelSection)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LoadedArtifact(NamedTuple):
    """`manifest` (plain data), `state` float32 state dict, `tokenizer` compact bytes, `extra` other sections."""

    manifest: dict[str, Any]
    state: dict[str, Tensor]
    tokenizer: bytes
    extra: dict[str, bytes]


class LoadedModel(NamedTuple):
    """`model` in evaluation mode with the artifact's weights; the rest as in `LoadedArtifact`."""

    model: GPT
    manifest: dict[str, Any]
    tokenizer: bytes


def manifest_of(recipe: Recipe, vocab_size: int, dtype: str = "") -> dict[str, Any]:
    """What the artifact says of the model and of how it is meant to be scored. No time, path or host name.

    `dtype`: the type of activations it was trained in, where `recipe.train.dtype` left that to the machine.
    """
    used = {rule.store for rule in recipe.quant.rules} or set(recipe.quant.grids)
    return {
        "format": FORMAT,
        "name": recipe.name,
        "vocab_size": vocab_size,
        "model": dataclasses.asdict(recipe.model),
        "score": {
            "seq_len": scored_seq_len(recipe),
            "train_seq_len": trained_seq_len(recipe),
            "stride": recipe.score.stride,
            "dtype": dtype or recipe.train.dtype,
            **({"lanes": recipe.score.lanes} if recipe.score.lanes > 1 else {}),
        },
        **manifest_part(recipe),
        "tokenizer": "compact",
        "grids": {name: dataclasses.asdict(grid) for name, grid in recipe.quant.grids.items() if name in used},
    }


def pack_model(
    state: Mapping[str, Tensor],
    recipe: Recipe,
    tokenizer_compact: bytes,
    path: str | Path,
    vocab_size: int,
    extra: Mapping[str, bytes] | None = None,
    *,
    code_bytes: int = 0,
    dtype: str = "",
    hessians: Mapping[str, Tensor] | None = None,
    loss: Loss | None = None,
    curves: Curves | None = None,
) -> Ledger:
    """Quantise a state dict by the recipe's rules, code it and write the artifact whole or not at all.

    With `pack.fit` bits and clips are solved for, so that the file fills `budget.bytes`; the ledger says how.

    Args:
        tokenizer_compact: the tokenizer's bytes for the file (`Tokenizer.compact()`).
        extra: other named sections.
        code_bytes: size of the code that `pack.count = "challenge"` counts beside the file.
        dtype: see `manifest_of`.
        hessians: second moments of layer inputs by tensor name, for quantisers that use them and for `pack.fit`.
        loss: of a state dict, in nats on training text; `pack.fit` measures with it what errors cost, and at the end
            what the whole plan costs.
        curves: those of this very state dict and `hessians`, measured before, for `pack.fit`; they get better with use.

    Returns the ledger, cap and counting rule included. Raises GolfError when the result is over `budget.bytes`; then
    nothing is written.
    """

    quant = mixed(recipe.quant, state, recipe.model.num_layers, hessians)
    recipe = dataclasses.replace(recipe, quant=quant)

    cap = cap_of(recipe) if recipe.pack.fit else 0
    maker = _Maker(state, recipe, tokenizer_compact, vocab_size, dict(extra or {}), code_bytes, dtype, hessians)
    facts: dict[str, Any] = {}
    if not cap:
        done = maker.coded(recipe.quant, None, recipe.pack.codec)
    else:
        curves = curves or Curves(state, recipe, hessians or {}, loss)
        curves.refine(rough_plan(curves.groups, cap))
        fit, done = _filled(curves.groups, recipe, maker)
        facts = fit.facts()
        if curves.loss is not None:
            facts["measured_loss"] = curves.loss(restore(done.tensors)) - curves.before
    check_cap(done.ledger)
    atomic_write(path, done.data)
    return dataclasses.replace(done.ledger, fit=facts)


class _Made(NamedTuple):
    """A whole artifact in memory."""

    data: bytes
    ledger: Ledger
    tensors: list[StoredTensor]


@dataclasses.dataclass
class _Maker:
    """Makes artifacts of one state dict by several plans; the last plan's integers are kept for the next codec."""

    state: Mapping[str, Tensor]
    recipe: Recipe
    tokenizer: bytes
    vocab_size: int
    extra: dict[str, bytes]
    code_bytes: int
    dtype: str
    hessians: Mapping[str, Tensor] | None
    _kept: tuple[Any, list[StoredTensor]] | None = None

    def counted(self, codec: str, quant: QuantSection, clips: Mapping[str, float]) -> int:
        """Bytes that the cap would count."""
        return self.coded(quant, clips, codec).ledger.counted_bytes

    def coded(self, quant: QuantSection, clips: Mapping[str, float] | None, codec: str) -> _Made:
        """The file whose weights are stored by `quant`, with clips by tensor name where given."""
        recipe = dataclasses.replace(self.recipe, quant=quant)
        if self._kept is None or self._kept[0] != (quant, clips):
            self._kept = (quant, clips), export(self.state, quant, recipe.model.num_layers, self.hessians, clips)
        tensors = self._kept[1]
        manifest = manifest_of(recipe, self.vocab_size, self.dtype) | ({"fit": True} if clips else {})
        encoded = encode_artifact(Artifact(manifest, tensors, self.tokenizer, self.extra), codec, recipe.pack.level)
        ledger = dataclasses.replace(
            attribute(encoded.parts, tensors),
            code_bytes=self.code_bytes,
            count=recipe.pack.count,
            cap_bytes=recipe.budget.bytes,
            codec=encoded.codec,
        )
        return _Made(encoded.data, ledger, tensors)


def _filled(groups: Sequence[Group], recipe: Recipe, maker: _Maker) -> tuple[Fit, _Made]:
    """The plan that fills the cap, and its file.

    The byte coders take minutes where rans takes a second, so with `auto` the sizes of rans are searched; where another
    codec then turns out so much smaller that there is room left, it is filled for that one.
    """
    tried = [codec := "rans" if recipe.pack.codec == "auto" else recipe.pack.codec]
    while True:
        fit = solve(groups, recipe, partial(maker.counted, codec))
        done = maker.coded(fit.quant, fit.clips, recipe.pack.codec)
        codec = done.ledger.codec
        if codec in tried or done.ledger.counted_bytes >= LOWEST * recipe.budget.bytes:
            return fit, done
        tried.append(codec)


def check_cap(ledger: Ledger) -> None:
    """GolfError naming the largest groups and the smallest cap that would do, when the ledger is over its cap."""
    if not ledger.cap_bytes or ledger.counted_bytes <= ledger.cap_bytes:
        return
    largest = sorted(ledger.groups.items(), key=lambda item: -item[1])[:4]
    held = ", ".join(f"{name} {size:,}" for name, size in largest)
    code = f" and {ledger.code_bytes:,} of code" if ledger.count == "challenge" and ledger.code_bytes else ""
    raise GolfError(
        f"the artifact needs {ledger.counted_bytes:,} bytes, {ledger.counted_bytes - ledger.cap_bytes:,} over the cap "
        f"budget.bytes={ledger.cap_bytes}; largest: {held}{code}; shrink the model or a grid's clip, or set "
        f"budget.bytes={ledger.counted_bytes}"
    )


def load_artifact(path: str | Path) -> LoadedArtifact:
    """The verified contents of an artifact with the weights as a float32 state dict; no model is built."""
    artifact = read_artifact(path)
    manifest = dict(artifact.manifest)
    if manifest.get("format") != FORMAT or type(manifest.get("vocab_size")) is not int:
        raise GolfError(f"{path}: its manifest does not describe a language model; give a file that `golf run` wrote")
    return LoadedArtifact(manifest, restore(artifact.tensors), artifact.tokenizer, dict(artifact.extra))


def load_model(path: str | Path, device: torch.device | str = "cpu") -> LoadedModel:
    """The artifact's model, ready to score on `device`.

    Its compute type is that of the manifest where it names one, and `context_len` the training length. Raises GolfError
    when configuration and weights do not belong together.
    """
    loaded = load_artifact(path)
    section = _model_section(loaded.manifest, len(loaded.state), path)
    vocab_size = loaded.manifest["vocab_size"]
    if not 1 <= vocab_size <= 65_535:
        raise GolfError(f"{path}: vocab_size {vocab_size} is not between 1 and 65535; get the file again")
    try:
        with torch.device("meta"):  # costs nothing, whatever sizes a hostile manifest claims
            shapes = {name: tuple(t.shape) for name, t in GPT(section, vocab_size).state_dict().items()}
    except RuntimeError:  # sizes beyond what can be counted
        shapes = {}
    if shapes != {name: tuple(t.shape) for name, t in loaded.state.items()}:
        raise GolfError(f"{path}: its tensors do not fit its model configuration; get the file again")
    model = GPT(section, vocab_size)
    model.load_state_dict(loaded.state)
    score = loaded.manifest.get("score")
    score = score if isinstance(score, dict) else {}
    model.compute_dtype = _DTYPES.get(str(score.get("dtype")), model.compute_dtype)
    train_seq_len = score.get("train_seq_len")
    model.context_len = train_seq_len if type(train_seq_len) is int and 0 <= train_seq_len <= 1 << 20 else 0
    return LoadedModel(model.to(device).eval(), loaded.manifest, loaded.tokenizer)


def _model_section(manifest: Mapping[str, Any], tensors: int, path: str | Path) -> ModelSection:
    """The typed model section of a manifest. GolfError unless it is one whose layers can all be in the file."""
    try:
        section = _MODEL.validate_python(manifest.get("model"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"])
        raise GolfError(f"{path}: model configuration, {place}: {first['msg']}; update paramgolf") from None
    if section.num_layers > tensors:
        raise GolfError(f"{path}: {section.num_layers} layers in {tensors} tensors; get the file again")
    return section
