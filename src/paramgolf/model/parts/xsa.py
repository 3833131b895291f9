"""Exclusive self-attention: the output of every head loses its component along the token's own value, so that
attention carries only what the token does not already have. Origin: #198; records use the last 3 layers, later all.

Cost: no parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from paramgolf.errors import GolfError
from paramgolf.model.parts.base import LayerPart, Part
from paramgolf.recipe.sections import STRICT, ModelSection

NORM_FLOOR = 1e-12


@dataclass(frozen=True, kw_only=True)
class XSAConfig:
    """Settings of `model.parts.xsa`."""

    __pydantic_config__ = STRICT
    last_layers: Annotated[int, Field(ge=0)] = 0  # the last so many layers; 0 = all


class XSALayer(LayerPart):
    """One layer's heads without what lies along the token's own value."""

    def output(
        self, y_BTHK: Tensor, v_BTGK: Tensor, q_BTHK: Tensor, n_BTD: Tensor, extras: dict[str, Tensor]
    ) -> Tensor:
        """y - (y . u) u with u the unit vector of the key/value head's value; a zero value changes nothing."""
        unit = F.normalize(v_BTGK.float(), dim=-1, eps=NORM_FLOOR).to(y_BTHK.dtype).unsqueeze(3)
        grouped = y_BTHK.unflatten(2, (v_BTGK.shape[2], -1))
        return (grouped - (grouped * unit).sum(-1, keepdim=True) * unit).flatten(2, 3)


class XSA(Part):
    """Exclusive attention in the last layers, or in all."""

    attribute = "xsa"
    Config = XSAConfig

    def __init__(self, config: XSAConfig, section: ModelSection, vocab_size: int) -> None:
        super().__init__(config, section, vocab_size)
        if config.last_layers > section.num_layers:
            raise GolfError(
                f"model.parts.xsa.last_layers={config.last_layers} of model.num_layers={section.num_layers}; "
                "set it to 0 for all layers"
            )
        self.first = section.num_layers - config.last_layers if config.last_layers else 0

    def for_layer(self, index: int) -> LayerPart | None:
        return XSALayer() if index >= self.first else None
