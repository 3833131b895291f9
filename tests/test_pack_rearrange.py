"""Rows by likeness, bytes by plane, bundles of streams, and the two record layouts built from them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paramgolf.pack.codecs.archive import GroupedCodec, ShuffledCodec, group_streams
from paramgolf.pack.codecs.base import CodeSpec, CodeTensor
from paramgolf.pack.codecs.rearrange import (
    byte_shuffle,
    byte_unshuffle,
    join_streams,
    similarity_order,
    split_streams,
)
from paramgolf.pack.coding import available


def greedy(codes: np.ndarray) -> list[int]:
    """The definition, slowly."""
    order, left = [0], list(range(1, len(codes)))
    while left:
        gaps = [int(np.abs(codes[row].astype(int) - codes[order[-1]].astype(int)).sum()) for row in left]
        order.append(left.pop(gaps.index(min(gaps))))
    return order


@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_order_of_rows_is_the_greedy_one_with_the_lowest_of_equals(rows: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-2, 3, (rows, columns)).astype(np.int8)
    assert similarity_order(codes).tolist() == greedy(codes)


@given(st.binary(max_size=70), st.integers(1, 5))
def test_bytes_by_plane_come_back(data: bytes, stride: int) -> None:
    shuffled = byte_shuffle(data, stride)
    assert byte_unshuffle(shuffled, len(data), stride) == data
    if len(data) >= stride and data:
        assert shuffled[5:] == b"".join(data[k::stride] for k in range(stride))
        for wrong in (shuffled[1:], shuffled + b"x", b"\0" + shuffled[1:]):
            with pytest.raises(ValueError, match="shuffled"):
                byte_unshuffle(wrong, len(data), stride)


@given(st.lists(st.binary(max_size=20), max_size=5))
def test_streams_come_back_and_nothing_else_does(streams: list[bytes]) -> None:
    data = join_streams(streams)
    assert split_streams(data) == streams
    for wrong in (data[:-1], data + b"x", b"PGRQ" + data[4:], data[:4] + b"\xff\xff\xff\xff" + data[8:]):
        with pytest.raises(ValueError, match="streams"):
            split_streams(wrong)


def layer(name: str, codes: np.ndarray) -> CodeTensor:
    return CodeTensor(CodeSpec(name, codes.shape, 6), codes)


def test_groups_hold_a_role_each_transposed_with_rows_of_some_in_order_of_likeness() -> None:
    draw = np.random.default_rng(0)
    q, k, e = (draw.integers(-9, 9, shape).astype(np.int8) for shape in ((7, 4), (5, 4), (6, 3)))
    tensors = [layer("blocks.0.attn.c_q.weight", q), layer("blocks.0.attn.c_k.weight", k), layer("tok_emb.weight", e)]
    streams, orders = group_streams(tensors)
    assert list(streams) == ["tok_emb.weight", "attn.c_k.weight", "attn.c_q.weight"]
    assert streams["attn.c_k.weight"] == k.T.tobytes()
    assert orders.tolist() == greedy(e) + greedy(q)
    assert streams["attn.c_q.weight"] == q[greedy(q)].T.tobytes()


def test_alike_rows_next_to_each_other_are_smaller_and_auto_does_not_ask_for_it() -> None:
    """Eight kinds of rows, mixed: in order of likeness a byte coder finds the runs."""
    draw = np.random.default_rng(1)
    kinds = draw.integers(-9, 10, (8, 96)).astype(np.int8)
    tensors = [layer("tok_emb.weight", kinds[draw.permutation(np.repeat(np.arange(8), 32))])]
    grouped, shuffled = GroupedCodec().encode(tensors), ShuffledCodec().encode(tensors)
    assert len(grouped) < len(shuffled)
    assert not {"grouped", "shuffled", "raw"} & set(available())


def test_an_order_of_rows_that_is_none_is_refused() -> None:
    codes = np.arange(12, dtype=np.int8).reshape(4, 3)
    tensors = [layer("tok_emb.weight", codes)]
    streams = split_streams(GroupedCodec().encode(tensors))
    streams[-1] = b"\0" + np.array([0, 1, 1, 2], "<u2").tobytes()
    with pytest.raises(ValueError, match="order of rows"):
        GroupedCodec().decode(join_streams(streams), [t.spec for t in tensors])
