"""What a model part may do, and where. A part is one file here and one line in model/registry.py.

The GPT calls its parts, in the order of the recipe's `model.parts` table, at these places:

    on_embedding  on the token embedding, before the first RMS norm
    on_stream     on the normalised embedding; its result is both the stream and the fixed x0 of the residual mix
    for_layer     once for each layer at construction: may return a `LayerPart` that lives in that layer's attention
                  (state name `blocks.<i>.attn.<attribute>`) and acts on its values and on its output

What must look at earlier tokens goes through `Flow.previous`, which also works while decoding with a cache. A tensor
that a layer part needs (an embedding of the ids, document numbers) is put into `Flow.extras`; every layer receives it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from paramgolf.errors import GolfError
from paramgolf.model.cache import KVCache
from paramgolf.model.documents import BOS_ID
from paramgolf.recipe.sections import ModelSection
from paramgolf.registry import close_match


@dataclass
class Flow:
    """One forward pass as the parts see it."""

    ids_BT: Tensor
    cache: KVCache | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    documents: bool = False  # nothing may look back over the beginning of a document

    def previous(self, key: str, t_BT: Tensor, fill: float) -> Tensor:
        """`t_BT` (B, T, ...) moved one position later: position t holds what was at t - 1, and the first holds `fill`
        or, with a cache, the last position of the pass before. With `documents` a begin-of-document token's holds
        `fill` too. `key` names the stream in the cache."""
        first = torch.full_like(t_BT[:, :1], fill)
        if self.cache is not None:
            first = self.cache.last.get(key, first)
            self.cache.last[key] = t_BT[:, -1:]
        moved = torch.cat((first, t_BT[:, :-1]), dim=1)
        if not self.documents:
            return moved
        begins = (self.ids_BT == BOS_ID).view(*self.ids_BT.shape, *[1] * (t_BT.ndim - 2))
        return moved.masked_fill(begins, fill)


class LayerPart(nn.Module):
    """A part's share of one layer; both methods default to changing nothing."""

    def value(self, v_BTGK: Tensor, n_BTD: Tensor, extras: dict[str, Tensor]) -> Tensor:
        """The values before attention; `n_BTD` is the normalised input of the layer."""
        return v_BTGK

    def output(
        self, y_BTHK: Tensor, v_BTGK: Tensor, q_BTHK: Tensor, n_BTD: Tensor, extras: dict[str, Tensor]
    ) -> Tensor:
        """The output of every head before the output map; `q_BTHK` is the query map before norm and rotation."""
        return y_BTHK


class Part(nn.Module):
    """Base of all parts: `attribute` is its name in the model (and in the state dict), `Config` its settings."""

    attribute: ClassVar[str]
    Config: ClassVar[type]
    excludes: ClassVar[tuple[str, ...]] = ()  # parts of a recipe it makes no sense with

    def __init__(self, config: Any, section: ModelSection, vocab_size: int) -> None:
        super().__init__()

    def on_embedding(self, x_BTD: Tensor, flow: Flow) -> Tensor:
        return x_BTD

    def on_stream(self, x_BTD: Tensor, flow: Flow) -> Tensor:
        return x_BTD

    def for_layer(self, index: int) -> LayerPart | None:
        return None


def read_config(config_class: type, table: dict[str, Any], where: str) -> Any:
    """The part's frozen Config from a recipe table; GolfError on an unknown key or a bad value."""
    known = [f.name for f in fields(config_class)]
    for key in table:
        if key not in known:
            raise GolfError(f"unknown key '{where}.{key}'{close_match(key, known)}")
    try:
        return TypeAdapter(config_class).validate_python(table)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(step) for step in first["loc"])
        raise GolfError(f"{where}.{key} = {first['input']!r}: {first['msg']}; change it in the recipe") from error
