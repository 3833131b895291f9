"""Rounding to nearest: the grid's own rounding, no look at the data."""

from __future__ import annotations

from torch import Tensor

from paramgolf.quant.grid import Grid


def quantize(weight: Tensor, grid: Grid, hessian: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """int8 codes of `weight`'s shape and the scale, exactly as `grid.quantize`. `hessian` is not used."""
    return grid.quantize(weight)
