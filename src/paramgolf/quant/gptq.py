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
RETRIES = 6  # each with ten times the damping, for a Hessian that rounding has made indefinite


def quantize(weight: Tensor, grid: Grid, hessian: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """int8 codes of `weight` (R, C) and its scale (R,), minimising tr(E H E^T) greedily for the error E.

    Args:
        hessian: (C, C), any positive multiple of the sum of x x^T over the layer's inputs. Without one, and for tensors
            that are not matrices, the weights are rounded to nearest.

    Raises GolfError for weights or a Hessian that are not finite, and for a Hessian of another shape.
    """
    if hessian is None or weight.ndim != 2 or not weight.numel():
        return grid.quantize(weight)
    rows, columns = weight.shape
    if not bool(torch.isfinite(weight).all()):
        raise GolfError(f"weights of shape {(rows, columns)} hold NaN or infinity: they cannot be quantised")
    scale_R1 = grid.row_scale(weight.float(), column_importance(weight, hessian))
    order, upper_CC, dead_C = _factor(hessian.to(weight.device))
    work_RC = weight.float().masked_fill(dead_C, 0.0)[:, order]
    with _one_thread(weight.device):
        codes_RC = _round_columns(work_RC, scale_R1, upper_CC.float(), grid)
    restored = torch.empty_like(codes_RC)
    restored[:, order] = codes_RC
    return restored, scale_R1.squeeze(-1).to(grid.scale_dtype)


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
    for attempt in range(RETRIES):
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


def _round_columns(work_RC: Tensor, scale_R1: Tensor, upper_CC: Tensor, grid: Grid) -> Tensor:
    """int8 codes (R, C) of columns in their order; `work_RC` is used up."""
    scale = scale_R1.squeeze(-1)
    divisor = torch.where(scale == 0, torch.inf, scale)  # a scale that underflowed: all codes are 0
    rows, columns = work_RC.shape
    codes = torch.empty((rows, columns), dtype=torch.int8, device=work_RC.device)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        block = work_RC[:, start:end].t().contiguous()  # (columns of the block, R): a column lies in one piece
        factor = upper_CC[start:end, start:end]
        errors = torch.empty_like(block)
        rounded = torch.empty_like(block)
        for j in range(end - start):
            torch.round(block[j] / divisor, out=rounded[j]).clamp_(grid.qmin, grid.qmax)
            errors[j] = (block[j] - rounded[j] * scale) / factor[j, j]
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
