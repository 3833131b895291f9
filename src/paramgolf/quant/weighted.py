"""Rounding to nearest whose clips are chosen by the error of the layer's output instead of that of the weights.

The columns' second moments weigh the errors of clip = "search" and "mse" and, with `row_weight`, the clips of "sdclip".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from paramgolf.errors import GolfError
from paramgolf.quant.grid import Grid

EMBEDDING, HEAD = "tok_emb.weight", "lm_head.weight"


def quantize(weight: Tensor, grid: Grid, hessian: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `registry.Quantizer`; only the diagonal of `hessian` is used."""
    if hessian is None or weight.ndim != 2 or not weight.numel():
        return grid.quantize(weight)
    return grid.quantize(weight, column_importance(weight, hessian))


def column_importance(weight: Tensor, hessian: Tensor) -> Tensor:
    """(C,) float32: the second moment of each input, on the weight's device. GolfError unless it fits the weights."""
    columns = weight.shape[1]
    if tuple(hessian.shape) != (columns, columns):
        shape = tuple(hessian.shape)
        raise GolfError(
            f"a Hessian of shape {shape} does not fit weights of shape {tuple(weight.shape)}; calibrate again"
        )
    diagonal = hessian.diagonal().to(weight.device).float()
    if not bool(torch.isfinite(diagonal).all()):
        raise GolfError("the Hessian holds NaN or infinity: the activations overflowed; lower the learning rates")
    return diagonal.clamp_min(0)


def with_input_share(
    hessians: Mapping[str, Tensor], state: Mapping[str, Tensor], share: float
) -> Mapping[str, Tensor]:  # fmt: skip
    """`hessians` with the other use of a tied embedding in it: `share` x mean diagonal on the diagonal.

    As output its rows are read along what the head reads; as input every direction counts alike. Without a share GPTQ
    puts all error where the head does not look, and the first layer meets it.
    """
    hessian = hessians.get(EMBEDDING)
    if not share or hessian is None or HEAD in state:
        return hessians
    more = share * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return {**hessians, EMBEDDING: hessian + more}
