"""Training batches from token shards: deterministic, resumable to the token, the same order on any number of ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from paramgolf.data.orders import Place, dealt, make_order
from paramgolf.data.shards import check_ids
from paramgolf.errors import GolfError

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


class Loader:
    """Batches of next-token pairs for one rank.

    A row is x = tokens[i : i + T], y = tokens[i + 1 : i + T + 1]. The global batch has batch_tokens / T rows; rank r
    gets its share of them and all ranks together always see the same rows, whatever the world size. Which rows, and
    what the seed decides, is the order's (see orders.py). Global row g goes to rank g % world; of the order
    "sequential" (the reference's) span s does, so with 8 / world accumulation steps each rank reads what the
    reference's rank reads. Rows of the order "packed" are longer than `seq_len`.
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
        order: str = "shuffled",
        vocab_size: int | None = None,
    ) -> None:
        """shards: uint16 arrays or memory maps. vocab_size: if given, every id of every batch is checked."""
        self._stream = TokenStream(shards)
        if self._stream.total < 2:
            raise GolfError(f"the training data has {self._stream.total} tokens; at least 2 are needed, give more text")
        self.rank, self.world, self.seed, self.order = rank, world, seed, order
        self._shards, self._vocab_size = list(shards), vocab_size
        self._place = Place(*_checked_shape(seq_len, batch_tokens))
        self._order = make_order(order, self._shards, seq_len, batch_tokens, seed)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: deque[tuple[Future[tuple[torch.Tensor, torch.Tensor]], Place]] = deque()

    @property
    def seq_len(self) -> int:
        return self._place.seq_len

    @property
    def batch_tokens(self) -> int:
        """Tokens of one global batch."""
        return self._place.batch_tokens

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, y), int64 (rows of this rank, T) on the CPU; a rank gets no rows when there are fewer rows than ranks."""
        while len(self._ahead) < _AHEAD:
            place = self._ahead[-1][1] if self._ahead else self._place
            starts, following = self._plan(place)
            length = self._order.row_tokens
            self._ahead.append((self._thread.submit(self._load, starts, length), following))
        future, following = self._ahead.popleft()
        batch = future.result()
        self._place = following
        return batch

    def set_shape(self, seq_len: int, batch_tokens: int) -> None:
        """Other sizes from the next batch on."""
        before, shape = self._place, _checked_shape(seq_len, batch_tokens)
        place = replace(before, seq_len=shape[0], batch_tokens=shape[1])
        if place != before:
            self._order = make_order(self.order, self._shards, *shape, self.seed)
            place = self._order.moved(place, before)
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
        place = Place(**{key: int(state.get(key, 0)) for key in asdict(self._place)})
        self._order = make_order(self.order, self._shards, place.seq_len, place.batch_tokens, self.seed)
        self._move(place)

    def close(self) -> None:
        """Stop the prefetching thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _move(self, place: Place) -> None:
        for future, _ in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._place = place

    def _plan(self, place: Place) -> tuple[np.ndarray, Place]:
        """Start positions of this rank's rows (int64) and the place after this batch."""
        starts, following = self._order.take(place)
        mine = starts[dealt(self._order, len(starts), self.rank, self.world)]
        return mine, replace(following, tokens=place.tokens + place.batch_tokens)

    def _load(self, starts: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
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
