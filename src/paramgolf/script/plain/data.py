"""The training rows of `data.order = "sequential"` in batches of one shape: what data/loader.py gives such a recipe."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

REFERENCE_SPANS = 8  # GPUs times accumulation steps of the reference: a batch is so many runs of neighbouring rows
AHEAD = 2  # batches read while the model works


class SequentialRows:
    """Batches of this rank, without end: the shards one after another, over and over."""

    def __init__(self, shards: Sequence[np.ndarray], seq_len: int, batch_tokens: int, rank: int, world: int) -> None:
        self.shards, self.seq_len = shards, seq_len
        self.ends = np.cumsum([len(shard) for shard in shards])
        rows = batch_tokens // seq_len
        spans = math.gcd(REFERENCE_SPANS, rows)
        first = np.arange(spans) * (rows // spans * seq_len + 1)  # spans share no token, not even as a target
        starts = first[:, None] + np.arange(rows // spans) * seq_len
        self.starts = starts[rank::world].reshape(-1)  # of this rank's rows, in the tokens of a batch
        self.batch_length = rows * seq_len + spans
        self.place = 0
        self.thread = ThreadPoolExecutor(1)
        self.ahead: deque[Future[tuple[Tensor, Tensor]]] = deque()

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (rows of this rank, T) int64."""
        while len(self.ahead) < AHEAD:
            self.ahead.append(self.thread.submit(self.load, self.starts + self.place))
            self.place = (self.place + self.batch_length) % int(self.ends[-1])
        return self.ahead.popleft().result()

    def load(self, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        rows = np.empty((len(starts), self.seq_len + 1), np.int64)
        for row, start in zip(rows, starts, strict=True):
            self.read(row, int(start))
        tokens = torch.from_numpy(rows)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def read(self, row: np.ndarray, start: int) -> None:
        """Fill `row` with the tokens from `start` on."""
        filled = 0
        while filled < len(row):
            at = (start + filled) % int(self.ends[-1])
            index = int(np.searchsorted(self.ends, at, side="right"))
            part = self.shards[index][at - int(self.ends[index]) :][: len(row) - filled]  # counted from the shard's end
            row[filled : filled + len(part)] = part
            filled += len(part)
