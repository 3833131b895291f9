"""The training window, its end, and the stage table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramgolf.train.budget import (
    Position,
    Shape,
    StepTimer,
    Window,
    all_shapes,
    post_window,
    shape_at,
    training_window,
)
from tests.train_common import QUANT, tiny


def test_a_timed_window_leaves_room_for_what_follows() -> None:
    recipe = tiny(budget={"steps": 0, "seconds": 100.0}, quant=QUANT | {"post_qat": "int6", "post_qat_frac": 0.05})
    assert training_window(recipe, 20.0, 7.0).seconds == pytest.approx(100 - 5 - 20 - 7)
    challenge = tiny(
        budget={"steps": 0, "seconds": 600.0, "clock": "challenge", "count_packing": False},
        quant=QUANT | {"post_qat": "int6"},
    )
    assert training_window(challenge, 0.0, 7.0).seconds == pytest.approx(570.0), "as PR 107: 570 s and 30 s"


def test_post_training_takes_its_fraction() -> None:
    recipe = tiny(budget={"steps": 100}, quant=QUANT | {"post_qat": "int6", "post_qat_frac": 0.05})
    assert training_window(recipe, 0.0, 0.0).steps == 95
    assert post_window(recipe, Position(95), 0.0, 0.0).steps == 5
    timed = tiny(budget={"steps": 0, "seconds": 100.0}, quant=QUANT | {"post_qat": "int6"})
    assert post_window(timed, Position(9), 97.0, 1.0).seconds == pytest.approx(2.0), "never beyond the budget"


def test_the_first_step_is_always_taken() -> None:
    for window in (Window(seconds=1e-3), Window(steps=1), Window(tokens=1)):
        assert window.stop_reason(Position(), 10**9, 1e9) == ""
        assert window.stop_reason(Position(1, 10**6, 5.0), 10, 0.1)


@given(
    seconds=st.floats(0.5, 1e3), steps=st.integers(0, 1000), tokens=st.integers(0, 10**6),
    durations=st.lists(st.floats(0.01, 2.0), min_size=1, max_size=200), step_tokens=st.integers(1, 5000),
)  # fmt: skip
def test_no_budget_is_exceeded_when_steps_do_not_get_slower(
    seconds: float, steps: int, tokens: int, durations: list[float], step_tokens: int
) -> None:
    window, timer, at = Window(seconds, steps, tokens), StepTimer(), Position()
    for duration in sorted(durations, reverse=True):
        if window.stop_reason(at, step_tokens, timer.estimate()):
            break
        timer.add(duration)
        at = Position(at.step + 1, at.tokens + step_tokens, at.elapsed + duration)
    if at.step > 1:
        assert at.elapsed <= seconds
        assert not tokens or at.tokens <= tokens
        assert not steps or at.step <= steps
    assert 0.0 <= window.fraction(at) <= 1.0


def test_stages_apply_in_order_and_keep_what_they_do_not_set() -> None:
    recipe = tiny(
        stages=[{"at": 0.6, "batch_tokens": 512}, {"at": 0.3, "seq_len": 64, "lr_mul": 0.5}],
    )
    assert shape_at(recipe, 0.0) == Shape(32, 256, 1.0)
    assert shape_at(recipe, 0.3) == Shape(64, 256, 0.5)
    assert shape_at(recipe, 1.0) == Shape(64, 512, 1.0)
    assert all_shapes(recipe) == [Shape(32, 256), Shape(64, 256), Shape(64, 512)]


def test_a_stage_at_the_start_replaces_the_sections_shape() -> None:
    recipe = tiny(stages=[{"at": 0.0, "seq_len": 16}])
    assert all_shapes(recipe) == [Shape(16, 256)] == [shape_at(recipe, 0.0)]


def test_the_window_is_used_by_whatever_binds_first() -> None:
    assert Window(10.0, 100, 0).fraction(Position(50, 0, 1.0)) == 0.5
    assert Window(10.0, 100, 0).fraction(Position(5, 0, 9.0)) == 0.9
    assert Window().fraction(Position(5, 5, 5.0)) == 0.0
