"""When training ends, how far along it is, and which stage holds. Pure functions of numbers.

The training *window* starts at the first real step and ends where the budget does, less what is kept back: the
post-training QAT phase, and (with `budget.count_packing`) averaging, calibration, quantisation and coding. Progress
is the largest used fraction of the window in seconds, steps or tokens, so a run bound by steps or tokens only
depends on nothing that a clock says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from paramgolf.recipe.sections import Recipe, StageSection

LEAST_SECONDS = 1e-3  # a window that is used up before it starts: one step, then stop


@dataclass(frozen=True)
class Position:
    """Where the run is. `elapsed`: seconds of the budget's clock since the first step, equal on all ranks."""

    step: int = 0
    tokens: int = 0
    elapsed: float = 0.0


@dataclass(frozen=True)
class Shape:
    """What the stage table decides: tokens of one optimizer step over all ranks, row length, LR factor."""

    seq_len: int
    batch_tokens: int
    lr_mul: float = 1.0

    @property
    def step_tokens(self) -> int:
        """Tokens one step really uses: whole rows only."""
        return max(1, self.batch_tokens // self.seq_len) * self.seq_len


@dataclass(frozen=True)
class Window:
    """The budget of the training loop; 0 = unbound."""

    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0

    def fraction(self, at: Position) -> float:
        """Used part of the window, 0 to 1; 0 when nothing binds."""
        used = [0.0]
        if self.seconds:
            used.append(at.elapsed / self.seconds)
        if self.steps:
            used.append(at.step / self.steps)
        if self.tokens:
            used.append(at.tokens / self.tokens)
        return min(1.0, max(used))

    def stop_reason(self, at: Position, next_tokens: int, next_seconds: float) -> str:
        """Why no further step may be taken ("steps", "tokens", "seconds"), or "". The first step always may."""
        if at.step == 0:
            return ""
        if self.steps and at.step >= self.steps:
            return "steps"
        if self.tokens and at.tokens + next_tokens > self.tokens:
            return "tokens"
        if self.seconds and at.elapsed + next_seconds > self.seconds:
            return "seconds"
        return ""


def training_window(recipe: Recipe, spent: float, reserve_seconds: float) -> Window:
    """The window of the main loop.

    Args:
        spent: seconds of the budget's clock used before the first step.
        reserve_seconds: kept back for what follows training; ignored unless `budget.count_packing`.
    """
    budget = recipe.budget
    post = recipe.quant.post_qat_frac if recipe.quant.post_qat else 0.0
    seconds = 0.0
    if budget.seconds:
        reserve = reserve_seconds if budget.count_packing else 0.0
        seconds = max(LEAST_SECONDS, budget.seconds * (1 - post) - reserve - spent)
    steps = _main_part(budget.steps, post) if budget.steps else 0
    tokens = _main_part(budget.tokens, post) if budget.tokens else 0
    return Window(seconds, steps, tokens)


def _main_part(total: int, post: float) -> int:
    after = max(1, round(total * post)) if post else 0  # the phase always takes a step, so the loop leaves one
    return max(1, total - after)


def post_window(recipe: Recipe, done: Position, spent: float, reserve_seconds: float) -> Window:
    """The window of the post-training QAT phase, measured from its own start.

    Args:
        done: the position at which the main loop stopped.
        spent: seconds of the budget's clock used so far.
    """
    budget = recipe.budget
    fraction = recipe.quant.post_qat_frac
    seconds = 0.0
    if budget.seconds:
        reserve = reserve_seconds if budget.count_packing else 0.0
        seconds = max(LEAST_SECONDS, min(budget.seconds * fraction, budget.seconds - reserve - spent))
    steps = round(budget.steps * fraction)
    tokens = round(budget.tokens * fraction)
    if not (seconds or steps or tokens):  # nothing binds: as many steps as the fraction means of those taken
        steps = round(done.step * fraction / max(1e-9, 1 - fraction))
    return Window(seconds, max(1, steps) if budget.steps or steps else 0, max(1, tokens) if budget.tokens else 0)


def base_shape(recipe: Recipe) -> Shape:
    """The shape before any stage."""
    return Shape(recipe.train.seq_len, recipe.train.batch_tokens)


def shape_at(recipe: Recipe, fraction: float) -> Shape:
    """The shape that holds at `fraction` of the window: stages in the order of `at`, the later one wins."""
    shape = base_shape(recipe)
    for stage in _ordered(recipe.stages):
        if stage.at <= fraction:
            shape = _apply(shape, stage)
    return shape


def all_shapes(recipe: Recipe) -> list[Shape]:
    """Every distinct (seq_len, batch_tokens) the run will see, in order; LR factors are left at 1."""
    shapes = []
    shape = base_shape(recipe)
    if not any(stage.at == 0 for stage in recipe.stages):
        shapes.append(shape)
    for stage in _ordered(recipe.stages):
        shape = _apply(shape, stage)
        shapes.append(Shape(shape.seq_len, shape.batch_tokens))
    return list(dict.fromkeys(shapes))


def _ordered(stages: Sequence[StageSection]) -> list[StageSection]:
    return sorted(stages, key=lambda stage: stage.at)


def _apply(shape: Shape, stage: StageSection) -> Shape:
    return Shape(stage.seq_len or shape.seq_len, stage.batch_tokens or shape.batch_tokens, stage.lr_mul)


class StepTimer:
    """A careful estimate of the next step's duration: the slowest of the last few, plus a margin for jitter."""

    def __init__(self, keep: int = 8, margin: float = 1.1) -> None:
        self._recent: list[float] = []
        self._keep = keep
        self._margin = margin

    def add(self, seconds: float) -> None:
        self._recent = [*self._recent, seconds][-self._keep :]

    def reset(self) -> None:
        """Forget: the next steps have another shape."""
        self._recent = []

    def estimate(self) -> float:
        """Seconds, 0 before the first step."""
        return max(self._recent) * self._margin if self._recent else 0.0

    def mean(self) -> float:
        return math.fsum(self._recent) / len(self._recent) if self._recent else 0.0
