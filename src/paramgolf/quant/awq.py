"""AWQ-lite: the columns that matter most, over all matrices, keep eight bits inside GPTQ (#1908, #1945).

A column's saliency is the root mean square of its input times its mean |w|. Of all groups of neighbouring columns in
matrices of fewer bits the one with the largest mean goes on a grid of eight: scales of its own, from the clip of the
whole row (k x standard deviation / 127). In the artifact it is a tensor more, `<name>.awq_<first column>`, and the
matrix holds zeros there, which cost nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor

from paramgolf.errors import GolfError
from paramgolf.pack.stored import StoredTensor, TensorSpec
from paramgolf.quant.gptq import quantize_salient
from paramgolf.quant.grid import Grid
from paramgolf.quant.weighted import column_importance

STORE, BITS = "awq", 8
_NAME = re.compile(r"^(?P<matrix>.+)\.awq_(?P<first>\d{1,6})$")


def most_salient(
    state: Mapping[str, Tensor], hessians: Mapping[str, Tensor], names: list[str], columns: int
) -> tuple[str, int] | None:  # fmt: skip
    """(matrix, first column) of the best group of `columns`; groups begin at multiples of it; None without any."""
    best: tuple[float, str, int] | None = None
    for name in names:
        weight = state[name].detach().float()
        if name not in hessians or weight.ndim != 2 or weight.shape[1] <= columns:
            continue
        saliency_C = column_importance(weight, hessians[name]).sqrt() * weight.abs().mean(0)
        groups = saliency_C[: len(saliency_C) // columns * columns].reshape(-1, columns).mean(1)
        top = int(groups.argmax())
        if best is None or float(groups[top]) > best[0]:
            best = float(groups[top]), name, top * columns
    return None if best is None else best[1:]


def quantize(
    name: str, weight: Tensor, grid: Grid, hessian: Tensor, first: int, columns: int
) -> tuple[tuple[Tensor, Tensor], StoredTensor]:  # fmt: skip
    """(codes and scale of the matrix without the group, the group as it is stored)."""
    fine = Grid(replace(grid.section, bits=BITS, packed=False))
    rest, (codes, scale) = quantize_salient(weight, grid, hessian, slice(first, first + columns), fine)
    spec = TensorSpec(f"{name}.awq_{first}", tuple(codes.shape), STORE, BITS, fine.section.scale_dtype)
    return rest, StoredTensor(spec, codes.cpu().contiguous().numpy(), scale.cpu().contiguous().numpy())


def applied(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Decoded tensors with every group put into its matrix. GolfError for one that does not fit."""
    found = {full: match for full in arrays if (match := _NAME.match(full))}
    out = {name: array for name, array in arrays.items() if name not in found}
    for full, match in found.items():
        matrix, group, first = out.get(match["matrix"]), arrays[full], int(match["first"])
        end = first + (group.shape[1] if group.ndim == 2 else 0)
        if matrix is None or matrix.ndim != 2 or group.ndim != 2 or matrix.dtype != np.float32:
            raise GolfError(f"tensor {full}: columns without their matrix; get the file again")
        if len(matrix) != len(group) or end > matrix.shape[1] or matrix[:, first:end].any():
            raise GolfError(f"tensor {full}: columns that do not fit {matrix.shape}; get the file again")
        matrix = matrix.copy()
        matrix[:, first:end] = group
        out[match["matrix"]] = matrix
    return out


def check(method: str) -> None:
    """GolfError unless the quantiser is GPTQ, which alone carries errors from one grid to the other."""
    if method != "gptq":
        raise GolfError(f"quant.awq_columns needs quant.method = 'gptq', not '{method}'; change one of them")
