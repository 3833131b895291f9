"""Clip search over row percentiles, one for the whole matrix (the "GPTQ-lite" of the 1.1228 record)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from paramgolf.quant.grid import Grid

PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)


def quantize(weight: Tensor, grid: Grid, hessian: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scale under the percentile of |row| with the least squared error of the matrix (first of equals).

    The grid's own clip is replaced, everything else of it holds. The percentile only sets the scale: where that is
    floored, larger values are not cut, as in #374. `hessian` is not used.
    """
    best: tuple[Tensor, Tensor] | None = None
    least = torch.inf
    for level in PERCENTILES:
        candidate = Grid(replace(grid.section, clip="quantile", clip_value=level))
        codes, scale = candidate.quantize(weight, cut=False)
        error = float((candidate.dequantize(codes, scale) - weight).square().mean())
        if best is None or error < least:
            best, least = (codes, scale), error
    assert best is not None
    return best
