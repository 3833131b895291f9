"""Rearrangements that the records put before a byte compressor: rows by likeness, bytes by plane, streams."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_SHUFFLED, _STREAMS = b"BSHF", b"PGRP"
_MOST_STREAMS = 1 << 16


def similarity_order(codes_RC: np.ndarray) -> np.ndarray:
    """uint16 (R,): row 0, then always the nearest of the rows left (L1 distance), the lowest of equals.

    `codes_RC` is int8, at most 65,536 rows. The time grows with the square of the rows.
    """
    rows = len(codes_RC)
    left = codes_RC.astype(np.int16)
    where = np.arange(rows)
    order = np.zeros(rows, np.uint16)
    for place in range(1, rows):
        at = int(np.searchsorted(where, order[place - 1]))
        current = left[at].copy()
        # the rows that are left stay in their order, so that the first of the nearest ones is the lowest
        left[at:-1], where[at:-1] = left[at + 1 :], where[at + 1 :]
        left, where = left[:-1], where[:-1]
        distance = np.abs(left - current).sum(1, dtype=np.int64)
        order[place] = where[int(distance.argmin())]
    return order


def byte_shuffle(data: bytes, stride: int) -> bytes:
    """ "BSHF", the stride, then bytes 0, s, 2s, ..., 1, s + 1, ...; data shorter than the stride stay as they are."""
    if len(data) < stride or not data:
        return data
    return _SHUFFLED + bytes([stride]) + b"".join(data[first::stride] for first in range(stride))


def byte_unshuffle(data: bytes, size: int, stride: int) -> bytes:
    """The `size` bytes that `byte_shuffle` was given. ValueError for anything else."""
    if size < stride or not size:
        if len(data) != size:
            raise ValueError("shuffled bytes of the wrong length")
        return data
    head = len(_SHUFFLED) + 1
    if data[:head] != _SHUFFLED + bytes([stride]) or len(data) != head + size:
        raise ValueError("not shuffled bytes of the right length")
    out = np.empty(size, np.uint8)
    at = head
    for first in range(stride):
        count = len(range(first, size, stride))
        out[first::stride] = np.frombuffer(data, np.uint8, count, at)
        at += count
    return out.tobytes()


def join_streams(streams: Sequence[bytes]) -> bytes:
    """ "PGRP", uint32 count, uint32 lengths, the streams; little-endian."""
    lengths = np.array([len(streams), *map(len, streams)], "<u4")
    return _STREAMS + lengths.tobytes() + b"".join(streams)


def split_streams(data: bytes) -> list[bytes]:
    """What `join_streams` was given. ValueError unless every byte is accounted for."""
    if data[:4] != _STREAMS or len(data) < 8:
        raise ValueError("not a bundle of streams")
    count = int.from_bytes(data[4:8], "little")
    at = 8 + 4 * count
    if count > _MOST_STREAMS or at > len(data):
        raise ValueError("a bundle of too many streams")
    lengths = np.frombuffer(data, "<u4", count, 8).tolist()
    if at + sum(lengths) != len(data):
        raise ValueError("a bundle of streams of another length")
    ends = np.cumsum([at, *lengths]).tolist()
    return [data[start : start + length] for start, length in zip(ends, lengths, strict=False)]
