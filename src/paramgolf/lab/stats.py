"""Tests for few runs: is one better than another by at least a margin? scipy's t tests, and permutations beside them.

An improvement is `baseline - candidate` (positive = the candidate is better). Every p-value is one-sided: how likely
an improvement at least as large as the one seen would be if the true one were only the margin.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from paramgolf.errors import GolfError

EXACT = 1 << 16  # up to so many arrangements all are tried
DRAWS = 20_000  # otherwise so many are drawn
MOST_RUNS = 10_000


@dataclass(frozen=True)
class TTest:
    """`low`, `high`: two-sided confidence interval of the improvement. All None where one run, or no spread at all,
    leaves nothing to estimate an error from."""

    method: str
    improvement: float
    deviation: float | None
    df: float | None
    p: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Permutation:
    """`smallest`: the least p that so few runs can give, whatever they say."""

    p: float
    smallest: float
    arrangements: int
    exact: bool


def scipy_stats() -> ModuleType:
    """scipy.stats, loaded when a test needs it."""
    try:
        from scipy import stats
    except ImportError:
        raise GolfError("comparing runs needs scipy; pip install 'paramgolf[lab]'") from None
    return stats


def one_sample(improvements: np.ndarray, margin: float, confidence: float, method: str = "paired t") -> TTest:
    """Student's t of improvements (n,) float64 against the margin: paired runs, or runs against a fixed number."""
    x = np.asarray(improvements, np.float64)
    mean = float(x.mean())
    deviation = float(x.std(ddof=1)) if len(x) > 1 else None
    if not deviation:
        return TTest(method, mean, deviation, None, None, None, None)
    test = scipy_stats().ttest_1samp(x, margin, alternative="greater")
    half = _half_width(confidence, float(test.df), deviation / math.sqrt(len(x)))
    return TTest(method, mean, deviation, float(test.df), float(test.pvalue), mean - half, mean + half)


def welch(baseline: np.ndarray, candidate: np.ndarray, margin: float, confidence: float) -> TTest:
    """Welch's t of two groups of runs (n,), (m,) float64, no equal variances assumed."""
    a, b = np.asarray(baseline, np.float64), np.asarray(candidate, np.float64)
    mean = float(a.mean() - b.mean())
    if len(a) < 2 or len(b) < 2 or not a.std() + b.std():
        return TTest("Welch t", mean, None, None, None, None, None)
    deviation = math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    test = scipy_stats().ttest_ind(a - margin, b, equal_var=False, alternative="greater")
    half = _half_width(confidence, float(test.df), math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b)))
    return TTest("Welch t", mean, deviation, float(test.df), float(test.pvalue), mean - half, mean + half)


def _half_width(confidence: float, df: float, error: float) -> float:
    """Half a two-sided confidence interval of a mean with this standard error."""
    return float(scipy_stats().t.isf((1 - confidence) / 2, df)) * error


def sign_flip(improvements: np.ndarray, margin: float) -> Permutation:
    """Permutation test of paired runs: under the null each improvement lies as likely above the margin as below."""
    x = np.asarray(improvements, np.float64) - margin
    exact = 2 ** len(x) <= EXACT
    signs = _all_signs(len(x)) if exact else np.random.default_rng(0).choice([-1.0, 1.0], (DRAWS, len(x)))
    return _permutation(signs @ x / len(x), float(x.mean()), 2 ** len(x), exact)


def exchange(baseline: np.ndarray, candidate: np.ndarray, margin: float) -> Permutation:
    """Permutation test of two groups: under the null the runs could have come in any order, the margin taken off."""
    a, b = np.asarray(baseline, np.float64) - margin, np.asarray(candidate, np.float64)
    n, m = len(a), len(b)
    pooled = np.concatenate([a, b])
    pooled -= pooled.mean()  # sums of small numbers: the seen arrangement must tie with itself
    count = math.comb(n + m, n)
    exact = count <= EXACT
    if exact:
        sums = pooled[_all_splits(n + m, n)].sum(1)
    else:
        sums = np.random.default_rng(0).permuted(np.tile(pooled, (DRAWS, 1)), axis=1)[:, :n].sum(1)
    return _permutation(sums / n - (pooled.sum() - sums) / m, float(a.mean() - b.mean()), count, exact)


def _permutation(statistics: np.ndarray, seen: float, count: int, exact: bool) -> Permutation:
    """The seen arrangement counts as one; ties within rounding count as at least as large."""
    as_large = int(np.count_nonzero(statistics >= seen - 1e-9 * np.abs(statistics).max()))
    if exact:
        return Permutation(as_large / count, 1 / count, count, True)
    return Permutation((as_large + 1) / (DRAWS + 1), 1 / (DRAWS + 1), DRAWS, False)


@functools.lru_cache(8)
def _all_signs(n: int) -> np.ndarray:
    return np.array(list(itertools.product((1.0, -1.0), repeat=n)))


@functools.lru_cache(8)
def _all_splits(n: int, k: int) -> np.ndarray:
    return np.array(list(itertools.combinations(range(n), k)))


def holm(p_values: list[float | None]) -> list[float | None]:
    """Adjusted for the number of comparisons (Holm 1979); None stays None."""
    order = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[i] = largest
    return adjusted


def runs_needed(effect: float, deviation: float, alpha: float, power: float) -> int | None:
    """Pairs (or runs against a fixed number) for a one-sided t test to find `effect` beyond the margin with `power`.

    None if there is no effect, or more than 10,000 would be needed.
    """
    return _smallest(lambda n: _power(effect / deviation * math.sqrt(n), n - 1, alpha), effect, power)


def runs_needed_each(effect: float, variances: tuple[float, float], alpha: float, power: float) -> int | None:
    """The same for each of two groups of equal size with these variances, by Welch's degrees of freedom."""
    total = sum(variances)
    share = total**2 / sum(v**2 for v in variances)
    return _smallest(lambda n: _power(effect / math.sqrt(total / n), share * (n - 1), alpha), effect, power)


def _power(shift: float, df: float, alpha: float) -> float:
    """Of a one-sided t test whose statistic is shifted by `shift` standard errors."""
    stats = scipy_stats()
    return 1.0 if shift > 30 else float(stats.nct.sf(stats.t.isf(alpha, df), df, shift))


def _smallest(power_of: Callable[[int], float], effect: float, power: float) -> int | None:
    if effect <= 0 or power_of(MOST_RUNS) < power:
        return None
    low, high = 1, MOST_RUNS  # power grows with n: halve the interval
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power_of(middle) >= power else (middle, high)
    return high
