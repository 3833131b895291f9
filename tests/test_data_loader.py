"""The loader: every rank's rows, the reference's order, exact resumption."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paramgolf.data.loader import Loader, TokenStream
from paramgolf.errors import GolfError


def shards(*sizes: int) -> list[np.ndarray]:
    """Consecutive numbers, so that a token is its own position."""
    ends = np.cumsum(sizes)
    return [np.arange(end - size, end, dtype=np.uint16) for size, end in zip(sizes, ends, strict=True)]


def batches(loader: Loader, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [loader.next_batch() for _ in range(count)]


def same(a: list[tuple[torch.Tensor, torch.Tensor]], b: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    return all(torch.equal(p[0], q[0]) and torch.equal(p[1], q[1]) for p, q in zip(a, b, strict=True))


def naive_sequential(
    tokens: list[int], seq_len: int, batch_tokens: int, world: int, steps: int
) -> list[list[list[int]]]:
    """The reference's rule written out: world * (local + 1) tokens a call, rank r takes the r-th span. Rows by rank."""
    local, accumulation = batch_tokens // 8, 8 // world
    at, ranks = 0, [[] for _ in range(world)]
    for _ in range(steps * accumulation):
        for rank in range(world):
            span = [tokens[(at + i) % len(tokens)] for i in range(local + 1)]
            at += local + 1
            ranks[rank] += [span[i : i + seq_len + 1] for i in range(0, local, seq_len)]
    return ranks


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_sequential_is_the_reference_rule(world: int) -> None:
    data = shards(700, 641)
    expected = naive_sequential(list(range(1341)), 16, 256, world, 9)
    for rank in range(world):
        loader = Loader(data, seq_len=16, batch_tokens=256, rank=rank, world=world, order="sequential")
        got = [row for x, y in batches(loader, 9) for row in torch.cat([x, y[:, -1:]], dim=1).tolist()]
        assert got == expected[rank]


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
@pytest.mark.parametrize("world", [2, 3, 8])
def test_all_ranks_together_see_the_same_rows(order: str, world: int) -> None:
    data = shards(500, 37, 460)
    alone = Loader(data, seq_len=8, batch_tokens=8 * 12, order=order, seed=3)  # type: ignore[arg-type]
    together = [
        Loader(data, seq_len=8, batch_tokens=8 * 12, order=order, seed=3, rank=r, world=world) for r in range(world)
    ]  # type: ignore[arg-type]
    for _ in range(30):
        x, y = alone.next_batch()
        parts = [loader.next_batch() for loader in together]
        got = torch.cat([p[0] for p in parts]).tolist()
        assert sorted(got) == sorted(x.tolist())
        assert all(torch.equal(p[1][:, :-1], p[0][:, 1:]) for p in parts)
        assert torch.equal(y[:, :-1], x[:, 1:])


def test_more_ranks_than_rows() -> None:
    loaders = [Loader(shards(100), seq_len=8, batch_tokens=16, rank=r, world=4) for r in range(4)]
    assert sorted(len(loader.next_batch()[0]) for loader in loaders) == [0, 0, 1, 1]


def test_an_epoch_visits_every_window_once_with_a_new_phase() -> None:
    loader = Loader(shards(300, 213), seq_len=10, batch_tokens=10, seed=7)
    epochs: list[list[int]] = []
    for _ in range(4):
        epoch = loader.state_dict()["epoch"]
        starts = []
        while loader.state_dict()["epoch"] == epoch:
            x, y = loader.next_batch()
            assert y[0, -1] == x[0, -1] + 1  # windows run over the end of a shard
            starts.append(int(x[0, 0]))
        assert len(set(starts)) == len(starts)
        assert {start % 10 for start in starts} == {min(starts)}
        assert starts != sorted(starts)
        assert len(starts) == (512 - min(starts)) // 10
        epochs.append(starts)
    assert len({min(starts) for starts in epochs}) > 1


def test_the_seed_decides_the_shuffled_order() -> None:
    def first(seed: int) -> list[list[int]]:
        return Loader(shards(1000), seq_len=8, batch_tokens=64, seed=seed).next_batch()[0].tolist()

    assert first(1) == first(1)
    assert first(1) != first(2)


@pytest.mark.parametrize("size", [2, 5, 9, 40])
@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_a_short_text_wraps_around(size: int, order: str) -> None:
    loader = Loader(shards(size), seq_len=16, batch_tokens=64, seed=1, order=order)  # type: ignore[arg-type]
    for x, y in batches(loader, 10):
        assert x.shape == y.shape == (4, 16)
        assert torch.equal(y, (x + 1) % size)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["shuffled", "sequential"]),
    st.integers(0, 12),
    st.integers(1, 3),
    st.integers(2, 400),
    st.integers(0, 2),
)
def test_resuming_continues_exactly(order: str, before: int, world: int, size: int, rank: int) -> None:
    def make() -> Loader:
        return Loader(
            shards(size, 90),
            seq_len=8,
            batch_tokens=48,
            rank=rank % world,
            world=world,
            seed=11,
            order=order,  # type: ignore[arg-type]
        )

    whole = make()
    batches(whole, before)
    state = json.loads(json.dumps(whole.state_dict()))
    expected = batches(whole, 6)
    resumed = make()
    batches(resumed, 3)  # whatever it did before does not matter
    resumed.load_state_dict(state)
    assert same(batches(resumed, 6), expected)
    assert resumed.state_dict()["tokens"] == (before + 6) * 48
    for loader in (whole, resumed):
        loader.close()


def test_shape_changes_apply_to_the_next_batch_and_resume() -> None:
    loader = Loader(shards(2000), seq_len=8, batch_tokens=64, seed=2)
    batches(loader, 3)
    loader.set_shape(16, 128)
    x, _ = loader.next_batch()
    assert x.shape == (8, 16)
    other = Loader(shards(2000), seq_len=8, batch_tokens=64, seed=2)
    other.load_state_dict(loader.state_dict())
    assert same(batches(loader, 4), batches(other, 4))
    assert (loader.seq_len, loader.batch_tokens) == (16, 128)


def test_a_larger_batch_alone_does_not_lose_its_place() -> None:
    loader, other = (Loader(shards(5000), seq_len=8, batch_tokens=64, seed=2) for _ in range(2))
    expected = [row for x, _ in batches(loader, 5) for row in x.tolist()]
    got = [row for x, _ in batches(other, 1) for row in x.tolist()]
    other.set_shape(8, 256)
    got += [row for x, _ in batches(other, 1) for row in x.tolist()]
    assert got == expected


@pytest.mark.parametrize("key", ["seed", "order", "total"])
def test_resuming_with_other_data_or_settings_is_refused(key: str) -> None:
    loader = Loader(shards(500), seq_len=8, batch_tokens=64, seed=2)
    state = {**loader.state_dict(), key: "sequential" if key == "order" else 1}
    with pytest.raises(GolfError, match="cannot resume"):
        loader.load_state_dict(state)


def test_bad_sizes_and_bad_ids() -> None:
    with pytest.raises(GolfError, match=r"multiple of train.seq_len"):
        Loader(shards(500), seq_len=8, batch_tokens=60)
    with pytest.raises(GolfError, match="at least 2 are needed"):
        Loader(shards(1), seq_len=8, batch_tokens=64)
    with pytest.raises(GolfError, match="outside the vocabulary of 100"):
        Loader(shards(500), seq_len=8, batch_tokens=512, vocab_size=100).next_batch()


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 300), st.integers(0, 80))
def test_stream_reads_wrap(sizes: list[int], start: int, count: int) -> None:
    total = sum(sizes)
    got = TokenStream(shards(*sizes)).read(start, count)
    assert got.tolist() == [(start + i) % total for i in range(count)]
