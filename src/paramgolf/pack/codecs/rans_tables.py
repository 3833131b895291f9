"""The tables of a weight stream: which context an element is coded in, which symbol stands for which code.

A table holds the codes that its class makes likely; one more symbol stands for all others ("outside"), whose values
follow in the side data. That keeps tables short and precise where codes far out are rare.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paramgolf.pack.codecs import rans_lanes
from paramgolf.pack.codecs import scale_model as sm
from paramgolf.pack.codecs.rans_bits import BitReader, Bits, unsigned
from paramgolf.pack.codecs.rans_layout import STRENGTHS, Group, View

_TAIL_MASS = 1 << 7  # a table leaves out codes whose mass together is at most this, of 2**20
_MOST_CONTEXTS = 7 * sm.CLASSES
_OUTSIDE = 1000  # not a code
_CHUNK = 1 << 18


@dataclass
class TableSet:
    """The learning tables of a stream, and what its symbols mean."""

    tables: rans_lanes.Tables
    first: np.ndarray  # (contexts,) code of symbol 0
    count: np.ndarray  # (contexts,) symbols that are codes; the next one, if there, stands for any other code

    @classmethod
    def build(cls, groups: list[Group], reach: list[tuple[int, int]]) -> TableSet:
        """`reach`: lowest and highest class of each group."""
        wanted = [(group, c) for group, (low, high) in zip(groups, reach, strict=True) for c in range(low, high + 1)]
        if len(wanted) > _MOST_CONTEXTS:
            raise ValueError("the weight stream has too many tables")
        priors, first, count, mirrors = [], [], [], []
        for group, scale_class in wanted:
            mass = sm.masses(group.shape, scale_class, group.low, group.high) + 1
            values = np.arange(group.low, group.high + 1)
            outside = np.array([int(mass[np.abs(values) > m].sum()) for m in range(129)])
            kept = np.abs(values) <= max(int(np.argmax(outside <= _TAIL_MASS)), 1)
            rest = mass[~kept]
            part = mass[kept].tolist() + ([int(rest.sum())] if len(rest) else [])
            low = int(values[kept][0]) if kept.any() else 0
            first.append(low)
            count.append(int(kept.sum()))
            mirror = np.arange(257)
            if group.symmetric:
                opposite = -(low + np.arange(int(kept.sum()))) - low
                inside = (opposite >= 0) & (opposite < int(kept.sum()))
                mirror[: len(opposite)][inside] = opposite[inside]
            mirrors.append(mirror)
            priors.append(np.array(part + [0] * (257 - len(part)), np.int64) * STRENGTHS[group.strength])
        width = max((c + 1 for c in count), default=1)
        prior = np.stack(priors)[:, :width] if priors else np.zeros((0, width), np.int64)
        flat = np.array([m[:width] + k * width for k, m in enumerate(mirrors)], np.int64).reshape(-1)
        return cls(rans_lanes.Tables(prior, flat), np.array(first, np.int64), np.array(count, np.int64))


def contexts_of(views: list[View], groups: list[Group]) -> tuple[np.ndarray, TableSet]:
    """(context of every coded element uint16, tables). A group has a context for each class its sums can reach."""
    coded = [v for v in views if v.constant is None and len(v.classes[0]) and len(v.classes[1])]
    reach = [(sm.CLASSES, 1)] * len(groups)
    for v in coded:
        low, high = (int(np.clip(f(v.classes[0]) + f(v.classes[1]), 1, sm.CLASSES)) for f in (np.min, np.max))
        reach[v.group] = min(reach[v.group][0], low), max(reach[v.group][1], high)
    starts = np.cumsum([0, *(max(high - low + 1, 0) for low, high in reach)])
    contexts = np.empty(sum(len(v.classes[0]) * len(v.classes[1]) for v in coded), np.uint16)
    at = 0
    for v in coded:
        low, high = reach[v.group]
        rows, columns = (np.clip(c, -4096, 4096).astype(np.int16) for c in v.classes)
        cell = rows[:, None] + columns[None, :]
        if cell.min() < low or cell.max() > high:
            np.clip(cell, low, high, out=cell)
        block = contexts[at : at + cell.size].reshape(cell.shape)
        np.add(cell, np.int16(int(starts[v.group]) - low), out=block, casting="unsafe")
        at += cell.size
    return contexts, TableSet.build(groups, reach)


def code_escape(coder: Bits, tables: TableSet, context: int, code: int) -> int:
    """A code outside its table."""
    low = int(tables.first[context])
    high = low + int(tables.count[context]) - 1
    negative = coder.bit("outside sign", code < low)
    distance = unsigned(coder, "outside", (low - code if negative else code - high) - 1, direct=16)
    return low - 1 - distance if negative else high + 1 + distance


def symbols_of(contexts: np.ndarray, codes: np.ndarray, tables: TableSet) -> tuple[np.ndarray, np.ndarray]:
    """(flat symbol ids int32, indices of elements outside their table)."""
    width = tables.tables.symbols
    every = np.arange(-128, 128)[None, :] - tables.first[:, None]
    inside = (every >= 0) & (every < tables.count[:, None])
    lookup = np.where(inside, every, tables.count[:, None]) + np.arange(len(every))[:, None] * width
    flat, outside = lookup.astype(np.int32).ravel(), ~inside.ravel()
    ids = np.empty(len(codes), np.int32)
    escaped = [np.zeros(0, np.int64)]
    for at in range(0, len(codes), _CHUNK):  # index arrays that stay in the cache
        index = contexts[at : at + _CHUNK].astype(np.int64) * 256 + 128
        index += codes[at : at + _CHUNK]
        flat.take(index, out=ids[at : at + _CHUNK])
        escaped.append(np.flatnonzero(outside.take(index)) + at)
    return ids, np.concatenate(escaped)


def codes_of(side: BitReader, contexts: np.ndarray, ids: np.ndarray, tables: TableSet) -> np.ndarray:
    """int8 codes (n,) of the symbols `ids` (n,), escaped ones read from `side`; ValueError for damaged data."""
    symbol = np.arange(tables.tables.symbols)[None, :]
    value = np.clip(symbol + tables.first[:, None], -128, 127).astype(np.int16)
    value[symbol == tables.count[:, None]] = _OUTSIDE
    wide = value.ravel().take(ids) if len(ids) else np.zeros(0, np.int16)
    codes = wide.astype(np.int8)
    for index in np.flatnonzero(wide == _OUTSIDE).tolist():
        code = code_escape(side, tables, int(contexts[index]), 0)
        if not -128 <= code <= 127:
            raise ValueError("the weight stream holds a code outside int8")
        codes[index] = code
    return codes
