"""Which window predicts which token: the plan every scorer and every decoder follows.

A stream of `n` tokens has `n - 1` targets; target `i` (1 <= i < n) is predicted from the tokens before it in its
window. A window (start, length, first_scored) reads tokens `start .. start + length - 1` and predicts `start + 1 ..
start + length`; of its `length` positions it scores `first_scored .. length - 1`.

Rules:
- `exact`: every target exactly once, for every n, seq_len and stride. Windows start at 0, stride, 2 stride, ...; the
  first scores all it predicts, each later one what the earlier ones left. The last is shortened at the end of the
  stream and stays on the grid of starts, so it keeps at least `seq_len - stride` tokens of context as every other does.
  `stride = seq_len` is the standard score.
- `full_only`, as PR 114 and PR 137 score: only full windows, so a tail shorter than `stride` is lost (and all of a
  stream shorter than `seq_len`).
- `with_tail`, as PR 128 and PR 107 score: while `stride` targets remain, windows are shortened and each scores its last
  `stride` targets, so the last targets of the stream count up to `seq_len / stride` times.

A worked example: 10 tokens, windows of 4, stride 2. The nine targets are tokens 1 to 9.

>>> for start, length, first in plan(10, seq_len=4, stride=2).rows():
...     print(f"reads {start}..{start + length - 1}, scores", list(range(start + first + 1, start + length + 1)))
reads 0..3, scores [1, 2, 3, 4]
reads 2..5, scores [5, 6]
reads 4..7, scores [7, 8]
reads 6..8, scores [9]
>>> plan(10, seq_len=4, stride=2, rule="full_only").rows()
[(0, 4, 0), (2, 4, 2), (4, 4, 2)]
>>> plan(10, seq_len=4, stride=2, rule="with_tail").rows()
[(0, 4, 0), (2, 4, 2), (4, 4, 2), (6, 3, 1)]
>>> plan(10, seq_len=4, stride=4).rows()  # the standard score: no overlap
[(0, 4, 0), (4, 4, 0), (8, 1, 0)]

Lanes cut the stream at document starts into independent streams, so that a decoder can run them side by side. The first
token of a lane is given, as the first token of the stream is; no window crosses a cut.

>>> plan(10, seq_len=4, stride=4, lane_starts=[0, 6]).rows()
[(0, 4, 0), (4, 1, 0), (6, 3, 0)]
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paramgolf.errors import GolfError

RULES = ("exact", "full_only", "with_tail")


@dataclass(frozen=True)
class Plan:
    """Windows in scoring order; three int64 arrays of equal length, and where the lanes start."""

    start: np.ndarray
    length: np.ndarray
    first_scored: np.ndarray
    n_tokens: int
    lane_starts: tuple[int, ...] = (0,)

    def __len__(self) -> int:
        return len(self.start)

    def rows(self) -> list[tuple[int, int, int]]:
        return list(zip(self.start.tolist(), self.length.tolist(), self.first_scored.tolist(), strict=True))

    @property
    def counts(self) -> np.ndarray:
        """Targets scored by each window, int64."""
        return self.length - self.first_scored

    def targets(self) -> np.ndarray:
        """The scored targets (token indices, int64) in scoring order, repeats included."""
        counts = self.counts
        first = self.start + self.first_scored + 1
        offsets = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(first, counts) + offsets

    def context(self) -> np.ndarray:
        """For each scored target, how many tokens of its window precede it, int64."""
        return self.targets() - np.repeat(self.start, self.counts)

    def part(self, rank: int, world: int) -> Plan:
        """The contiguous range of windows that `rank` of `world` scores; the parts are disjoint and complete."""
        return self.among(slice(len(self) * rank // world, len(self) * (rank + 1) // world))

    def among(self, which: slice | np.ndarray) -> Plan:
        """Only these windows: a slice, or bool (windows,)."""
        picked = (self.start[which], self.length[which], self.first_scored[which])
        return Plan(*picked, self.n_tokens, self.lane_starts)


def overlapping(stride: int, seq_len: int) -> int:
    """The stride, or 0 where windows lie side by side; GolfError where targets would be left between them."""
    if stride > seq_len:
        raise GolfError(
            f"score.stride is {stride}, and a window has {seq_len} tokens: choose 1 to {seq_len}, or 0 for no overlap"
        )
    return stride if stride < seq_len else 0


def plan(n_tokens: int, seq_len: int, stride: int, rule: str = "exact", *, lane_starts: Sequence[int] = (0,)) -> Plan:
    """The windows over a stream of `n_tokens` tokens; see the module's text for the rules.

    `lane_starts` are ascending token indices beginning with 0 (see `lanes`).
    Raises GolfError for a stride outside 1..seq_len, or a stream without a target.
    """
    if not 1 <= stride <= seq_len:
        raise GolfError(f"score.stride is {stride}: choose 1 to seq_len ({seq_len})")
    if rule not in RULES:
        raise GolfError(f"unknown score.windows '{rule}'; known: {', '.join(RULES)}")
    if n_tokens < 2:
        raise GolfError(f"nothing to score: the text is {n_tokens} token(s) long, at least 2 are needed")
    cuts = [*lane_starts, n_tokens]
    if cuts[0] != 0 or any(b <= a for a, b in itertools.pairwise(cuts)):
        raise ValueError(f"lane starts must ascend from 0 and stay below {n_tokens}: {list(lane_starts)}")
    parts = [
        (low + start, length, first)
        for low, high in itertools.pairwise(cuts)
        for start, length, first in [_one_stream(high - low - 1, seq_len, stride, rule)]
    ]
    start, length, first = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Plan(start, length, first, n_tokens, tuple(int(s) for s in lane_starts))


def _one_stream(targets: int, seq_len: int, stride: int, rule: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """start, length, first_scored (int64) over a stream with so many targets (0 gives no windows)."""
    if rule == "exact":
        windows = 1 + max(0, -((seq_len - targets) // stride)) if targets else 0
    elif rule == "full_only":
        windows = 1 + (targets - seq_len) // stride if targets >= seq_len else 0
    else:
        windows = 1 + (targets - stride) // stride if targets >= stride else 0
    start = np.arange(windows, dtype=np.int64) * stride
    length = np.minimum(seq_len, targets - start)
    first = np.maximum(length - stride, 0)
    if rule == "exact":
        first[:] = seq_len - stride
    first[:1] = 0
    return start, length, first


def lanes(tokens: np.ndarray, count: int, bos_id: int) -> tuple[int, ...]:
    """Where to cut `tokens` (1-D ids) into at most `count` lanes of nearly equal length: token indices, the first 0.

    Each cut is at the document start (a `bos_id` token) nearest to the ideal cut; a stream with few documents gets
    fewer lanes. Depends on nothing but the arguments, so that an encoder and its decoder cut alike.

    >>> lanes(np.array([1, 5, 6, 1, 7, 8, 9, 1, 4, 4]), 2, bos_id=1)
    (0, 3)
    """
    return lanes_between(np.flatnonzero(np.asarray(tokens) == bos_id), len(tokens), count)


def lanes_between(documents: np.ndarray, n_tokens: int, count: int) -> tuple[int, ...]:
    """`lanes` of a stream of `n_tokens` whose documents begin at the ascending indices `documents` (int)."""
    documents = documents[(documents > 0) & (documents < n_tokens - 1)]  # a lane needs a target
    cuts = {0}
    for i in range(1, count):
        ideal = n_tokens * i // count
        near = documents[max(0, int(np.searchsorted(documents, ideal)) - 1) :][:2]
        if len(near):
            cuts.add(int(near[np.argmin(np.abs(near - ideal))]))
    return tuple(sorted(cuts))
