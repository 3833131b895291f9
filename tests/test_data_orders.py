"""The orders of training data: every window once, driven by the seed, the same on any number of ranks and resumed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paramgolf.data.loader import Loader
from paramgolf.data.orders import BOS_ID, Coprime, Place, ShuffledShards
from paramgolf.errors import GolfError

SEEDED = ["coprime", "shuffled_shards", "packed"]


def shards(*sizes: int) -> list[np.ndarray]:
    """Numbers from 1000 on, so that a token is its own position, with a document start every 23 tokens or so."""
    parts, at = [], 1000
    for size in sizes:
        part = np.arange(at, at + size, dtype=np.uint16)
        part[3::23] = BOS_ID
        parts.append(part)
        at += size
    return parts


def loader(order: str, *, seed: int = 1, rank: int = 0, world: int = 1, **shape: int) -> Loader:
    sizes = {"seq_len": 8, "batch_tokens": 96} | shape
    return Loader(shards(700, 90, 401), rank=rank, world=world, seed=seed, order=order, **sizes)  # type: ignore[arg-type]


def rows(one: Loader, count: int) -> list[list[int]]:
    return [row for _ in range(count) for x, y in [one.next_batch()] for row in torch.cat([x, y[:, -1:]], 1).tolist()]


@pytest.mark.parametrize("order", SEEDED)
@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_together_see_what_one_rank_sees(order: str, world: int) -> None:
    alone = loader(order)
    ranks = [loader(order, rank=r, world=world) for r in range(world)]
    for _ in range(9):
        whole = alone.next_batch()[0]
        dealt = torch.empty_like(whole)
        for rank, one in enumerate(ranks):
            dealt[rank::world] = one.next_batch()[0]
        assert torch.equal(dealt, whole)


@pytest.mark.parametrize("order", SEEDED)
def test_the_seed_decides(order: str) -> None:
    assert rows(loader(order, seed=1), 6) == rows(loader(order, seed=1), 6)
    assert rows(loader(order, seed=1), 6) != rows(loader(order, seed=2), 6)


@pytest.mark.parametrize("order", SEEDED)
@settings(max_examples=15, deadline=None)
@given(before=st.integers(0, 30), seed=st.integers(0, 5), change=st.booleans())
def test_a_resumed_run_goes_on_where_it_stopped(order: str, before: int, seed: int, change: bool) -> None:
    one = loader(order, seed=seed)
    rows(one, before)
    if change:
        one.set_shape(16, 96)
    state = json.loads(json.dumps(one.state_dict()))
    expected = rows(one, 5)
    other = loader(order, seed=seed)
    rows(other, 2)
    other.load_state_dict(state)
    assert rows(other, 5) == expected and other.state_dict() == one.state_dict()


@pytest.mark.parametrize("kind", [Coprime, ShuffledShards])
def test_an_epoch_uses_every_window_once(kind: type[Coprime] | type[ShuffledShards]) -> None:
    sizes, seq_len = [700, 90, 401, 5], 8
    order = kind(sizes, seq_len, 1 * seq_len, 3)
    place, starts = Place(seq_len, seq_len), []
    for _ in range(200):
        taken, place = order.take(place)
        starts += taken.tolist()
    edges = np.cumsum([0, *sizes])
    used: dict[int, list[int]] = {i: [] for i in range(len(sizes))}
    for start in starts[:140]:  # not yet all of the first epoch: no window twice, none over the end of its shard
        shard = int(np.searchsorted(edges, start, side="right")) - 1
        assert start + seq_len + 1 <= edges[shard + 1]
        used[shard].append(start)
    assert not used[3]
    for own in used.values():
        assert len(set(own)) == len(own) and len({start % seq_len for start in own}) <= 1
    again = starts[: len(starts) // 2]
    assert set(starts) - set(again) or len(again) > 140  # a second epoch begins


def test_a_batch_mixes_shards() -> None:
    first = rows(loader("coprime", batch_tokens=8 * 9), 1)
    assert len({(row[0] - 1000) // 700 for row in first if row[0] != BOS_ID}) > 1


def test_batches_of_another_size_begin_another_epoch_of_coprime_windows() -> None:
    one = loader("coprime", batch_tokens=8 * 4)
    rows(one, 5)
    one.set_shape(8, 8 * 6)
    taken: list[tuple[int, ...]] = []
    while one.state_dict()["epoch"] < 2:
        taken += map(tuple, rows(one, 1))
    whole = taken[: len(taken) - int(one.state_dict()["part"])]
    least = sum((size - 8) // 8 for size in (700, 90, 401))
    assert least <= len(whole) <= least + 3 and len(set(whole)) == len(whole)


def test_packed_rows_are_long_and_in_document_order() -> None:
    one = loader("packed", batch_tokens=8 * 16)
    x, y = one.next_batch()
    assert x.shape == (8, 16) and torch.equal(x[:, 1:], y[:, :-1])
    assert int(x[0, 0]) == BOS_ID
    flat = torch.cat([x, y[:, -1:]], 1).flatten()
    steps = flat[1:] - flat[:-1]
    inside = (flat[1:] != BOS_ID) & (flat[:-1] != BOS_ID)
    assert (steps[inside] == 1).float().mean() > 0.95  # but where the shard ends


@pytest.mark.parametrize("seed", range(12))
def test_longer_rows_in_the_middle_of_an_epoch_of_packed_ones(seed: int) -> None:
    """A cut may leave no long row on either side: then the epoch is one piece, where it was two before."""
    one = Loader(shards(2600), seq_len=32, batch_tokens=8 * 256, order="packed", seed=seed)
    for _ in range(4):
        one.next_batch()
    one.set_shape(32, 8 * 2048)
    for _ in range(9):
        assert one.next_batch()[0].shape[1] == 2048


def test_orders_by_shard_refuse_what_is_too_small() -> None:
    for order in ("coprime", "shuffled_shards"):
        with pytest.raises(GolfError, match=f"data.order={order}"):
            Loader(shards(30, 40), seq_len=64, batch_tokens=64, order=order)
    with pytest.raises(GolfError, match=r"data\.order=packed has rows of 16 tokens"):
        Loader(shards(15, 16), seq_len=8, batch_tokens=128, order="packed")
    with pytest.raises(GolfError, match=r"unknown data\.order"):
        Loader(shards(100), seq_len=8, batch_tokens=64, order="nonsense")
