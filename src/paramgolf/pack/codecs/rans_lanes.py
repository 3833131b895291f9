"""Interleaved rANS in numpy: many 32-bit states side by side, 16-bit words, one table per class, tables that learn.

Element e belongs to lane e % lanes, so a step handles `lanes` neighbouring elements in a few vector operations. All
lanes share one sequence of words in the order the decoder wants them. Tables are rebuilt from the counts of everything
coded so far at block ends that depend on the element count only (`blocks`), so no table is sent.

The states start from 16 bits of payload instead of nothing (`carry`): the last elements, coded before by a few lanes,
travel in them, so that a thousand lanes cost no more than a dozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from paramgolf.pack.codecs.scale_model import PRECISION, TOTAL, normalise

_LOW = 1 << 16  # a state lies in [2**16, 2**32) between steps
_STEPS = 64  # steps per batch of table look-ups
_FIRST_BLOCK = 1 << 13
_LARGEST_BLOCK = 1 << 21


@dataclass
class Tables:
    """Learning frequency tables: row = context, column = symbol. Both sides build the same one from the same counts.

    prior: int64 (contexts, symbols) weights before anything is seen, 0 where the symbol does not exist.
    mirror: int64 flat index of the symbol whose counts are pooled with each one's (itself = no pooling).
    """

    prior: np.ndarray
    mirror: np.ndarray

    def __post_init__(self) -> None:
        self.symbols = self.prior.shape[1]
        self.used = self.prior > 0
        self.counts = np.zeros(self.prior.size, np.int64)

    def add(self, ids: np.ndarray) -> None:
        """Count coded elements given as flat indices context * symbols + symbol."""
        self.counts += np.bincount(ids, minlength=self.prior.size)

    def frequencies(self) -> tuple[np.ndarray, np.ndarray]:
        """(frequency, cumulative frequency before it), int64 (contexts, symbols)."""
        pooled = self.counts + self.counts[self.mirror]
        freq = normalise(self.prior + (pooled.reshape(self.prior.shape) << 20), self.used)
        return freq, np.cumsum(freq, 1) - freq


def blocks(elements: int, lanes: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the stretches coded with one set of tables; every start is a multiple of `lanes`."""
    start = 0
    while start < elements:
        length = min(max(_FIRST_BLOCK, start // 2), _LARGEST_BLOCK)
        length = -(-length // lanes) * lanes
        yield start, min(start + length, elements)
        start += length


@dataclass
class Plan:
    """What an encoder has to know before it starts at the end: the stretches and the table of each."""

    lanes: int
    spans: list[tuple[int, int]]
    entries: list[np.ndarray]  # uint32 per flat symbol: frequency << 16 | cumulative frequency


def plan(ids: np.ndarray, tables: Tables, lanes: int, learn: bool = True) -> Plan:
    """Go through the symbols forwards, as the decoder will; `tables` is left as the decoder's will be after them."""
    spans = list(blocks(len(ids), lanes)) if learn else [(0, len(ids))]
    entries = []
    for start, end in spans:
        freq, before = tables.frequencies()
        entries.append((freq << 16 | before).astype(np.uint32).ravel())
        if learn:
            tables.add(ids[start:end])
    return Plan(lanes, spans, entries)


def encode(ids: np.ndarray, plan: Plan, carry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat symbol ids -> (states uint32 (lanes,), words uint16). The decoder gives `carry`, uint16 (lanes,), back."""
    x = carry.astype(np.uint32) + np.uint32(_LOW)
    out: list[np.ndarray] = []
    batch = plan.lanes * _STEPS
    for (start, end), table in zip(reversed(plan.spans), reversed(plan.entries), strict=True):
        for low in range(start + (end - start - 1) // batch * batch, start - 1, -batch):
            _encode_batch(x, table.take(ids[low : min(low + batch, end)]), plan.lanes, out)
    words = np.concatenate(out[::-1]) if out else np.zeros(0, np.uint16)
    return x, words


def _encode_batch(x: np.ndarray, entries: np.ndarray, lanes: int, out: list[np.ndarray]) -> None:
    freq = entries >> np.uint32(16)
    before = entries & np.uint32(0xFFFF)
    last = ((freq.astype(np.uint64) << np.uint64(32 - PRECISION)) - np.uint64(1)).astype(np.uint32)
    rest = np.uint32(TOTAL) - freq
    for low in range((len(entries) - 1) // lanes * lanes, -1, -lanes):
        f = freq[low : low + lanes]
        state = x[: len(f)]
        full = state > last[low : low + lanes]
        words = state[full]
        out.append(words.astype(np.uint16))
        state >>= full.view(np.uint8) << np.uint8(4)
        quotient = state // f
        quotient *= rest[low : low + lanes]
        quotient += before[low : low + lanes]
        state += quotient


class Decoder:
    """Decodes what `encode` made, element ranges in order; `finish` gives the carry back."""

    def __init__(self, states: np.ndarray, words: np.ndarray, tables: Tables) -> None:
        self.x = states.astype(np.uint32)
        self.words = words
        self.at = 0
        self.tables = tables
        self.lanes = len(states)

    def run(self, contexts: np.ndarray, learn: bool = True) -> np.ndarray:
        """Contexts (n,) -> flat symbol ids int32 (n,). Raises ValueError where the words run out."""
        ids = np.empty(len(contexts), np.int32)
        for start, end in blocks(len(contexts), self.lanes) if learn else [(0, len(contexts))]:
            freq, before = self.tables.frequencies()
            counts = freq.ravel()
            symbol_of = np.repeat(np.arange(freq.size, dtype=np.int32), counts)
            # uint32 arithmetic wraps: frequency << 16 | slot - cumulative, without a wide temporary
            entry_of = np.repeat(((freq << 16) - before).astype(np.uint32).ravel(), counts)
            entry_of.reshape(-1, TOTAL)[...] += np.arange(TOTAL, dtype=np.uint32)
            for low in range(start, end, self.lanes * _STEPS):
                high = min(low + self.lanes * _STEPS, end)
                where = self._batch(contexts[low:high], entry_of)
                np.take(symbol_of, where, out=ids[low:high])
            if learn:
                self.tables.add(ids[start:end])
        return ids

    def _batch(self, contexts: np.ndarray, entry_of: np.ndarray) -> np.ndarray:
        base = contexts.astype(np.int64) << PRECISION
        words, at, limit = self.words, self.at, len(self.words)
        mask, shift = np.uint32(TOTAL - 1), np.uint32(PRECISION)
        low16, sixteen, low = np.uint32(0xFFFF), np.uint32(16), np.uint32(_LOW)
        for first in range(0, len(base), self.lanes):
            where = base[first : first + self.lanes]
            x = self.x[: len(where)]
            where |= x & mask
            entry = entry_of.take(where)
            x >>= shift
            x *= entry >> sixteen
            x += entry & low16
            small = np.flatnonzero(x < low)
            if at + len(small) > limit:
                raise ValueError("the weight stream ends early")
            x[small] = x[small] << sixteen | words[at : at + len(small)]
            at += len(small)
        self.at = at
        return base

    def finish(self) -> np.ndarray:
        """The carry, uint16 (lanes,). Raises ValueError if states or words left over show a damaged stream."""
        if self.at != len(self.words) or (self.x >> np.uint32(17)).any():
            raise ValueError("the weight stream does not end where it should")
        return (self.x & np.uint32(0xFFFF)).astype(np.uint16)
