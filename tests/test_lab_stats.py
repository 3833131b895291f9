"""p-values equal scipy's; on synthetic runs whose truth is the margin itself, errors stay at their nominal rate."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from paramgolf.lab import stats

scipy_stats = pytest.importorskip("scipy.stats")
RNG = np.random.default_rng
SIMULATIONS, MARGIN, NOISE = 2000, 0.003, 0.0012


def groups(seed: int, n: int, m: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = RNG(seed)
    return 1.22 + NOISE * rng.standard_normal(n), 1.22 - MARGIN + spread * NOISE * rng.standard_normal(m)


@pytest.mark.parametrize(("n", "m"), [(3, 3), (4, 6), (7, 5)])
def test_equal_to_scipy(n: int, m: int) -> None:
    a, b = groups(n, n, m)
    welch = stats.welch(a, b, 0.001, 0.95)
    expected = scipy_stats.ttest_ind(a - 0.001, b, equal_var=False, alternative="greater")
    assert welch.p == pytest.approx(expected.pvalue, rel=1e-12)
    differences = a[: min(n, m)] - b[: min(n, m)]
    paired = stats.one_sample(differences, 0.001, 0.95)
    assert paired.p == pytest.approx(
        scipy_stats.ttest_rel(a[: min(n, m)] - 0.001, b[: min(n, m)], alternative="greater").pvalue, rel=1e-9
    )
    welch_interval = scipy_stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert (welch.low, welch.high) == pytest.approx(tuple(welch_interval))
    low, high = scipy_stats.t.interval(0.95, len(differences) - 1, differences.mean(), scipy_stats.sem(differences))
    assert (paired.low, paired.high) == pytest.approx((low, high))
    flipped = scipy_stats.permutation_test(
        (differences - 0.001,), np.mean, permutation_type="samples", alternative="greater", n_resamples=np.inf
    )
    assert stats.sign_flip(differences, 0.001).p == pytest.approx(flipped.pvalue, rel=1e-12)
    exchanged = scipy_stats.permutation_test(
        (a - 0.001, b), lambda x, y: x.mean() - y.mean(), alternative="greater", n_resamples=np.inf
    )
    assert stats.exchange(a, b, 0.001).p == pytest.approx(exchanged.pvalue, rel=1e-12)


def test_the_smallest_p_is_reached_by_the_clearest_runs() -> None:
    clear = stats.exchange(np.array([2.0, 2.1, 2.2]), np.array([1.0, 1.1, 1.2]), 0.0)
    assert clear.p == clear.smallest == 1 / 20
    assert stats.sign_flip(np.array([1.0, 2.0, 3.0]), 0.0).p == 1 / 8
    drawn = stats.sign_flip(np.full(30, 1.0), 0.0)
    assert not drawn.exact and drawn.p == drawn.smallest == 1 / (stats.DRAWS + 1)


@pytest.mark.parametrize(
    ("name", "p_of"),
    [
        ("paired t", lambda a, b: stats.one_sample(a - b, MARGIN, 0.95).p),
        ("one-sample t", lambda a, b: stats.one_sample(1.22 - b, MARGIN, 0.95).p),
        ("Welch t", lambda a, b: stats.welch(a, b, MARGIN, 0.95).p),
        ("sign flips", lambda a, b: stats.sign_flip(a - b, MARGIN).p),
        ("exchange", lambda a, b: stats.exchange(a, b, MARGIN).p),
    ],
)
def test_false_positives(name: str, p_of: Callable[[np.ndarray, np.ndarray], float]) -> None:
    n = 8 if name == "sign flips" else 5
    p = np.array([p_of(*groups(1000 + i, n, n)) for i in range(SIMULATIONS)])
    for alpha in (0.05, 0.01):
        found = np.mean(p <= alpha)
        assert found <= alpha + 2 * math.sqrt(alpha * (1 - alpha) / SIMULATIONS)
        assert found > 0  # a test that never speaks is none


def test_false_positives_of_welch_with_unequal_spread() -> None:
    found = sum(stats.welch(*groups(i, 5, 7, 2.0), MARGIN, 0.95).p <= 0.05 for i in range(SIMULATIONS)) / SIMULATIONS
    assert found <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / SIMULATIONS)


def test_runs_needed_are_the_tabulated_ones() -> None:
    assert stats.runs_needed(1.0, 1.0, 0.05, 0.8) == 8  # one-sided, d = 1
    assert stats.runs_needed_each(0.5, (1.0, 1.0), 0.05, 0.8) == 51  # one-sided, d = 0.5
    assert stats.runs_needed(-0.1, 1.0, 0.05, 0.8) is None
    assert stats.runs_needed(1e-6, 1.0, 0.05, 0.8) is None
    assert stats.runs_needed(1000.0, 1.0, 0.01, 0.9) == 2


def test_the_needed_runs_do_find_the_effect() -> None:
    n = stats.runs_needed(0.001, NOISE, 0.05, 0.8)
    assert n is not None
    rng = RNG(5)
    found = [
        stats.one_sample(MARGIN + 0.001 + NOISE * rng.standard_normal(n), MARGIN, 0.95).p <= 0.05 for _ in range(1000)
    ]
    assert np.mean(found) == pytest.approx(0.8, abs=0.06)


def test_without_spread_there_is_no_p() -> None:
    assert stats.one_sample(np.array([0.1]), 0.0, 0.95).p is None
    assert stats.one_sample(np.array([0.5, 0.5]), 0.0, 0.95).p is None
    assert stats.welch(np.array([1.0]), np.array([2.0, 3.0]), 0.0, 0.95).p is None


def test_holm() -> None:
    assert stats.holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert stats.holm([0.7, 0.9]) == [1.0, 1.0]
