"""SmearGate v1: every channel of the normalised embedding is mixed with the previous position's by a learned gate, so
that a token can see its predecessor before any attention. Origin: PR 137. Cost: dim parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paramgolf.model.parts.base import Flow, Part
from paramgolf.recipe.sections import STRICT, ModelSection


@dataclass(frozen=True, kw_only=True)
class SmearGateConfig:
    """Settings of `model.parts.smear_gate`."""

    __pydantic_config__ = STRICT
    init: float = 0.0  # of the gate before the sigmoid: 0 mixes half and half


class SmearGate(Part):
    """x_t <- (1 - g) x_t + g x_{t-1}, g = sigmoid(gate) a channel, x_{-1} = 0; after the first RMS norm."""

    attribute = "smear"
    Config = SmearGateConfig

    def __init__(self, config: SmearGateConfig, section: ModelSection, vocab_size: int) -> None:
        super().__init__(config, section, vocab_size)
        self.gate = nn.Parameter(torch.full((section.dim,), config.init))

    def on_stream(self, x_BTD: Tensor, flow: Flow) -> Tensor:
        g_D = torch.sigmoid(self.gate).to(x_BTD.dtype)
        return (1 - g_D) * x_BTD + g_D * flow.previous("smear", x_BTD, 0.0)
