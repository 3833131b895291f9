"""A matrix to quantise, and rules for it, shared by the tests."""

from __future__ import annotations

import torch

from paramgolf.recipe.sections import GridSection, QuantSection, RuleSection

INT6 = GridSection(bits=6, clip="sdclip", clip_value=12.85)


def layer(rows: int = 40, columns: int = 96, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Heavy-tailed weights, and the second moments of inputs of very different size."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(500, columns, generator=draw) * torch.rand(columns, generator=draw) ** 3
    weight = torch.randn(rows, columns, generator=draw)
    return weight * weight.abs() * 0.05, x.t() @ x / len(x)


def quant(**changes: object) -> QuantSection:
    grids = {"int6": INT6, "int4": GridSection(bits=4, clip="sdclip", clip_value=3.0)}
    return QuantSection(grids=grids, rules=(RuleSection(store="int6"),), **changes)  # type: ignore[arg-type]
