"""SmearGate v2: a learned share of the previous token's embedding is added to each token's, gated by a few channels.

Origin: #1667; the share is zero where a document begins (#1851: a document must not see the one before it).
Cost: window + 1 parameters. No change at the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from paramgolf.errors import GolfError
from paramgolf.model.parts.base import Flow, Part
from paramgolf.recipe.sections import STRICT, ModelSection


@dataclass(frozen=True, kw_only=True)
class SmearGate2Config:
    """Settings of `model.parts.smear_gate2`."""

    __pydantic_config__ = STRICT
    window: Annotated[int, Field(ge=1)] = 12  # channels the gate reads
    bos_id: Annotated[int, Field(ge=-1)] = 1  # receives nothing from before it; -1 = no such token


class SmearGate2(Part):
    """x_t <- x_t + strength * sigmoid(gate . x_t[:window]) * x_{t-1}, before the first RMS norm; x_{-1} = 0."""

    attribute = "smear2"
    Config = SmearGate2Config
    excludes = ("smear_gate",)

    def __init__(self, config: SmearGate2Config, section: ModelSection, vocab_size: int) -> None:
        super().__init__(config, section, vocab_size)
        width = section.embed_dim or section.dim
        if config.window > width:
            raise GolfError(
                f"model.parts.smear_gate2.window={config.window} is wider than the embedding of {width}; lower it"
            )
        self.bos_id = config.bos_id
        self.gate = nn.Parameter(torch.zeros(config.window))
        self.strength = nn.Parameter(torch.zeros(()))

    def on_embedding(self, x_BTD: Tensor, flow: Flow) -> Tensor:
        z_BT = x_BTD[..., : self.gate.shape[0]] @ self.gate.to(x_BTD.dtype)
        share_BT = self.strength.to(x_BTD.dtype) * torch.sigmoid(z_BT) * (flow.ids_BT != self.bos_id)
        return x_BTD + share_BT.unsqueeze(-1) * flow.previous("smear2", x_BTD, 0.0)
