"""BigramHash: the pair (previous token, token) picks a row of a small table, which is projected and added to the
token embedding. It gives the first layers the bigram statistics for free. Origin: PR 137 (v2 of the hash).

Cost: buckets x dim + dim x model.dim parameters and 1 scalar; no measurable time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from paramgolf.model.layers import Linear
from paramgolf.model.parts.base import Flow, Part
from paramgolf.recipe.sections import STRICT, ModelSection

# Multipliers of the hash; they are part of what a trained table means.
CURRENT, PREVIOUS = 36313, 27191


@dataclass(frozen=True, kw_only=True)
class BigramHashConfig:
    """Settings of `model.parts.bigram_hash`."""

    __pydantic_config__ = STRICT
    buckets: Annotated[int, Field(ge=2)] = 4096  # rows; the last is kept for the first position
    dim: Annotated[int, Field(ge=1)] = 128  # columns, projected to the width of the token embedding
    scale: float = 0.05  # initial value of the learned factor


class BigramHash(Part):
    """x + scale * proj(table[hash(previous, current)]), before the first RMS norm."""

    attribute = "bigram"
    Config = BigramHashConfig

    def __init__(self, config: BigramHashConfig, section: ModelSection, vocab_size: int) -> None:
        super().__init__(config, section, vocab_size)
        self.buckets = config.buckets
        self.embed = nn.Embedding(config.buckets, config.dim, _weight=torch.zeros(config.buckets, config.dim))
        self.proj = Linear(config.dim, section.embed_dim or section.dim)
        self.scale = nn.Parameter(torch.tensor(config.scale))

    def bucket(self, ids_BT: Tensor, previous_BT: Tensor) -> Tensor:
        """Row of the table for each position; `previous_BT` is -1 where there is none."""
        mixed = (CURRENT * ids_BT) ^ (PREVIOUS * previous_BT)
        return torch.where(previous_BT < 0, self.buckets - 1, mixed % (self.buckets - 1))

    def on_embedding(self, x_BTD: Tensor, flow: Flow) -> Tensor:
        row_BT = self.bucket(flow.ids_BT, flow.previous("bigram", flow.ids_BT, -1))
        pair_BTW = F.embedding(row_BT, self.embed.weight).to(x_BTD.dtype)
        return x_BTD + self.scale.to(x_BTD.dtype) * self.proj(pair_BTW)
