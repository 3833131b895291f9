"""Training batches from token shards: deterministic, resumable to the token, the same order on any number of ranks."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from paramgolf.data.shards import check_ids
from paramgolf.errors import GolfError

REFERENCE_SPANS = 8  # the reference splits every step into world * accumulation = 8 spans
_AHEAD = 2  # batches prepared in advance


class TokenStream:
    """Several shards seen as one endless, wrapping sequence of tokens."""

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self._shards = list(shards)
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        self.total = int(self._ends[-1]) if self._shards else 0

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count - 1, positions taken modulo the total; uint16 (count,)."""
        out = np.empty(count, dtype=np.uint16)
        filled = 0
        while filled < count:
            at = (start + filled) % self.total
            index = int(np.searchsorted(self._ends, at, side="right"))
            shard = self._shards[index]
            offset = at - (int(self._ends[index]) - len(shard))
            part = shard[offset : offset + count - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
        return out


@dataclass(frozen=True)
class _Place:
    """Where the next batch begins. position: tokens consumed (sequential), windows used of this epoch (shuffled)."""

    seq_len: int
    batch_tokens: int
    epoch: int = 0
    position: int = 0
    tokens: int = 0  # training tokens handed out so far, over all ranks


class Loader:
    """Batches of next-token pairs for one rank.

    A row is x = tokens[i : i + T], y = tokens[i + 1 : i + T + 1]. The global batch has batch_tokens / T rows; rank r
    gets its share of them and all ranks together always see the same rows, whatever the world size.

    order "shuffled": the shards are one stream cut into windows of T with a random phase, visited in a random
    permutation; both are new in every epoch and come from (seed, epoch). Global row g goes to rank g % world.
    A text shorter than a window wraps around. Another `seq_len` starts a new epoch.

    order "sequential" is the reference's rule (openai/parameter-golf `DistributedTokenLoader`): the endless stream
    is cut into spans of batch_tokens / 8 + 1 tokens, 8 for a step; span s goes to rank s % world, so with 8 / world
    accumulation steps each rank reads what the reference's rank reads. It does not depend on the seed. Where
    batch_tokens / 8 is not a multiple of T the step has gcd(8, rows) spans.
    """

    def __init__(
        self,
        shards: Sequence[np.ndarray],
        *,
        seq_len: int,
        batch_tokens: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        order: Literal["shuffled", "sequential"] = "shuffled",
        vocab_size: int | None = None,
    ) -> None:
        """shards: uint16 arrays or memory maps. vocab_size: if given, every id of every batch is checked."""
        self._stream = TokenStream(shards)
        if self._stream.total < 2:
            raise GolfError(f"the training data has {self._stream.total} tokens; at least 2 are needed, give more text")
        if order not in ("shuffled", "sequential"):
            raise GolfError(f"unknown data.order '{order}'; known: shuffled, sequential")
        self.rank, self.world, self.seed, self.order = rank, world, seed, order
        self._vocab_size = vocab_size
        self._place = _Place(*_checked_shape(seq_len, batch_tokens))
        self._permutation: tuple[tuple[int, int], int, np.ndarray] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: deque[tuple[Future[tuple[torch.Tensor, torch.Tensor]], _Place]] = deque()

    @property
    def seq_len(self) -> int:
        return self._place.seq_len

    @property
    def batch_tokens(self) -> int:
        """Tokens of one global batch."""
        return self._place.batch_tokens

    @property
    def tokens_seen(self) -> int:
        """Training tokens handed out so far, over all ranks."""
        return self._place.tokens

    @property
    def epoch(self) -> float:
        """Passes over the training tokens so far."""
        return self._place.tokens / self._stream.total

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, y), int64 (rows of this rank, T) on the CPU; a rank gets no rows when there are fewer rows than ranks."""
        while len(self._ahead) < _AHEAD:
            place = self._ahead[-1][1] if self._ahead else self._place
            starts, following = self._plan(place)
            self._ahead.append((self._thread.submit(self._load, starts, place), following))
        future, following = self._ahead.popleft()
        batch = future.result()
        self._place = following
        return batch

    def set_shape(self, seq_len: int, batch_tokens: int) -> None:
        """Other sizes from the next batch on."""
        place = replace(self._place, batch_tokens=_checked_shape(seq_len, batch_tokens)[1])
        if seq_len != place.seq_len:
            place = replace(place, seq_len=seq_len)
            if self.order == "shuffled" and place.position:
                place = replace(place, epoch=place.epoch + 1, position=0)
        self._move(place)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; with them any rank of any world continues after the last batch handed out."""
        return {"order": self.order, "seed": self.seed, "total": self._stream.total, **asdict(self._place)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`. GolfError if it belongs to other data, another order or another seed."""
        own = self.state_dict()
        for key, what in (("order", "data.order"), ("seed", "train.seed"), ("total", "the number of training tokens")):
            if state.get(key) != own[key]:
                raise GolfError(f"cannot resume: {what} was {state.get(key)}, now {own[key]}; start a new run")
        self._move(_Place(**{key: int(state[key]) for key in asdict(self._place)}))

    def close(self) -> None:
        """Stop the prefetching thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _move(self, place: _Place) -> None:
        for future, _ in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._place = place

    def _plan(self, place: _Place) -> tuple[np.ndarray, _Place]:
        """Start positions of this rank's rows (int64) and the place after this batch."""
        rows = place.batch_tokens // place.seq_len
        after = replace(place, tokens=place.tokens + place.batch_tokens)
        if self.order == "sequential":
            spans = math.gcd(REFERENCE_SPANS, rows)
            span_rows = rows // spans
            mine = np.arange(self.rank, spans, self.world, dtype=np.int64)
            first = place.position + mine * (span_rows * place.seq_len + 1)
            starts = (first[:, None] + np.arange(span_rows, dtype=np.int64) * place.seq_len).reshape(-1)
            used = place.batch_tokens + spans
            return starts, replace(after, position=(place.position + used) % self._stream.total)
        taken: list[np.ndarray] = []
        epoch, position = place.epoch, place.position
        while rows:
            phase, order = self._epoch_order(place.seq_len, epoch)
            part = order[position : position + rows]
            taken.append(phase + part.astype(np.int64) * place.seq_len)
            rows -= len(part)
            position += len(part)
            if position == len(order):
                epoch, position = epoch + 1, 0
        return np.concatenate(taken)[self.rank :: self.world], replace(after, epoch=epoch, position=position)

    def _epoch_order(self, seq_len: int, epoch: int) -> tuple[int, np.ndarray]:
        """(phase, permutation of the windows) of one epoch; the last one is kept."""
        if self._permutation is None or self._permutation[0] != (seq_len, epoch):
            total = self._stream.total
            generator = np.random.default_rng([self.seed, epoch, 0x676F6C66])
            phase = int(generator.integers(min(seq_len, total)))
            windows = max((total - 1 - phase) // seq_len, 1)
            self._permutation = ((seq_len, epoch), phase, generator.permutation(np.arange(windows, dtype=np.int32)))
        return self._permutation[1], self._permutation[2]

    def _load(self, starts: np.ndarray, place: _Place) -> tuple[torch.Tensor, torch.Tensor]:
        length = place.seq_len
        rows = np.empty((len(starts), length + 1), dtype=np.int64)
        for row, start in zip(rows, starts, strict=True):
            row[:] = self._stream.read(int(start), length + 1)
        if self._vocab_size is not None:
            check_ids(rows.reshape(-1), self._vocab_size, "training data")
        tokens = torch.from_numpy(rows)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _checked_shape(seq_len: int, batch_tokens: int) -> tuple[int, int]:
    if seq_len < 1 or batch_tokens < seq_len or batch_tokens % seq_len:
        raise GolfError(
            f"train.batch_tokens = {batch_tokens} must be a positive multiple of train.seq_len = {seq_len};"
            f" try {max(batch_tokens // max(seq_len, 1), 1) * max(seq_len, 1)}"
        )
    return seq_len, batch_tokens
