"""A sequential t test: look after every further run, stop at the first that is clear, and still err at most at alpha.

A group-sequential test with one look for each number of runs n = 2 .. most. Of the permitted error rate the part spent
up to look n is alpha (n / most)^RHO (the power family of Kim & DeMets, Biometrika 74, 1987, of Lan & DeMets' spending
functions, Biometrika 70, 1983). Under the null hypothesis of normal scores the whole sequence of t statistics has a
distribution without any unknown parameter (Jennison & Turnbull, Biometrika 78, 1991, compute with it), so the
boundaries are quantiles of simulated sequences: no approximation but the number of simulations. They depend on `most`
and alpha only: looking again, or going on after an interruption, changes nothing.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

RHO = 2.0  # between equal shares for all looks (1) and nearly all for the last one (3)
_SEQUENCES, _NUMBERS = 400_000, 8_000_000  # simulated null sequences, and at most so many numbers
MOST = 200


@dataclass(frozen=True)
class Look:
    """What n runs say. `p`: chance of crossing a boundary earlier, or here as clearly as seen, if the truth is the
    margin (stage-wise ordering); None without spread."""

    n: int
    statistic: float | None
    boundary: float
    p: float | None
    better: bool


def t_statistics(x: np.ndarray) -> np.ndarray:
    """Student's t of the first 2, 3, ... columns: (s, n) float64 -> (s, n - 1). Infinite where there is no spread."""
    n = np.arange(1, x.shape[1] + 1)
    total, squares = np.cumsum(x, axis=1), np.cumsum(x * x, axis=1)
    mean = total / n
    spread = np.maximum(squares - n * mean * mean, 0.0)[:, 1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(n[1:]) * mean[:, 1:] / np.sqrt(spread / (n[1:] - 1))


@functools.lru_cache(4)
def _null(most: int) -> np.ndarray:
    """t statistics of simulated sequences under the null, (s, most - 1) float64; always the same ones."""
    count = min(_SEQUENCES, _NUMBERS // most)
    return t_statistics(np.random.default_rng(20_260_318).standard_normal((count, most)))


@functools.lru_cache(16)
def boundaries(most: int, alpha: float) -> tuple[float, ...]:
    """The t statistic that n runs must reach, for n = 2 .. most."""
    t = _null(most)
    open_ = np.ones(len(t), bool)
    found, rejected = [], 0
    for n in range(2, most + 1):
        room = math.floor(alpha * (n / most) ** RHO * len(t)) - rejected
        here = np.sort(t[open_, n - 2])
        bound = float(here[-room - 1]) if 0 < room < len(here) else math.inf
        bound = math.nextafter(bound, math.inf)
        found.append(bound)
        crossed = t[:, n - 2] >= bound
        rejected += int(np.count_nonzero(crossed & open_))
        open_ &= ~crossed
    return tuple(found)


def look(improvements: np.ndarray, margin: float, most: int, alpha: float) -> Look:
    """What these runs (n,), 2 <= n <= most, say on "better by at least the margin"."""
    x = np.asarray(improvements, np.float64) - margin
    bounds = boundaries(most, alpha)
    bound = bounds[len(x) - 2]
    if not x.std():
        return Look(len(x), None, bound, None, False)
    statistic = float(math.sqrt(len(x)) * x.mean() / x.std(ddof=1))
    null = _null(most)[:, : len(x) - 1]
    earlier = (null[:, :-1] >= np.array(bounds[: len(x) - 2])).any(axis=1)
    p = float(np.mean(earlier | (null[:, -1] >= statistic)))
    return Look(len(x), statistic, bound, max(p, 1 / len(null)), statistic >= bound)
