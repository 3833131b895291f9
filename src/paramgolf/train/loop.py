"""The step loop. It knows the model, the optimizers, the loader, the clock and its callbacks, and nothing else.

Every decision that depends on a clock uses a number that all ranks share, so they change stage, write checkpoints and
stop at the same step. A CPU run bound by steps or tokens asks no clock at all for what it computes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from paramgolf.dist import Dist
from paramgolf.errors import GolfError
from paramgolf.model.gpt import GPT
from paramgolf.optim.averaging import Average
from paramgolf.optim.groups import OptimizerSet
from paramgolf.optim.schedule import decay_mul, lr_mul, momentum
from paramgolf.recipe.sections import Recipe
from paramgolf.train import compiling
from paramgolf.train.budget import Position, Shape, StepTimer, Window, shape_at
from paramgolf.train.callbacks import Callback, StepInfo
from paramgolf.train.checkpoint import Snapshot, Store
from paramgolf.train.clock import Clock
from paramgolf.train.modes import ModeSwitch
from paramgolf.train.runtime import restore_rng, rng_state
from paramgolf.train.signals import Interrupted, Interrupts, name
from paramgolf.train.step import Stepper, TokenSource, raise_together

LARGEST = torch.finfo(torch.float16).max  # what a stored tensor or scale can hold


@dataclass
class Parts:
    """What a run is made of, built once and handed to the loop."""

    recipe: Recipe
    model: GPT
    opts: OptimizerSet
    loader: TokenSource
    stepper: Stepper
    modes: ModeSwitch
    average: Average | None
    dist: Dist
    clock: Clock
    callback: Callback
    store: Store | None = None  # None: no checkpoints
    interrupts: Interrupts = field(default_factory=Interrupts)


class Trainer:
    """The main loop with its state: position, last loss, window. `save` and `load` carry all of it."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.at = Position()
        self.loss = math.nan
        self.window = Window()
        self.timer = StepTimer()
        self.save_seconds = 0.0
        self.stop_reason = ""
        self.finished = False  # the weights are final: averaged, selected, post-trained
        self.extra: dict[str, Any] = {}  # facts of finished phases that a resumed run must not lose
        self._origin = 0.0  # the budget's clock at the first step
        self._shape = shape_at(parts.recipe, 0.0)
        self._saved_at = 0.0
        self._saved_step = 0
        self._graphs = 0

    # -- where we are ------------------------------------------------------------------------------------------

    def spent(self) -> float:
        """Seconds of the budget's clock, the slowest rank's. A collective."""
        return self.parts.dist.all_max(self.parts.clock.spent(self.parts.recipe.budget.clock))

    def begin(self, window_from: Callable[[float], Window]) -> None:
        """Start the clocks of training; `window_from` makes the window from what was spent before the first step.

        A resumed run keeps its first start.
        """
        self.parts.clock.start_challenge()
        if self.at.step == 0:
            self._origin = self.spent()
        self.window = window_from(self._origin)
        self._move(self.at.step, self.at.tokens)
        self._saved_at, self._saved_step = self.at.elapsed, self.at.step
        self._graphs = compiling.compiled_graphs()

    @property
    def recompiles(self) -> int:
        """Graphs compiled since `begin`; 0 when warm-up saw everything."""
        return compiling.compiled_graphs() - self._graphs

    @property
    def stage(self) -> Shape:
        """The shape of the last step."""
        return self._shape

    def advance(self, by: Position) -> None:
        """Count the steps of a phase after the main loop."""
        self._move(self.at.step + by.step, self.at.tokens + by.tokens)

    def _move(self, step: int, tokens: int) -> None:
        self.at = Position(step, tokens, self.spent() - self._origin)

    # -- the loop ----------------------------------------------------------------------------------------------

    def run(self) -> str:
        """Train until the window is used up; returns why it stopped ("steps", "tokens", "seconds").

        Raises GolfError on a loss that is not finite or a failure on any rank, Interrupted on a signal.
        """
        with self.parts.clock.phase("train"):
            while True:
                shape = self._enter_stage()  # also where a resumed run had ended: what follows goes by the modes there
                if not self.stop_reason:
                    self.stop_reason = self.window.stop_reason(self.at, shape.step_tokens, self.timer.estimate())
                if self.stop_reason:
                    break
                self._step(shape)
                self._save_if_due()
        self.extra.setdefault("main", {"seconds": self.at.elapsed, "steps": self.at.step})
        return self.stop_reason

    def _enter_stage(self) -> Shape:
        """Apply what the stage table and the starts of QAT and loops say for this point."""
        fraction = self.window.fraction(self.at)
        shape = shape_at(self.parts.recipe, fraction)
        if (shape.seq_len, shape.batch_tokens) != (self._shape.seq_len, self._shape.batch_tokens):
            self.parts.loader.set_shape(shape.seq_len, shape.batch_tokens)
            self.timer.reset()
        self._shape = shape
        self.parts.stepper.enter(shape.seq_len)
        if self.parts.modes.set(self.parts.modes.wanted(fraction)):
            self.timer.reset()
        return shape

    def _rates(self, shape: Shape) -> tuple[float, float]:
        """(learning-rate multiplier, momentum) of the next step."""
        at, window, recipe = self.at, self.window, self.parts.recipe
        mul = lr_mul(
            recipe.schedule,
            step=at.step,
            elapsed=at.elapsed,
            budget_seconds=window.seconds,
            budget_steps=window.steps,
            tokens=at.tokens,
            budget_tokens=window.tokens,
        )
        mu = momentum(
            recipe.schedule, recipe.optim.momentum, step=at.step, elapsed=at.elapsed, budget_seconds=window.seconds
        )
        return mul * shape.lr_mul, mu

    def _step(self, shape: Shape) -> None:
        """One optimizer step and everything that looks at it."""
        parts, recipe = self.parts, self.parts.recipe
        mul, mu = self._rates(shape)
        begun = self.at.elapsed
        parts.stepper.accumulate(parts.loader.next_batch, shape.step_tokens, bool(parts.interrupts.pending))
        number = self.at.step + 1
        logged = number == 1 or number % recipe.train.log_every == 0
        norm = parts.opts.clip(recipe.optim.grad_clip) if recipe.optim.grad_clip or logged else None
        parts.opts.step(mul, mu, decay_mul(recipe.schedule, self.window.fraction(self.at)))
        report = parts.stepper.report()
        parts.opts.zero_grad()
        if not math.isfinite(report.loss):
            raise diverged(number, f"the loss is {report.loss}", self._saved_step)
        if parts.average is not None:
            parts.average.update(parts.model, self.at.step, mul)
        self.loss = report.loss
        self._move(number, self.at.tokens + report.tokens)
        self.timer.add(self.at.elapsed - begun)
        if parts.dist.is_main:
            info = StepInfo(
                number, report.loss, mul, mu, self.at.tokens, self.at.elapsed,
                float(norm) if logged and norm is not None else None, parts.clock.strict(),
            )  # fmt: skip
            parts.callback.on_step(info, self.window.fraction(self.at), parts.model)
        if report.interrupted:
            self._leave()

    def _leave(self) -> None:
        signum = int(self.parts.dist.all_max(self.parts.interrupts.pending))
        self.save()
        folder = self.parts.store.folder if self.parts.store is not None else "no folder"
        where = f"checkpoint of step {self.at.step} written to {folder}"
        raise Interrupted(f"interrupted by {name(signum)}; {where}; go on with --resume", signum)

    # -- checkpoints -------------------------------------------------------------------------------------------

    def _save_if_due(self) -> None:
        if self.parts.store is None:
            return
        section = self.parts.recipe.train
        steps = section.checkpoint_every_steps
        due = bool(steps) and self.at.step % steps == 0
        due |= bool(section.checkpoint_every) and self.at.elapsed - self._saved_at >= section.checkpoint_every
        left = self.window.seconds - self.at.elapsed - self.timer.estimate()
        if due and not (self.window.seconds and left < self.save_seconds):  # the one at the end is near
            self.save()

    def save(self) -> None:
        """Write a checkpoint. A collective; a failure on the main rank is every rank's GolfError."""
        store = self.parts.store
        if store is None:
            return
        begun = time.perf_counter()
        snapshot = self.snapshot()
        error: Exception | None = None
        if self.parts.dist.is_main:
            try:
                with self.parts.clock.phase("checkpoint"):
                    check_finite(snapshot, self._saved_step)
                    store.save(snapshot)
            except GolfError as failure:
                error = failure
        raise_together(self.parts.dist, error)
        self._saved_at, self._saved_step = self.at.elapsed, self.at.step
        self.save_seconds = self.parts.dist.all_max(time.perf_counter() - begun)

    def snapshot(self) -> Snapshot:
        """All state, equal on every rank. A collective (the matrix optimizer's state is spread over ranks)."""
        parts = self.parts
        tensors: dict[str, Tensor] = {f"model/{k}": t for k, t in parts.model.state_dict().items()}
        numbers: dict[str, Any] = {}
        holders: dict[str, Any] = {"optim": parts.opts, "average": parts.average}
        for prefix, holder in holders.items():
            for key, value in (holder.state_dict() if holder is not None else {}).items():
                (tensors if isinstance(value, Tensor) else numbers)[f"{prefix}/{key}"] = value
        rng_tensors, rng_numbers = rng_state()
        tensors |= {f"rng/{k}": t for k, t in rng_tensors.items()}
        state = {
            "tokens": self.at.tokens,
            "origin": self._origin,
            "loss": self.loss,
            "stop_reason": self.stop_reason,
            "finished": self.finished,
            "extra": self.extra,
            "shape": [self._shape.seq_len, self._shape.batch_tokens],
            "loader": parts.loader.state_dict(),
            "numbers": numbers,
            "rng": rng_numbers,
            "clock": parts.clock.state_dict(),
        }
        return Snapshot(self.at.step, tensors, state)

    def load(self, snapshot: Snapshot, last_seen: float = 0.0) -> None:
        """Go on from a snapshot. Raises GolfError when it belongs to another model or optimizer."""
        parts, state = self.parts, snapshot.state
        weights = snapshot.part("model")
        own = {k: tuple(t.shape) for k, t in parts.model.state_dict().items()}
        if own != {k: tuple(t.shape) for k, t in weights.items()}:
            raise GolfError("the checkpoints belong to another model; choose another --out")
        parts.model.load_state_dict(weights)
        flat: dict[str, Any] = {**snapshot.tensors, **state["numbers"]}
        device = parts.dist.device
        parts.opts.load_state_dict(_under(flat, "optim/", device))
        if parts.average is not None:
            parts.average.load_state_dict(_under(flat, "average/", device))
        restore_rng(snapshot.part("rng"), state["rng"])
        self._shape = Shape(*state["shape"])
        parts.loader.load_state_dict(state["loader"])
        parts.clock.load_state_dict(state["clock"], last_seen=last_seen)
        self.at = Position(snapshot.step, int(state["tokens"]))
        self.loss = float(state["loss"])
        self.stop_reason, self.finished = state["stop_reason"], bool(state["finished"])
        self.extra = dict(state["extra"])
        self._origin = float(state["origin"])


def _under(flat: dict[str, Any], prefix: str, device: torch.device) -> dict[str, Any]:
    return {
        key.removeprefix(prefix): value.to(device) if isinstance(value, Tensor) else value
        for key, value in flat.items()
        if key.startswith(prefix)
    }


def diverged(step: int, what: str, saved_step: int) -> GolfError:
    """The error of a run that left the finite numbers."""
    kept = f"the checkpoint of step {saved_step} is kept" if saved_step else "there is no earlier checkpoint"
    return GolfError(f"training diverged at step {step}: {what}; lower optim.*_lr or set optim.grad_clip ({kept})")


def check_finite(snapshot: Snapshot, saved_step: int) -> None:
    """Refuse to replace a good checkpoint by one with weights that are no numbers, or that no export could hold.

    A model with normalised activations may give a finite loss whatever its weights have become.
    """
    for key, tensor in snapshot.tensors.items():
        if key.startswith("model/") and tensor.is_floating_point() and not bool((tensor.abs() <= LARGEST).all()):
            what = f"{key.removeprefix('model/')} holds values beyond {LARGEST:g} or that are no numbers"
            raise diverged(snapshot.step, what, saved_step)
