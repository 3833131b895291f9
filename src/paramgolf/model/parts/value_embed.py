"""Value embedding: some layers add a second, narrower embedding of the token itself to their values, so that what
attention moves does not have to survive the layers below. Origin: the lineage of #374.

Cost: vocabulary x dim + dim x width of the values, and one scalar a layer. No change at the start (the table is zero).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from paramgolf.errors import GolfError
from paramgolf.model.layers import Linear
from paramgolf.model.parts.base import Flow, LayerPart, Part
from paramgolf.recipe.sections import STRICT, ModelSection


@dataclass(frozen=True, kw_only=True)
class ValueEmbedConfig:
    """Settings of `model.parts.value_embed`."""

    __pydantic_config__ = STRICT
    dim: Annotated[int, Field(ge=1)] = 128  # columns of the table
    layers: tuple[int, ...] = (-2, -1)  # that use it; negative ones count from the end
    scale: float = 0.1  # initial value of the learned factor


class ValueEmbedLayer(LayerPart):
    """One layer's factor on the embedding that its values get."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def value(self, v_BTGK: Tensor, n_BTD: Tensor, extras: dict[str, Tensor]) -> Tensor:
        return v_BTGK + self.scale.to(v_BTGK.dtype) * extras["value_embed"].view(v_BTGK.shape)


class ValueEmbed(Part):
    """v <- v + layer scale * scale * proj(table[id]) in the chosen layers."""

    attribute = "value_embed"
    Config = ValueEmbedConfig

    def __init__(self, config: ValueEmbedConfig, section: ModelSection, vocab_size: int) -> None:
        super().__init__(config, section, vocab_size)
        wrong = [i for i in config.layers if not -section.num_layers <= i < section.num_layers]
        if wrong or not config.layers:
            what = f"names layer {wrong[0]}" if wrong else "names no layer"
            raise GolfError(f"model.parts.value_embed.layers {what}; model.num_layers={section.num_layers}: change it")
        self.chosen = {i % section.num_layers for i in config.layers}
        self.embed = nn.Embedding(vocab_size, config.dim, _weight=torch.zeros(vocab_size, config.dim))
        self.proj = Linear(config.dim, section.dim // section.num_heads * section.num_kv_heads)
        self.scale = nn.Parameter(torch.tensor(config.scale))

    def on_embedding(self, x_BTD: Tensor, flow: Flow) -> Tensor:
        rows_BTW = F.embedding(flow.ids_BT, self.embed.weight).to(x_BTD.dtype)
        flow.extras["value_embed"] = self.scale.to(x_BTD.dtype) * self.proj(rows_BTW)
        return x_BTD

    def for_layer(self, index: int) -> LayerPart | None:
        return ValueEmbedLayer() if index in self.chosen else None
