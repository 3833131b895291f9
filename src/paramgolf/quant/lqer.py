"""LQER: the error that quantisation leaves in a few matrices, stored as a product of two thin integer matrices.

W = Wq + A B with A B the best rank-r approximation of the error: A = U S with codes of 2 bits and one scale, B = V^T
with codes of 4 bits and a scale for every `group` entries (#1797, #1851, #1855; after Zhang et al. 2024,
arXiv 2402.02446). In the artifact they are two tensors more, `<name>.lqer_a` and `<name>.lqer_b`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from paramgolf.errors import GolfError
from paramgolf.pack.stored import StoredTensor, TensorSpec
from paramgolf.quant import awq
from paramgolf.quant.grid import Grid
from paramgolf.recipe.sections import GridSection, QuantSection

LEFT, RIGHT = "lqer_a", "lqer_b"  # endings of the names, and names of the grids in the artifact
GRIDS = {LEFT: GridSection(bits=2, low_code="half"), RIGHT: GridSection(bits=4, low_code="half")}


def corrected(
    stored: Sequence[StoredTensor], state: Mapping[str, Tensor], section: QuantSection
) -> list[StoredTensor]:  # fmt: skip
    """`stored` with the factors of the `lqer_tensors` matrices behind which the largest errors stand, each behind its
    matrix.

    The error is the Frobenius norm of what is left of `state`; of equal ones the first is taken. Matrices that a
    correction would not be thinner than are left out.
    """
    rank = section.lqer_rank
    fits = [t for t in stored if t.spec.bits and len(t.spec.shape) == 2 and rank * sum(t.spec.shape) < t.spec.size]
    whole = awq.applied({t.name: t.dequantised() for t in stored if t.spec.bits})
    left = {t.name: error_of(whole[t.name], state[t.name]) for t in fits if t.name in whole}
    largest = sorted(left, key=lambda name: -float(left[name].norm()))[: section.lqer_tensors]
    out: list[StoredTensor] = []
    for tensor in stored:
        out.append(tensor)
        if tensor.name in largest:
            out += packed(tensor.name, *factors(left[tensor.name], rank), section.lqer_group)
    return out


def correction_bytes(shape: Sequence[int], section: QuantSection) -> float:
    """Bytes of the factors of one matrix of this shape, before a codec; 0 where a correction would not be thinner."""
    rows, columns, rank = shape[0], shape[-1], section.lqer_rank
    if len(shape) != 2 or rank * (rows + columns) >= rows * columns:
        return 0.0
    left, right = GRIDS[LEFT].bits * rows, (GRIDS[RIGHT].bits + 16 / section.lqer_group) * columns
    return rank * (left + right) / 8


def error_of(decoded: np.ndarray, weight: Tensor) -> Tensor:
    """(R, C) float32: what quantisation left of `weight`, on its device."""
    return weight.detach().float() - torch.from_numpy(decoded).to(weight.device)


def factors(error_RC: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A (R, rank) = U S, B (rank, C) = V^T) of the largest singular values."""
    u, s, vt = torch.linalg.svd(error_RC, full_matrices=False)
    return u[:, :rank] * s[:rank], vt[:rank]


def packed(name: str, a_RK: Tensor, b_KC: Tensor, group: int) -> list[StoredTensor]:
    """The two factors of matrix `name` as they are stored: A as a vector, B in rows of `group` entries.

    Where `group` does not divide B, the next smaller size that does is taken.
    """
    size = b_KC.numel()
    group = next(g for g in range(min(group, size), 0, -1) if size % g == 0)
    return [
        _stored(f"{name}.{LEFT}", LEFT, a_RK.reshape(-1)),
        _stored(f"{name}.{RIGHT}", RIGHT, b_KC.reshape(-1, group)),
    ]


def _stored(name: str, kind: str, values: Tensor) -> StoredTensor:
    grid = GRIDS[kind]
    codes, scale = Grid(grid).quantize(values)
    spec = TensorSpec(name, tuple(codes.shape), kind, grid.bits, grid.scale_dtype)
    return StoredTensor(spec, codes.cpu().contiguous().numpy(), scale.cpu().contiguous().numpy())


def applied(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Decoded tensors with every pair of factors multiplied, added to its matrix and left out.

    One product and one sum at a time, in float32: equal on every machine. GolfError for factors without their matrix
    or of sizes that do not fit it.
    """
    out = {name: array for name, array in arrays.items() if not name.endswith((f".{LEFT}", f".{RIGHT}"))}
    for full, flat in arrays.items():
        name, _, ending = full.rpartition(".")
        if ending == RIGHT and f"{name}.{LEFT}" not in arrays:
            raise GolfError(f"tensor {full}: a correction without its other half; get the file again")
        if ending != LEFT:
            continue
        matrix, b = out.get(name), arrays.get(f"{name}.{RIGHT}")
        if matrix is None or b is None or matrix.ndim != 2 or matrix.dtype != np.float32 or not matrix.size:
            raise GolfError(f"tensor {full}: a correction without its matrix; get the file again")
        rows, columns = matrix.shape
        rank = flat.size // rows
        if not rank or flat.size != rank * rows or b.size != rank * columns:
            raise GolfError(f"tensor {full}: a correction that does not fit {rows} x {columns}; get the file again")
        a_RK, b_KC = flat.reshape(rows, rank), b.reshape(rank, columns)
        matrix = matrix.copy()
        for k in range(rank):
            matrix += a_RK[:, k, None] * b_KC[k]
        out[name] = matrix
    return out
