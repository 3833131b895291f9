"""What the steps of a changed recipe take beside those of the recipe as it is: timed in turn, so that a machine that
slows down does so for both."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace

from paramgolf.dist import Dist
from paramgolf.optim.schedule import loop_passes
from paramgolf.recipe.sections import Recipe
from paramgolf.train.budget import shape_at
from paramgolf.train.timing import time_steps

PAIRS = 3
_WORK = ("optim.matrix", "optim.grad_clip", "data.vocab_size", "stages")  # keys that change what a step computes,
_VALUES = ("model.init", "model.qk_gain")  # beside all of the model's but these


def changes_the_step(overrides: Iterable[str]) -> bool:
    """Whether a step computes something else with these overrides, not just with other numbers."""
    keys = [word.partition("=")[0] for word in overrides]
    return any(key in _WORK or (key.startswith("model.") and key not in _VALUES) for key in keys)


def _seconds(recipe: Recipe) -> float:
    return next(iter(time_steps(recipe, recipe.data.vocab_size, Dist()).seconds.values()))


def step_seconds(recipe: Recipe, timer: Callable[[Recipe], float] = _seconds) -> float:
    """Of an average step of a run, whose stages and loops each last for their part of it. `timer`: of one part."""
    changes = {
        0.0,
        *(stage.at for stage in recipe.stages),
        *(recipe.schedule.loop_at if recipe.model.loop_extra else ()),
    }
    begins = sorted(at for at in changes if at < 1)
    parts = zip(begins, [*begins[1:], 1.0], strict=True)
    return sum((end - begin) * timer(_during(recipe, begin)) for begin, end in parts)


def _during(recipe: Recipe, fraction: float) -> Recipe:
    """A recipe that is all through as `recipe` is at `fraction` of the run."""
    shape = shape_at(recipe, fraction)
    loops = loop_passes(recipe.schedule, recipe.model.loop_extra, fraction)
    return replace(
        recipe,
        stages=(),
        train=replace(recipe.train, seq_len=shape.seq_len, batch_tokens=shape.batch_tokens),
        model=replace(recipe.model, loop_extra=loops, loop_layers=recipe.model.loop_layers if loops else ()),
        schedule=replace(recipe.schedule, loop_at=(0.0,)),
    )


def step_ratio(recipe: Recipe, changed: Recipe, pairs: int = PAIRS) -> tuple[float, float]:
    """(steps of `changed` over those of `recipe`, seconds of one of `recipe`), medians of so many pairs."""
    timed = [(step_seconds(recipe), step_seconds(changed)) for _ in range(pairs)]
    return statistics.median(b / a for a, b in timed), statistics.median(a for a, _ in timed)
