"""One training run put together: model, optimizers, loader, checkpoints, compilation, warm-up, loop, final weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from paramgolf.dist import Dist
from paramgolf.errors import GolfError
from paramgolf.model.gpt import GPT
from paramgolf.recipe.sections import Recipe
from paramgolf.train import compiling, runtime
from paramgolf.train.assemble import assemble, final_model
from paramgolf.train.budget import Window, all_shapes, training_window
from paramgolf.train.callbacks import Callback, Callbacks, Forecast, JsonLines, last_strict, progress
from paramgolf.train.checkpoint import Snapshot, Store, check_writable
from paramgolf.train.clock import Clock
from paramgolf.train.compiling import CompilePlan
from paramgolf.train.finish import finish, selection_seconds
from paramgolf.train.loop import Parts, Trainer
from paramgolf.train.modes import check_documents
from paramgolf.train.signals import Interrupted, Interrupts, name
from paramgolf.train.step import raise_together
from paramgolf.train.warmup import FirstBatches, compile_all, warm_up

if TYPE_CHECKING:
    from paramgolf.data.dataset import Dataset

WRITE_BYTES_A_SECOND = 2e8  # a first guess of how fast a checkpoint is summed, written and synced


@dataclass(frozen=True)
class TrainResult:
    """What a run's record says about training; JSON-able."""

    steps: int
    tokens: int
    final_loss: float  # nats per token, last step
    stop_reason: str
    train_seconds: float  # the budget's clock from the first step to the last of the main loop
    step_ms: float
    recompiles: int  # graphs compiled after warm-up
    warmup_steps: int
    compiled: dict[str, Any]  # enabled, reason, cache (cold, warm)
    dtype: str
    threads: int
    attention: str
    kernels: str  # fused (our CPU kernels) or plain
    micro_tokens: int
    world: int
    resumed_from: int  # step, 0 = not resumed
    average: dict[str, Any] = field(default_factory=dict)
    post_qat: dict[str, Any] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainOutput:
    """The model with its final weights, in evaluation mode, and the facts."""

    model: GPT
    result: TrainResult


def train_recipe(
    recipe: Recipe,
    dataset: Dataset,
    out_dir: Path,
    clock: Clock,
    dist: Dist,
    *,
    resume: bool = False,
    reserve_seconds: float | Callable[[], float] = 0.0,
    forecast: Forecast | None = None,
    callbacks: Sequence[Callback] | None = None,
) -> TrainOutput:
    """Train `recipe` on `dataset`; all ranks call it alike.

    Args:
        out_dir: the run folder; gets `checkpoints/` and `train.jsonl`.
        resume: go on from the newest usable checkpoint there; without one, start afresh and say so.
        reserve_seconds: what the budget must keep for what follows training (see `budget.count_packing`).
        forecast: the artifact's size in words, for the progress line.
        callbacks: who watches; None = progress on stderr.

    Raises:
        GolfError: bad sizes, a folder that cannot be written, a loss that is not finite, a failure on another rank.
        Interrupted: SIGTERM or SIGINT; a checkpoint was written.
    """
    with Interrupts() as interrupts, contextlib.ExitStack() as stack:
        watch = Callbacks()
        if dist.is_main:
            watch.members += [progress(recipe.train.log_every, forecast)] if callbacks is None else list(callbacks)
        stack.callback(watch.close)
        session = Session(recipe, dataset, out_dir, clock, dist, watch, interrupts)
        return session.run(resume, reserve_seconds() if callable(reserve_seconds) else reserve_seconds)


class Session:
    """The order of the steps of one run; each method is one of them."""

    def __init__(
        self, recipe: Recipe, dataset: Dataset, out_dir: Path, clock: Clock, dist: Dist,
        watch: Callbacks, interrupts: Interrupts,
    ) -> None:  # fmt: skip
        self.recipe, self.out_dir, self.clock, self.dist = recipe, out_dir, clock, dist
        self.watch = watch
        self.store = Store(out_dir / "checkpoints")
        self.chosen = runtime.configure(recipe.train, dist.device)
        self.note_users()
        self.plan = CompilePlan(False, "not needed")
        self.uncompiled = contextlib.ExitStack()
        self.warmup_steps = 0
        self.kernels = "plain"
        self.vocab_size = dataset.tokenizer.vocab_size
        check_documents(recipe, dataset.tokenizer.bos_id)
        self.on_main(self._prepare_folder)
        self.parts, self.held_out = self._build(dataset, interrupts)
        self.first = FirstBatches(self.parts.loader)
        self.trainer = Trainer(self.parts)

    # -- set-up ------------------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        if self.dist.is_main:
            self.watch.note(text)

    def note_users(self) -> None:
        """Say what else uses the GPU: it explains a slow run."""
        for line in runtime.gpu_users(self.dist.device):
            self.note(f"note: {line}")

    def on_main(self, work: Callable[[], None]) -> None:
        """Do something on the main rank; its failure is every rank's."""
        error: Exception | None = None
        if self.dist.is_main:
            try:
                work()
            except GolfError as failure:
                error = failure
        raise_together(self.dist, error)

    def _prepare_folder(self) -> None:
        check_writable(self.store.folder)
        self.store.clean()

    def _build(self, dataset: Dataset, interrupts: Interrupts) -> tuple[Parts, np.ndarray | None]:
        parts, held_out = assemble(
            self.recipe, list(dataset.train_tokens()), self.vocab_size, self.chosen.dtype, self.clock, self.dist,
            self.watch, interrupts, self.store,
        )  # fmt: skip
        choice = parts.model.attention
        if choice is not None and choice.reason and self.dist.device.type == "cuda":
            self.note(f"note: attention by {choice.name}: {choice.reason}")
        return parts, held_out

    # -- the run -----------------------------------------------------------------------------------------------

    def run(self, resume: bool, reserve_seconds: float) -> TrainOutput:
        snapshot = self._find(resume)
        done = snapshot is not None and bool(snapshot.state["finished"])
        if not done:
            self._compile(snapshot)
            self._warm_up()
        if snapshot is not None:
            self.trainer.load(snapshot, last_strict(self.out_dir / "train.jsonl"))
        resumed = self.trainer.at.step
        if not done:
            self.trainer.extra["setup"] = self._setup_facts()
        self.on_main(partial(self._open_log, resumed))
        self.parts.model.train()
        self.trainer.save_seconds = self._checkpoint_bytes() / WRITE_BYTES_A_SECOND
        self.trainer.begin(partial(self._window, reserve_seconds))
        if not done:
            self.trainer.run()
        finish(self.trainer, self.held_out, reserve_seconds)
        signum = int(self.dist.all_max(self.parts.interrupts.pending))
        if signum:
            words = f"interrupted by {name(signum)} after training; its checkpoint is in {self.store.folder}"
            raise Interrupted(f"{words}; go on with --resume", signum)
        return TrainOutput(self._final_model(), self._result(resumed))

    def _final_model(self) -> GPT:
        """The trained weights in a model of their own: nothing compiled, no fake quantisation, evaluation mode."""
        return final_model(self.parts.model, self.recipe, self.vocab_size, self.dist.device)

    def _window(self, reserve_seconds: float, origin: float) -> Window:
        saves = 2 if self.recipe.quant.post_qat else 1
        own = saves * self.trainer.save_seconds + selection_seconds(self.recipe)
        return training_window(self.recipe, origin, reserve_seconds + own)

    def _find(self, resume: bool) -> Snapshot | None:
        """The checkpoint to go on from; the same on every rank."""
        if not resume:
            if self.dist.all_max(float(bool(self.store.paths()))):
                raise GolfError(f"{self.store.folder} holds checkpoints; add --resume, or choose another --out")
            return None
        snapshot = self.store.newest(self.note)
        step = float(snapshot.step if snapshot else 0)
        if self.dist.all_max(step) != -self.dist.all_max(-step):
            raise GolfError(f"the ranks do not see the same checkpoints in {self.store.folder}; use a shared folder")
        if self.dist.is_main:
            self.store.drop_after(int(step))
        self.note(f"resuming from step {snapshot.step}" if snapshot else "no usable checkpoint: starting afresh")
        return snapshot

    def _compile(self, snapshot: Snapshot | None) -> None:
        """Decide about compiling, compile all graphs that training will need, and fall back where that fails."""
        parts, kind = self.parts, self.recipe.budget.clock
        shapes = all_shapes(self.recipe)
        self.kernels = self._fused_kernels([shape.seq_len for shape in shapes])
        if self.kernels == "fused" and self.recipe.train.compile != "on":
            self.plan = CompilePlan(False, "the fused CPU kernels leave nothing to compile")
            return
        spent = self.clock.spent(kind)
        if snapshot is not None:
            spent += float(snapshot.state["clock"]["strict" if kind == "strict" else "challenge"])
        count = sum(p.numel() for p in parts.model.parameters())
        rows = [self.first(shape)[0].shape for shape in shapes]
        kinds = {(length, size) for count, length in rows for size in parts.stepper.sizes(count, length)}
        graphs = len(kinds) * len({mode.qat for mode in parts.modes.states})  # loops have no graphs of their own
        plan = compiling.decide(self.recipe, parameters=count, graphs=graphs, device=self.dist.device.type, spent=spent)
        # a decision that depends on one rank's clock or disk must not differ between ranks
        if self.dist.all_max(float(not plan.enabled)) and plan.enabled:
            plan = CompilePlan(False, "another rank does not compile", plan.cache)
        if plan.enabled:
            self.note(f"compiling ({plan.cache} cache)")
            with self.clock.phase("compile"):
                parts.model.compile_regions()
                reason = compile_all(
                    parts.stepper, parts.opts, shapes, parts.modes.states, parts.modes.set, self.first,
                    lambda: parts.interrupts.check("compilation"),
                )  # fmt: skip
                if reason:
                    self.uncompiled.enter_context(parts.model.eager())
                    plan = CompilePlan(False, f"compiling failed, going on without: {reason}", plan.cache)
        if not plan.enabled and self.recipe.train.compile != "off":
            self.note(f"note: {plan.reason}")
        self.plan = plan

    def _fused_kernels(self, lengths: Sequence[int]) -> str:
        """Switch to the fused CPU kernels where the recipe and all ranks allow it; "fused" or "plain"."""
        wanted = self.recipe.train.kernels
        with self.clock.phase("kernels"):
            reason = "train.kernels = plain" if wanted == "plain" else self.parts.model.use_native(math.gcd(*lengths))
        if wanted == "fused" and reason:
            raise GolfError(f"train.kernels = fused is not possible here: {reason}; use train.kernels=auto")
        if self.dist.all_max(float(bool(reason))):
            self.parts.model.use_plain()
            if wanted == "auto" and reason and self.dist.device.type == "cpu" and self.chosen.dtype == torch.bfloat16:
                self.note(f"note: without the fused CPU kernels: {reason}")
            return "plain"
        return "fused"

    def _warm_up(self) -> None:
        parts, schedule = self.parts, self.recipe.schedule
        with self.clock.phase("warmup"):
            self.warmup_steps = warm_up(
                parts.stepper, parts.opts, all_shapes(self.recipe), parts.modes.states, parts.modes.set, self.first,
                schedule.warmup_steps, self.recipe.optim.momentum, self.recipe.optim.grad_clip,
                lambda: parts.interrupts.check("warm-up"),
            )  # fmt: skip

    def _setup_facts(self) -> dict[str, Any]:
        """What the record says about how training ran; kept in checkpoints, so a finished training keeps them too."""
        plan, attention = self.plan, self.parts.model.attention
        return {
            "warmup_steps": self.warmup_steps,
            "compiled": {"enabled": plan.enabled, "reason": plan.reason, "cache": plan.cache},
            "dtype": str(self.chosen.dtype).removeprefix("torch."),
            "threads": self.chosen.threads,
            "attention": attention.name if attention else "",
            "kernels": self.kernels,
            "micro_tokens": self.parts.stepper.micro_tokens,
            "world": self.dist.world,
        }

    def _open_log(self, resumed_step: int) -> None:
        self.watch.members.append(JsonLines(self.out_dir / "train.jsonl", self.recipe.train.log_every, resumed_step))

    def _checkpoint_bytes(self) -> int:
        weights = sum(p.numel() for p in self.parts.model.parameters())
        return 4 * weights * (4 if self.parts.average is not None else 3)

    def _result(self, resumed: int) -> TrainResult:
        trainer = self.trainer
        main = trainer.extra["main"]
        return TrainResult(
            steps=trainer.at.step,
            tokens=trainer.at.tokens,
            final_loss=trainer.loss,
            stop_reason=trainer.stop_reason,
            train_seconds=main["seconds"],
            step_ms=1e3 * main["seconds"] / main["steps"],
            recompiles=trainer.recompiles if self.plan.enabled else 0,
            resumed_from=resumed,
            average=trainer.extra.get("average", {}),
            post_qat=trainer.extra.get("post_qat", {}),
            peak_memory_bytes=runtime.peak_memory_bytes(self.dist.device),
            **trainer.extra["setup"],
        )


def final_weights(snapshot: Snapshot) -> dict[str, Tensor]:
    """The model's state dict in a checkpoint (`golf pack` quantises and codes it again)."""
    return snapshot.part("model")
