"""The window planner: exact cover for every stream, and the references' rules."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paramgolf.errors import GolfError
from paramgolf.score import windows

SHAPES = st.integers(1, 40).flatmap(lambda t: st.tuples(st.integers(2, 200), st.just(t), st.integers(1, t)))


def test_worked_example() -> None:
    assert doctest.testmod(windows).failed == 0


@settings(max_examples=400, deadline=None)
@given(SHAPES, st.data())
def test_exact_covers_every_target_once(shape: tuple[int, int, int], data: st.DataObject) -> None:
    n, seq_len, stride = shape
    cuts = data.draw(st.sets(st.integers(1, n - 1), max_size=4))
    starts = [0, *sorted(cuts)]
    plan = windows.plan(n, seq_len, stride, lane_starts=starts)
    expected = [i for i in range(1, n) if i not in cuts]
    assert plan.targets().tolist() == expected  # in order, each once
    assert np.all(plan.length <= seq_len) and np.all(plan.length >= 1)
    assert np.all(plan.start + plan.length < n)
    lane = np.array(starts)[np.searchsorted(starts, plan.targets(), side="right") - 1]
    least = np.minimum(plan.targets() - lane, seq_len - stride + 1)
    assert np.all(plan.context() >= least)  # never less context than the stride promises
    assert np.all(plan.context() <= plan.targets() - lane)  # never across a cut


@settings(max_examples=200, deadline=None)
@given(SHAPES)
def test_with_tail_repeats_only_the_end(shape: tuple[int, int, int]) -> None:
    n, seq_len, stride = shape
    plan = windows.plan(n, seq_len, stride, "with_tail")
    counts = np.bincount(plan.targets(), minlength=n)
    full = windows.plan(n, seq_len, stride, "full_only")
    assert np.all(counts[full.targets()] >= 1)
    assert np.all(np.bincount(full.targets(), minlength=n) <= 1)
    assert np.all(counts <= -(-seq_len // stride))
    if n - 1 >= stride:
        assert counts[1:].min() >= 1 or (n - 1) % stride  # what is left over is less than a stride


@settings(max_examples=100, deadline=None)
@given(SHAPES, st.integers(1, 9))
def test_parts_are_disjoint_and_complete(shape: tuple[int, int, int], world: int) -> None:
    plan = windows.plan(*shape)
    rows = [row for rank in range(world) for row in plan.part(rank, world).rows()]
    assert rows == plan.rows()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=300), st.integers(1, 12))
def test_lanes_start_documents(tokens: list[int], count: int) -> None:
    ids = np.array(tokens, dtype=np.uint16)
    starts = windows.lanes(ids, count, bos_id=1)
    assert starts[0] == 0 and len(starts) <= count and len(set(starts)) == len(starts)
    assert all(ids[s] == 1 for s in starts[1:])
    assert len(windows.plan(len(ids), 8, 4, lane_starts=starts).targets()) == len(ids) - len(starts)


def test_lanes_are_nearly_equal() -> None:
    ids = np.full(10_000, 9)
    ids[::50] = 1
    lengths = np.diff([*windows.lanes(ids, 8, 1), len(ids)])
    assert len(lengths) == 8 and lengths.max() - lengths.min() <= 100


@pytest.mark.parametrize(
    ("n", "seq_len", "stride", "rule", "word"),
    [
        (10, 4, 5, "exact", "stride"),
        (10, 4, 0, "exact", "stride"),
        (1, 4, 4, "exact", "nothing to score"),
        (10, 4, 4, "exakt", "exakt"),
    ],
)
def test_bad_plans_are_refused(n: int, seq_len: int, stride: int, rule: str, word: str) -> None:
    with pytest.raises(GolfError, match=word):
        windows.plan(n, seq_len, stride, rule)
