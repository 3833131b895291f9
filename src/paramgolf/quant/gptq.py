"""Full-Hessian GPTQ: columns are rounded one after the other, and each error is made up for by the later columns.

Frantar et al. 2022 (arXiv 2210.17323) with the settings of the records: row scales fixed beforehand from the original
rows, columns by decreasing diagonal of H ("act-order"), damping 0.01 x mean diagonal, blocks of 128 columns. Inputs
that were always zero have their weights set to zero. Runs on any device; the factor is made in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from paramgolf.errors import GolfError
from paramgolf.quant.grid import Grid
from paramgolf.quant.weighted import column_importance

DAMPING = 0.01  # of the mean diagonal
BLOCK = 128  # columns whose errors are spread at once
ATTEMPTS = 6  # each with ten times the damping, for a Hessian that rounding has made indefinite


def quantize(weight: Tensor, grid: Grid, hessian: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """int8 codes of `weight` (R, C) and its scale (R,), minimising tr(E H E^T) greedily for the error E.

    Args:
        hessian: (C, C), any positive multiple of the sum of x x^T over the layer's inputs. Without one, and for tensors
            that are not matrices, the weights are rounded to nearest.

    Raises GolfError for weights or a Hessian that are not finite, and for a Hessian of another shape.
    """
    if hessian is None or weight.ndim != 2 or not weight.numel():
        return grid.quantize(weight)
    scale_R1 = grid.row_scale(weight.float(), column_importance(weight, hessian))
    codes = _quantized(weight, hessian, _Columns(scale_R1, grid), None, torch.zeros(weight.shape[1], dtype=torch.bool))
    return codes, scale_R1.squeeze(-1).to(grid.scale_dtype)


def quantize_salient(
    weight: Tensor, grid: Grid, hessian: Tensor, columns: slice, fine: Grid
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """As `quantize`, with some columns on a grid of their own: (codes, scale) of both; in the first they are zero.

    The scales of either grid are those it gives the whole row. Rounding errors are made up for by all later columns.
    """
    inside = torch.zeros(weight.shape[1], dtype=torch.bool)
    inside[columns] = True
    importance = column_importance(weight, hessian)
    scale_R1 = grid.row_scale(weight.float(), importance)
    fine_R1 = fine.row_scale(weight.float(), importance)
    codes = _quantized(weight, hessian, _Columns(scale_R1, grid), _Columns(fine_R1, fine), inside)
    salient = codes[:, columns].clone()
    codes[:, columns] = 0
    scales = scale_R1.squeeze(-1).to(grid.scale_dtype), fine_R1.squeeze(-1).to(fine.scale_dtype)
    return (codes, scales[0]), (salient, scales[1])


class _Columns:
    """How the columns of one kind are rounded."""

    def __init__(self, scale_R1: Tensor, grid: Grid) -> None:
        self.scale = scale_R1.squeeze(-1)
        self.divisor = torch.where(self.scale == 0, torch.inf, self.scale)  # an underflowed scale: all codes are 0
        self.low, self.high = grid.qmin, grid.qmax


def _quantized(weight: Tensor, hessian: Tensor, kind: _Columns, other: _Columns | None, inside: Tensor) -> Tensor:
    """int8 codes (R, C); the columns marked `inside` (C,) are of the `other` kind."""
    if not bool(torch.isfinite(weight).all()):
        raise GolfError(f"weights of shape {tuple(weight.shape)} hold NaN or infinity: they cannot be quantised")
    order, upper_CC, dead_C = _factor(hessian.to(weight.device))
    work_RC = weight.float().masked_fill(dead_C, 0.0)[:, order]
    kinds = [other if other is not None and chosen else kind for chosen in inside[order.cpu()].tolist()]
    with _one_thread(weight.device):
        codes_RC = _round_columns(work_RC, kinds, upper_CC.float())
    restored = torch.empty_like(codes_RC)
    restored[:, order] = codes_RC
    return restored


def _factor(hessian_CC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(column order, float64 upper Cholesky factor of H^-1 in that order, which columns are dead)."""
    h_CC = hessian_CC.double()
    if not bool(torch.isfinite(h_CC).all()):
        raise GolfError("the Hessian holds NaN or infinity: the activations overflowed; lower the learning rates")
    diagonal = h_CC.diagonal()
    dead = diagonal <= 0
    h_CC = h_CC.clone()
    h_CC.diagonal()[dead] = 1.0
    order = torch.argsort(h_CC.diagonal(), descending=True, stable=True)
    mean = float(h_CC.diagonal().mean())
    ordered = h_CC[order][:, order]
    identity = torch.eye(len(order), dtype=h_CC.dtype, device=h_CC.device)
    for attempt in range(ATTEMPTS):
        lower, failed = torch.linalg.cholesky_ex(ordered + DAMPING * 10.0**attempt * mean * identity)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return order, upper, dead
    raise GolfError("the Hessian is not positive semi-definite; calibrate on more text (quant.calibration_tokens)")


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Thousands of small operations: handing each to several CPU threads takes longer, far longer if it is busy."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _round_columns(work_RC: Tensor, kinds: list[_Columns], upper_CC: Tensor) -> Tensor:
    """int8 codes (R, C) of columns in their order, each of its kind; `work_RC` is used up."""
    rows, columns = work_RC.shape
    codes = torch.empty((rows, columns), dtype=torch.int8, device=work_RC.device)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        block = work_RC[:, start:end].t().contiguous()  # (columns of the block, R): a column lies in one piece
        factor = upper_CC[start:end, start:end]
        errors = torch.empty_like(block)
        rounded = torch.empty_like(block)
        for j in range(end - start):
            kind = kinds[start + j]
            torch.round(block[j] / kind.divisor, out=rounded[j]).clamp_(kind.low, kind.high)
            errors[j] = (block[j] - rounded[j] * kind.scale) / factor[j, j]
            block[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1.0)
        codes[:, start:end] = rounded.t().to(torch.int8)
        work_RC[:, end:].addmm_(errors.t(), upper_CC[start:end, end:], alpha=-1.0)
    return codes


def weighted_error(weight: Tensor, restored: Tensor, hessian: Tensor | None) -> float:
    """tr(E H E^T) with E = weight - restored: the squared error of the layer's output, summed over its channels.

    Without a Hessian (or for a tensor that is no matrix), the squared error of the weights.
    """
    error = weight.float() - restored.float()
    if hessian is None or error.ndim != 2:
        return float(error.square().sum())
    return float(((error @ hessian.to(error)) * error).sum())
