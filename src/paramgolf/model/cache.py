"""Memory of what a model has read, so that the next token costs one position instead of the whole context."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from paramgolf.errors import GolfError
from paramgolf.model.documents import continued


@dataclass
class LayerCache:
    """Keys and values of one executed layer: buffers (B, G, max_len, K), filled up to `length`. A head's positions lie
    side by side, which halves the time of attention to them."""

    max_len: int
    length: int = 0
    k: Tensor | None = None
    v: Tensor | None = None

    def extend(self, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Append T positions; all keys and values so far, as views."""
        if self.k is None or self.v is None:
            batch, _, heads, width = k_BTGK.shape
            self.k = k_BTGK.new_empty(batch, heads, self.max_len, width)
            self.v = torch.empty_like(self.k)
        end = self.length + k_BTGK.shape[1]
        self.k[:, :, self.length : end] = k_BTGK.transpose(1, 2)
        self.v[:, :, self.length : end] = v_BTGK.transpose(1, 2)
        self.length = end
        return self.k[:, :, :end].transpose(1, 2), self.v[:, :, :end].transpose(1, 2)


@dataclass
class KVCache:
    """State of incremental decoding for `GPT.logits(ids, cache)`: at most `max_len` positions of one fixed batch.

    Not differentiable. When it is full the caller decides what to forget: `reset()` and read the part to keep again.
    """

    max_len: int
    length: int = 0
    layers: dict[int, LayerCache] = field(default_factory=dict)  # by position in the executed order
    last: dict[str, Tensor] = field(default_factory=dict)  # the newest position of streams that parts look back on
    segments: Tensor | None = None  # (B, max_len) int32, filled up to `length`: the document of each position

    def layer(self, position: int) -> LayerCache:
        return self.layers.setdefault(position, LayerCache(self.max_len))

    def extend_segments(self, ids_BT: Tensor) -> Tensor:
        """Number the documents of T more positions; (B, S) numbers of all positions, the new ones included."""
        if self.segments is None:
            self.segments = torch.zeros(len(ids_BT), self.max_len, dtype=torch.int32, device=ids_BT.device)
        end = self.length + ids_BT.shape[1]
        last = self.segments[:, self.length - 1] if self.length else None
        self.segments[:, self.length : end] = continued(ids_BT, last)
        return self.segments[:, :end]

    def room_for(self, tokens: int) -> None:
        """GolfError unless `tokens` more fit."""
        if self.length + tokens > self.max_len:
            raise GolfError(
                f"the cache holds {self.length} of {self.max_len} positions, {tokens} more do not fit; reset it first"
            )

    def reset(self) -> None:
        """Forget everything; the buffers are reused."""
        self.length = 0
        self.last.clear()
        for layer in self.layers.values():
            layer.length = 0
