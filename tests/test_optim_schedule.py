"""The schedules: endpoints, order and the meaning of every key."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramgolf.optim.schedule import lr_mul, momentum
from paramgolf.recipe.sections import ScheduleSection


def test_step_rule() -> None:
    section = ScheduleSection(warmdown_iters=4)
    got = [lr_mul(section, step=s, budget_steps=10) for s in range(12)]
    assert got == [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0]


def test_time_rule_uses_the_measured_rate() -> None:
    section = ScheduleSection(warmdown_iters=100)
    # 200 steps in 20 s: 100 steps are 10 s, so the decay of a 60 s budget would start at 50 s.
    assert lr_mul(section, step=200, elapsed=20.0, budget_seconds=60.0) == 1.0
    assert lr_mul(section, step=550, elapsed=55.0, budget_seconds=60.0) == pytest.approx(0.5)
    assert lr_mul(section, step=600, elapsed=60.0, budget_seconds=60.0) == 0.0
    # Time that was no training (compilation) does not stretch the window when the rate is given.
    assert lr_mul(section, step=10, elapsed=40.0, budget_seconds=60.0) < 1.0
    assert lr_mul(section, step=10, elapsed=40.0, budget_seconds=60.0, step_seconds=0.1) == 1.0
    assert lr_mul(section, step=0, elapsed=0.0, budget_seconds=60.0) == 1.0


def test_the_budget_that_ends_first_decides() -> None:
    section = ScheduleSection(warmdown_frac=0.5)
    both = lr_mul(section, step=9, elapsed=1.0, budget_seconds=100.0, budget_steps=10)
    assert both == pytest.approx(0.2)
    assert lr_mul(section, step=1, elapsed=90.0, budget_seconds=100.0, budget_steps=10) == pytest.approx(0.2)
    assert lr_mul(section, step=1, tokens=90, budget_tokens=100) == pytest.approx(0.2)


def test_unbound_and_without_decay() -> None:
    assert lr_mul(ScheduleSection(), step=10**6, elapsed=1e6) == 1.0
    assert lr_mul(ScheduleSection(warmdown_iters=0), step=9, elapsed=9.0, budget_seconds=9.0, budget_steps=10) == 1.0


def test_shapes_floor_and_ramp() -> None:
    section = ScheduleSection(warmdown_frac=1.0, warmdown_shape="cosine")
    assert lr_mul(section, step=25, budget_steps=100) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    floor = ScheduleSection(warmdown_frac=0.85, min_lr=0.1)
    assert lr_mul(floor, step=100, budget_steps=100) == 0.1
    assert lr_mul(floor, step=0, budget_steps=100) == 1.0
    ramp = ScheduleSection(lr_warmup_steps=4, warmdown_iters=0)
    assert [lr_mul(ramp, step=s, budget_steps=100) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_token_budget_counts_steps_in_tokens() -> None:
    section = ScheduleSection(warmdown_iters=10)
    # 50 steps took 500 tokens, so 10 steps are 100 tokens.
    assert lr_mul(section, step=50, tokens=500, budget_tokens=1000) == 1.0
    assert lr_mul(section, step=95, tokens=950, budget_tokens=1000) == pytest.approx(0.5)


def test_momentum_by_steps_and_by_time() -> None:
    steps = ScheduleSection(momentum_warmup_start=0.85, momentum_warmup_steps=100)
    assert momentum(steps, 0.95, step=0) == 0.85
    assert momentum(steps, 0.95, step=50) == pytest.approx(0.9)
    assert momentum(steps, 0.95, step=500) == 0.95
    timed = ScheduleSection(momentum_warmup_start=0.85, momentum_warmup_steps=100, momentum_warmup_frac=0.2)
    assert momentum(timed, 0.95, step=0, elapsed=10.0, budget_seconds=100.0) == pytest.approx(0.9)
    assert momentum(timed, 0.95, step=50) == pytest.approx(0.9)  # no clock: by steps
    assert momentum(ScheduleSection(momentum_warmup_steps=0), 0.95, step=0) == 0.95


fractions = st.floats(0, 1)


@given(
    section=st.builds(
        ScheduleSection,
        warmdown_iters=st.integers(0, 5000),
        warmdown_frac=fractions,
        warmdown_shape=st.sampled_from(["linear", "cosine"]),
        min_lr=fractions,
        lr_warmup_steps=st.integers(0, 50),
    ),
    step=st.integers(0, 10**6),
    elapsed=st.floats(0, 1e5),
    seconds=st.floats(0, 1e4),
    steps=st.integers(0, 10**5),
)
def test_always_a_fraction(section: ScheduleSection, step: int, elapsed: float, seconds: float, steps: int) -> None:
    value = lr_mul(section, step=step, elapsed=elapsed, budget_seconds=seconds, budget_steps=steps)
    assert 0.0 <= value <= 1.0
    assert 0.85 <= momentum(section, 0.95, step=step, elapsed=elapsed, budget_seconds=seconds) <= 0.95


@given(iters=st.integers(1, 200), total=st.integers(1, 300), shape=st.sampled_from(["linear", "cosine"]))
def test_never_rises_again(iters: int, total: int, shape: str) -> None:
    section = ScheduleSection(warmdown_iters=iters, warmdown_shape=shape)  # type: ignore[arg-type]
    values = [lr_mul(section, step=s, budget_steps=total) for s in range(total + 1)]
    assert all(a >= b for a, b in pairwise(values))
    assert values[-1] == pytest.approx(0.0, abs=1e-12)
