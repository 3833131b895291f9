"""The main job: data -> train -> quantise -> pack -> score the file -> record. One recipe, one folder.

Every score is taken from the artifact as read back from disk. The order of phases and which of them the time
budget counts are the design's: tokenising, scoring and the report are measured and reported, not counted.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paramgolf.data.dataset import Dataset, prepare
from paramgolf.dist import Dist
from paramgolf.dist import init as init_dist
from paramgolf.errors import GolfError
from paramgolf.model.gpt import GPT
from paramgolf.model.registry import ACTIVATIONS, ATTENTION_BACKENDS
from paramgolf.optim.registry import MATRIX_OPTIMIZERS
from paramgolf.pack.forecast import forecast, plan_bytes
from paramgolf.pack.ledger import Ledger
from paramgolf.pack.packer import load_model, pack_model
from paramgolf.pack.registry import CODECS
from paramgolf.quant.registry import QUANTIZERS
from paramgolf.recipe.sections import Recipe
from paramgolf.runner.folder import RunFolder, default_root, open_folder
from paramgolf.runner.peers import compress_peers
from paramgolf.runner.record import causes, write_record
from paramgolf.runner.report import write_report
from paramgolf.score.scorer import Score, score
from paramgolf.train.clock import Clock
from paramgolf.train.session import TrainOutput, train_recipe

# Seconds to quantise and code a million weights, on one slow core, with room to spare: what training leaves of its
# budget when the recipe counts packing. `auto` tries every codec in both orientations.
PACK_SECONDS = {"raw": 0.2, "rans": 0.8, "zlib": 3.0, "lzma": 5.0, "zstd": 5.0, "brotli": 8.0, "auto": 40.0}
PEER_TEXT_LIMIT = 64 * 2**20  # larger validation texts are not put through the general compressors


def cache_root() -> Path:
    """Where prepared data is kept between runs: $PARAMGOLF_CACHE, else the user's cache folder."""
    base = os.environ.get("PARAMGOLF_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "paramgolf"


def run(
    recipe: Recipe,
    *,
    data: str | None = None,
    out: Path | None = None,
    resume: bool = False,
    clock: Clock | None = None,
) -> dict[str, Any] | None:
    """Run a recipe to its end and return its record (None on all ranks but the first).

    Args:
        data: training text or shards; None = `data.train` of the recipe, and without that the built-in corpus.
        out: the run folder; None = `runs/<recipe>-<timestamp>`.
        resume: go on from the newest usable checkpoint in `out`; on a finished run, do nothing.

    Raises:
        GolfError: anything wrong with the input, found before the work that would need it.
    """
    clock = clock or Clock()
    check(recipe)
    dist = init_dist(recipe.train.device)
    folder = _claim(recipe, out, resume, dist)
    finished = folder.read_record() if resume else None
    if finished is not None:
        return finished if dist.is_main else None
    with clock.phase("data", outside=True):
        dataset = _dataset(recipe, data, dist)
        job = Job(recipe, folder, dataset, dist, clock, dataset.tokenizer.compact())
    trained = job.train(resume)
    floats = job.score_floats(trained.model)
    ledger = job.pack(trained.model)
    results = job.score_artifact()
    return job.conclude(trained, floats, ledger, results) if dist.is_main else None


def check(recipe: Recipe) -> None:
    """Everything about a recipe that can be wrong before any data is read: components, sizes, the cap."""
    for registry, name in (
        (MATRIX_OPTIMIZERS, recipe.optim.matrix),
        (ACTIVATIONS, recipe.model.activation),
        (QUANTIZERS, recipe.quant.method),
    ):
        registry.check(name)
    if recipe.pack.codec != "auto":
        CODECS.check(recipe.pack.codec)
    if recipe.train.attention != "auto":
        ATTENTION_BACKENDS.check(recipe.train.attention)
    if not (recipe.budget.seconds or recipe.budget.steps or recipe.budget.tokens):
        raise GolfError("nothing ends the training: set budget.seconds, budget.steps or budget.tokens")
    plan = plan_bytes(recipe, recipe.data.vocab_size)
    if not plan.fits:
        raise GolfError(
            f"budget.bytes={plan.cap_bytes} is too small for this recipe: {plan.params:,} parameters are "
            f"expected to take {plan.typical_bytes:,} bytes; set budget.bytes={plan.typical_bytes}, or a smaller model"
        )


def _claim(recipe: Recipe, out: Path | None, resume: bool, dist: Dist) -> RunFolder:
    """The main rank claims the folder, the others are told which; a refusal is every rank's."""
    answer: dict[str, str] = {}
    if dist.is_main:
        try:
            answer["root"] = str(open_folder(out or default_root(recipe), recipe, resume=resume).root)
        except GolfError as error:
            answer["error"] = str(error)
    answer = dist.broadcast_json(answer)
    if "error" in answer:
        raise GolfError(answer["error"])
    return RunFolder(Path(answer["root"]))


def _dataset(recipe: Recipe, data: str | None, dist: Dist) -> Dataset:
    """Prepared once, by the main rank; the others find it in the cache."""
    source = data or recipe.data.train or None
    dataset = prepare(recipe.data, source, cache=cache_root()) if dist.is_main else None
    dist.barrier()
    return dataset or prepare(recipe.data, source, cache=cache_root())


@dataclass
class Job:
    """The phases after the data is there; each is timed on the run's clock."""

    recipe: Recipe
    folder: RunFolder
    dataset: Dataset
    dist: Dist
    clock: Clock
    tokenizer_bytes: bytes

    @property
    def vocab_size(self) -> int:
        return self.dataset.tokenizer.vocab_size

    def _packing_seconds(self) -> float:
        """What quantising and coding will take of the budget."""
        plan = plan_bytes(self.recipe, self.vocab_size)
        return 1.0 + PACK_SECONDS.get(self.recipe.pack.codec, PACK_SECONDS["auto"]) * plan.params / 1e6

    def _forecast(self, model: torch.nn.Module) -> str:
        size = forecast(model.state_dict(), self.recipe, tokenizer_bytes=len(self.tokenizer_bytes))
        cap = self.recipe.budget.bytes
        return f"{size:,} bytes" + (f" ({100 * size / cap:.1f} % of the cap)" if cap else "")

    def train(self, resume: bool) -> TrainOutput:
        recipe = self.recipe
        return train_recipe(
            recipe, self.dataset, self.folder.root, self.clock, self.dist, resume=resume,
            reserve_seconds=self._packing_seconds(), forecast=self._forecast,
        )  # fmt: skip

    def score_floats(self, model: GPT) -> Score:
        """The trained weights before quantisation, on the windows of the standard score."""
        with self.clock.phase("score", outside=True):
            return self._score(model, stride=0)

    def pack(self, model: GPT) -> Ledger:
        """Quantise, code and write `model.golf` on the main rank; every rank waits for the file."""
        ledger, answer = Ledger({}), {"error": ""}
        if self.dist.is_main:
            try:
                with self.clock.phase("pack"):
                    ledger = pack_model(
                        model.state_dict(), self.recipe, self.tokenizer_bytes, self.folder.artifact, self.vocab_size
                    )
            except GolfError as error:
                answer["error"] = str(error)
        if message := self.dist.broadcast_json(answer)["error"]:
            raise GolfError(message)
        return ledger

    def score_artifact(self) -> dict[str, Any]:
        """The file as read back from disk: standard score, and sliding if the recipe asks for it."""
        with self.clock.phase("read", outside=True):
            model = load_model(self.folder.artifact, self.dist.device).model
        with self.clock.phase("score", outside=True):
            results = self._score(model, stride=0).as_dict()
            if self.recipe.score.stride:
                results |= self._score(model, stride=self.recipe.score.stride).as_dict()
        return results

    def _score(self, model: GPT, *, stride: int) -> Score:
        section, data = self.recipe.score, self.dataset
        return score(
            model, data.val_tokens(), token_bytes=data.tokenizer.token_bytes, true_bytes=data.val_bytes,
            seq_len=section.seq_len or self.recipe.train.seq_len, stride=stride, batch_tokens=section.batch_tokens,
            dist=self.dist, windows=section.windows, lane_count=section.lanes,
            limit_seconds=self.recipe.budget.eval_seconds,
        )  # fmt: skip

    def conclude(self, trained: TrainOutput, floats: Score, ledger: Ledger, results: dict[str, Any]) -> dict[str, Any]:
        """The record and the report, once everything else is on disk."""
        recipe, result = self.recipe, trained.result
        with self.clock.phase("peers", outside=True):
            text = self.dataset.val_text
            small = text is not None and text.stat().st_size <= PEER_TEXT_LIMIT
            peers = compress_peers(text) if text is not None and small else {}
        seconds = {"strict": self.clock.spent(), "challenge": self.clock.challenge(), "process": self.clock.strict()}
        record = {
            **causes(recipe, self.folder),
            **results,
            "val_loss_float": floats.val_loss,
            "val_bpb_float": floats.val_bpb,
            "artifact_bytes": self.folder.artifact.stat().st_size,
            "code_bytes": ledger.code_bytes,
            "total_bytes": ledger.counted_bytes,
            "cap_bytes": recipe.budget.bytes,
            "ledger": ledger.groups,
            "codec": ledger.codec,
            "payload_bytes": ledger.payload_bytes,
            "params": sum(p.numel() for p in trained.model.parameters()),
            "steps": result.steps,
            "train_tokens": result.tokens,
            "step_ms": result.step_ms,
            "seconds": seconds | self.clock.phases(),
            "peak_memory_bytes": max(result.peak_memory_bytes.values()),
            "training": result,
            "data": self.dataset.passport,
            "peers": peers,
            "paths": {"artifact": str(self.folder.artifact), "report": str(self.folder.report)},
        }
        sealed = write_record(self.folder, record)
        write_report(self.folder, sealed, recipe.title)
        return sealed
