"""The main job: data -> train -> quantise -> pack -> score the file -> record. One recipe, one folder.

Every score is taken from the artifact as read back from disk. The order of phases and which of them the time
budget counts are the design's: tokenising and scoring are measured and reported, not counted.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from paramgolf.data.byte_oracle import check_dataset
from paramgolf.data.cache import cache_root
from paramgolf.data.dataset import Dataset, prepare
from paramgolf.data.progress import ProgressReport
from paramgolf.dist import Dist
from paramgolf.dist import init as init_dist
from paramgolf.errors import GolfError, on_every_rank
from paramgolf.model.gpt import GPT
from paramgolf.model.registry import ACTIVATIONS, ATTENTION_BACKENDS
from paramgolf.optim.registry import MATRIX_OPTIMIZERS
from paramgolf.pack.curves import Loss
from paramgolf.pack.forecast import forecast, plan_bytes
from paramgolf.pack.ledger import Ledger
from paramgolf.pack.packer import load_model, pack_model
from paramgolf.pack.registry import CODECS
from paramgolf.quant.export import check_added
from paramgolf.quant.hessian import collect, training_loss
from paramgolf.quant.registry import QUANTIZERS
from paramgolf.recipe.load import load_recipe, to_table
from paramgolf.recipe.sections import NgramSection, Recipe, scored_seq_len, trained_seq_len
from paramgolf.runner.environment import archive_source, installed_source
from paramgolf.runner.folder import RunFolder, claim
from paramgolf.runner.machine import SpeedWatch
from paramgolf.runner.phases import Phases
from paramgolf.runner.record import causes, write_record
from paramgolf.runner.report import write_report
from paramgolf.runner.reserve import calibrates, packing_seconds
from paramgolf.score.scorer import Score, score
from paramgolf.score.ttt.adapt import check_ttt
from paramgolf.score.ttt.scorer import score_adapted
from paramgolf.score.windows import overlapping
from paramgolf.script.generate import code_bytes
from paramgolf.text.peers import PEER_TEXT_LIMIT, compress_peers
from paramgolf.train.callbacks import Callback, progress
from paramgolf.train.clock import Clock
from paramgolf.train.modes import check_switches
from paramgolf.train.session import TrainOutput, train_recipe
from paramgolf.train.trackers import Tracker, check_trackers


def run(
    recipe: Recipe | str,
    *,
    data: str | Path | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    track: Sequence[str] = (),
    clock: Clock | None = None,
) -> dict[str, Any] | None:
    """Run a recipe to its end and return its record (None on all ranks but the first).

    Args:
        recipe: one that `load_recipe` gave, or its name or path.
        data: training text or shards; None = `data.train` of the recipe, and without that the built-in corpus.
        out: the run folder; None = `runs/<recipe>-<timestamp>`.
        resume: go on from the newest usable checkpoint in `out`; on a finished run, do nothing.
        track: names of train.trackers that get the numbers as well.

    Raises:
        GolfError: anything wrong with the input, found before the work that would need it.
    """
    clock = clock or Clock()
    with on_every_rank():
        wanted = load_recipe(recipe) if isinstance(recipe, str) else recipe
        check(wanted)
        check_trackers(track)
    if data:
        wanted = dataclasses.replace(wanted, data=dataclasses.replace(wanted.data, train=str(data)))
    out = None if out is None else Path(out)
    dist = init_dist(wanted.train.device)
    claimed = _on_main(dist, lambda: claim(out, wanted, resume=resume, note=Phases().note))
    folder = RunFolder(Path(claimed["root"]))
    wanted = dataclasses.replace(wanted, data=dataclasses.replace(wanted.data, train=claimed["train"]))
    finished = folder.read_record() if resume else None
    if finished is not None:
        Phases(quiet=not dist.is_main).note(f"{folder.root} holds a finished run: nothing to do")
        if dist.is_main and not folder.report.is_file():  # it ended before its last file
            write_report(folder, finished, wanted.title)
        return finished if dist.is_main else None
    with contextlib.ExitStack() as held:
        _on_main(dist, lambda: held.enter_context(folder.locked()))
        if dist.is_main:
            folder.clear()
        try:
            record = _work(wanted, folder, dist, clock, resume, track)
        except BaseException:
            if dist.is_main:
                folder.abandon()
            raise
    dist.close()
    return record


def _work(
    recipe: Recipe, folder: RunFolder, dist: Dist, clock: Clock, resume: bool, track: Sequence[str]
) -> dict[str, Any] | None:
    """All phases, in order; the record on the main rank."""
    with clock.phase("data", outside=True):
        source = installed_source() if dist.is_main else {}  # now: the files may change while the run goes on
        dataset = _dataset(recipe, dist)
        _on_main(dist, lambda: folder.same_data(dataset.passport))
        byte_table = _on_main(dist, lambda: _byte_table(dataset))
        code = _on_main(dist, lambda: _code_bytes(recipe, dataset))
    job = Job(recipe, folder, dataset, dist, clock, dataset.tokenizer.compact(), byte_table, source, code)
    with on_every_rank():
        check(recipe, job.vocab_size, len(job.tokenizer_bytes), code)
    trained = job.train(resume, track)
    floats = job.score_floats(trained.model)
    ledger = job.pack(trained)
    results = job.score_artifact()
    return job.conclude(trained, floats, ledger, results) if dist.is_main else None


def _byte_table(dataset: Dataset) -> dict[str, Any] | None:
    check = check_dataset(dataset)
    if check is not None and dataset.val_text is not None and check.true_bytes != dataset.val_bytes:
        said = f"the passport says {dataset.val_bytes} bytes of validation text, it has {check.true_bytes}"
        raise GolfError(f"{dataset.root}: {said}; prepare the data again")
    return None if check is None else check.as_dict()


def _code_bytes(recipe: Recipe, dataset: Dataset) -> int:
    with Phases(quiet=recipe.pack.count == "file").of("counting the code"):
        return code_bytes(recipe, own_tokenizer=dataset.tokenizer.reversible)


def _on_main(dist: Dist, work: Callable[[], Any]) -> Any:
    """The JSON-able answer of the main rank on every rank; its GolfError is every rank's."""
    answer: dict[str, Any] = {}
    if dist.is_main:
        try:
            answer["is"] = work()
        except GolfError as error:
            if dist.world == 1:
                raise
            answer = {"error": str(error), "exit_code": error.exit_code}
    answer = dist.broadcast_json(answer)
    if "error" in answer:
        failure = GolfError(answer["error"])
        failure.exit_code, failure.shared = answer["exit_code"], True
        raise failure
    return answer["is"]


def check(recipe: Recipe, vocab_size: int = 0, tokenizer_bytes: int = 0, code_bytes: int = 0) -> None:
    """Everything about a recipe that can be wrong before any training: components, sizes, the cap.

    Without `vocab_size` and `tokenizer_bytes` (before the data is read) the recipe's and a guess are used.
    """
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
    check_switches(recipe)
    check_ttt(recipe.ttt, scored_seq_len(recipe))
    overlapping(recipe.score.stride, scored_seq_len(recipe))
    vocab_size = vocab_size or recipe.data.vocab_size
    plan = plan_bytes(recipe, vocab_size, tokenizer_bytes=tokenizer_bytes or 2 * vocab_size, code_bytes=code_bytes)
    check_added(recipe.quant, plan.specs)
    if not plan.fits:
        raise GolfError(
            f"budget.bytes={plan.cap_bytes} is too small for this recipe: its {plan.params:,} parameters are expected "
            f"to take {plan.typical_bytes:,} bytes; set budget.bytes={_rounded_up(plan.typical_bytes)}, or a smaller "
            "model.mlp_hidden, model.dim or model.num_layers"
        )


def _rounded_up(size: int) -> int:
    """A cap that an expected size can be relied on to stay within: 2 % more, to a round number."""
    return -(-size * 102 // 100_000) * 1000


def _dataset(recipe: Recipe, dist: Dist) -> Dataset:
    """Prepared once, by the main rank; the others open what it made."""
    made: list[Dataset] = []

    def make() -> str:
        with ProgressReport() as progress:
            made.append(prepare(recipe.data, cache=cache_root(), progress=progress))
        return str(made[0].root)

    root = _on_main(dist, make)
    return made[0] if made else prepare(recipe.data, root, cache=cache_root())


@dataclass
class Job:
    """The phases after the data is there; each is timed on the run's clock."""

    recipe: Recipe
    folder: RunFolder
    dataset: Dataset
    dist: Dist
    clock: Clock
    tokenizer_bytes: bytes
    byte_table: dict[str, Any] | None  # the tokenizer's against the validation documents
    source: dict[str, bytes]  # the package's files as they were at the start; the main rank's
    code_bytes: int  # of the script that counts beside the file, 0 where none does
    forecasts: list[dict[str, float]] = field(default_factory=list)  # of the file's size, in training
    speed: SpeedWatch | None = None  # this machine's own history; the main rank's

    @property
    def vocab_size(self) -> int:
        return self.dataset.tokenizer.vocab_size

    @property
    def phases(self) -> Phases:
        """What a person at the terminal sees of the work around training."""
        return Phases(quiet=not self.dist.is_main)

    def _calibrate(self, model: GPT) -> dict[str, torch.Tensor]:
        """What the layers read on training text, where the quantiser wants to know; all ranks take part."""
        if not calibrates(self.recipe):
            return {}
        recipe = self.recipe
        with self.clock.phase("calibrate"), self.phases.of("calibrating on training text") as progress:
            return collect(
                model, self.dataset.train_tokens(), seq_len=trained_seq_len(recipe),
                tokens=recipe.quant.calibration_tokens, dist=self.dist, progress=progress,
            )  # fmt: skip

    def _forecast(self, model: torch.nn.Module) -> str:
        try:
            size = forecast(
                model.state_dict(), self.recipe, tokenizer_bytes=len(self.tokenizer_bytes), code_bytes=self.code_bytes
            )
        except GolfError:  # weights that no grid holds: training goes on, or ends at its next loss
            return "cannot be packed as it is"
        self.forecasts.append({"seconds": self.clock.strict(), "bytes": size})
        cap = self.recipe.budget.bytes
        return f"{size:,} bytes" + (f" ({100 * size / cap:.1f} % of the cap)" if cap else "")

    def train(self, resume: bool, track: Sequence[str]) -> TrainOutput:
        recipe, every = self.recipe, self.recipe.train.log_every
        watchers: list[Callback] = []
        if self.dist.is_main:
            shown = progress(every, self._forecast)
            self.speed = SpeedWatch(recipe, self.dist.world, shown.note)
            trackers = [Tracker(name, self.folder.root, to_table(recipe), every, shown.note) for name in track]
            watchers = [shown, self.speed, *trackers]
        return train_recipe(
            recipe, self.dataset, self.folder.root, self.clock, self.dist, resume=resume,
            callbacks=watchers,
            reserve_seconds=packing_seconds(recipe, self.vocab_size, self.dist.device, self.dist.world),
        )  # fmt: skip

    def score_floats(self, model: GPT) -> Score:
        """The trained weights before quantisation, on the windows of the standard score."""
        with self.clock.phase("score_floats", outside=True):
            return self._score(model, "scoring the trained weights", stride=0)

    def pack(self, trained: TrainOutput) -> Ledger:
        """Calibrate on all ranks; quantise, code and write `model.golf` on the main one; every rank waits for it."""
        hessians = self._calibrate(trained.model)
        loss = self._training_loss(trained.model) if self.recipe.pack.fit else None
        ledgers: list[Ledger] = []

        def write() -> None:
            with self.clock.phase("pack"), self.phases.of(f"packing ({self.recipe.pack.codec})"):
                ledgers.append(pack_model(
                    trained.model.state_dict(), self.recipe, self.tokenizer_bytes, self.folder.artifact,
                    self.vocab_size, dtype=trained.result.dtype, hessians=hessians,
                    loss=loss, code_bytes=self.code_bytes,
                ))  # fmt: skip

        _on_main(self.dist, write)
        return ledgers[0] if ledgers else Ledger({})

    def _training_loss(self, trained: GPT) -> Loss:
        """What measures the loss of a state dict on training text between the windows of the calibration."""
        recipe, shards = self.recipe, self.dataset.train_tokens()
        model = copy.deepcopy(trained).eval()

        def loss(state: Mapping[str, torch.Tensor]) -> float:
            model.load_state_dict(state)
            return training_loss(
                model, shards, seq_len=trained_seq_len(recipe), tokens=recipe.pack.fit_tokens,
                among=recipe.quant.calibration_tokens,
            )  # fmt: skip

        return loss

    def score_artifact(self) -> dict[str, Any]:
        """The file as read back from disk: standard score, and sliding if the recipe asks for it."""
        with self.clock.phase("read", outside=True):
            model = load_model(self.folder.artifact, self.dist.device).model
        with self.clock.phase("score", outside=True):
            stride, ngram = overlapping(self.recipe.score.stride, scored_seq_len(self.recipe)), self.recipe.ngram
            results = self._score(model, "scoring the file", stride=0, ngram=None if stride else ngram).as_dict()
            if stride:
                what = f"scoring the file, sliding by {stride}"
                results |= self._score(model, what, stride=stride, ngram=ngram).as_dict()
            if self.recipe.ttt.kind != "none" or self.recipe.tilt.orders:
                results |= self._score_adapted(model)
        return results

    def _score_adapted(self, model: GPT) -> dict[str, Any]:
        """The score that learns as it goes."""
        recipe, data = self.recipe, self.dataset
        with self.phases.of("scoring the file, learning from what was scored") as progress:
            return score_adapted(
                model, data.val_tokens(), recipe.ttt, recipe.tilt, token_bytes=data.tokenizer.token_bytes,
                true_bytes=data.val_bytes, seq_len=scored_seq_len(recipe),
                stride=recipe.score.stride, batch_tokens=recipe.score.batch_tokens,
                lane_count=recipe.score.lanes, bos_id=data.tokenizer.bos_id,
                dist=self.dist, limit_seconds=self._time_to_score(), progress=progress,
            ).as_dict()  # fmt: skip

    def _time_to_score(self) -> float:
        """Seconds left for scores of the file, 0 = no limit: one budget for all of them; the trained weights' score is
        a diagnosis beside it."""
        limit, used = self.recipe.budget.eval_seconds, self.clock.phases().get("score")
        return max(1e-3, limit - used) if limit and used is not None else 0.0

    def _score(self, model: GPT, what: str, *, stride: int, ngram: NgramSection | None = None) -> Score:
        section, data = self.recipe.score, self.dataset
        with self.phases.of(what) as progress:
            return score(
                model, data.val_tokens(), token_bytes=data.tokenizer.token_bytes, true_bytes=data.val_bytes,
                seq_len=scored_seq_len(self.recipe), stride=stride, batch_tokens=section.batch_tokens,
                dist=self.dist, windows=section.windows, lane_count=section.lanes, bos_id=data.tokenizer.bos_id,
                ngram=ngram, limit_seconds=self._time_to_score(), progress=progress,
            )  # fmt: skip

    def conclude(self, trained: TrainOutput, floats: Score, ledger: Ledger, results: dict[str, Any]) -> dict[str, Any]:
        """The record and the report, once everything else is on disk."""
        recipe, result = self.recipe, trained.result
        with self.clock.phase("peers", outside=True):
            archive_source(self.folder.source, self.source)
            text = self.dataset.val_text
            small = text is not None and text.stat().st_size <= PEER_TEXT_LIMIT
            peers = compress_peers(text, results["scored_bytes"]) if text is not None and small else {}
        seconds = {"strict": self.clock.spent(), "challenge": self.clock.challenge(), "process": self.clock.strict()}
        record = {
            **causes(recipe, self.folder, self.source),
            **results,
            "byte_table": self.byte_table,
            "val_loss_float": floats.val_loss,
            "val_bpb_float": floats.val_bpb,
            "artifact_bytes": self.folder.artifact.stat().st_size,
            "code_bytes": ledger.code_bytes,
            "total_bytes": ledger.counted_bytes,
            "cap_bytes": recipe.budget.bytes,
            "ledger": ledger.groups,
            "codec": ledger.codec,
            "payload_bytes": ledger.payload_bytes,
            "fit": ledger.fit,
            "forecasts": self.forecasts,
            "params": sum(p.numel() for p in trained.model.parameters()),
            "steps": result.steps,
            "train_tokens": result.tokens,
            "step_ms": result.step_ms,
            "seconds": seconds | self.clock.phases(),
            "speed": self.speed.conclude(result.step_ms, result.steps) if self.speed else {},
            "peak_memory_bytes": max(result.peak_memory_bytes.values()),
            "training": result,
            "data": self.dataset.passport,
            "peers": peers,
            "paths": {"artifact": str(self.folder.artifact), "report": str(self.folder.report)},
        }
        sealed = write_record(self.folder, record)
        write_report(self.folder, sealed, recipe.title)
        return sealed
