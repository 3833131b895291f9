"""One gate a query head on the output of attention, from a few channels of the layer's input.

    y_h <- factor * sigmoid(scale * w_h . source[:window]) * y_h          w = 0 at the start

The published kinds: AttnOutGate (#1667) is factor 2, window 12 (no change at the start), from the normalised input or
from the raw queries; GatedAttn (#1736) is factor 1, window 0 (all channels); SparseAttnGate (#1787) is factor 1,
window 12, scale 0.5 to 1 (both halve the output at the start). Cost: heads x window parameters a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from paramgolf.errors import GolfError
from paramgolf.model.parts.base import LayerPart, Part
from paramgolf.recipe.sections import STRICT, ModelSection


@dataclass(frozen=True, kw_only=True)
class AttnGateConfig:
    """Settings of `model.parts.attn_gate`."""

    __pydantic_config__ = STRICT
    factor: Annotated[float, Field(gt=0)] = 2.0  # 2 starts at no change, 1 at a half
    window: Annotated[int, Field(ge=0)] = 12  # channels the gate reads; 0 = all
    scale: Annotated[float, Field(gt=0)] = 1.0  # inside the sigmoid
    source: Literal["input", "query"] = "input"  # the layer's normalised input, or its query map before norm and heads


class AttnGateLayer(LayerPart):
    """The gates of one layer; weight (heads, window)."""

    def __init__(self, config: AttnGateConfig, heads: int, window: int) -> None:
        super().__init__()
        self.factor, self.scale, self.from_query = config.factor, config.scale, config.source == "query"
        self.weight = nn.Parameter(torch.zeros(heads, window))

    def output(
        self, y_BTHK: Tensor, v_BTGK: Tensor, q_BTHK: Tensor, n_BTD: Tensor, extras: dict[str, Tensor]
    ) -> Tensor:
        source = q_BTHK.flatten(2) if self.from_query else n_BTD
        z_BTH = F.linear(source[..., : self.weight.shape[1]], self.weight.to(source.dtype))
        return self.factor * torch.sigmoid(self.scale * z_BTH).unsqueeze(-1) * y_BTHK


class AttnGate(Part):
    """A gate for every head of every layer."""

    attribute = "attn_gate"
    Config = AttnGateConfig

    def __init__(self, config: AttnGateConfig, section: ModelSection, vocab_size: int) -> None:
        super().__init__(config, section, vocab_size)
        if config.window > section.dim:
            raise GolfError(
                f"model.parts.attn_gate.window={config.window} is wider than model.dim={section.dim}; lower it"
            )
        self.config, self.heads, self.window = config, section.num_heads, config.window or section.dim

    def for_layer(self, index: int) -> LayerPart | None:
        return AttnGateLayer(self.config, self.heads, self.window)
