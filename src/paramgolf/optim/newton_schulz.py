"""Approximate orthogonalisation by Newton-Schulz iterations, for stacks of equally shaped matrices.

X <- a X + (b A + c A^2) X with A = X X^T pushes every singular value towards 1 and needs matrix products only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]

QUINTIC: Coefficients = (3.4445, -4.7750, 2.0315)
"""Muon's coefficients (Jordan 2024), the same in every iteration: singular values end in about 0.7 to 1.2."""

POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""The optimal polynomial of each iteration (Amsel et al. 2025, arXiv 2505.16932); the last one repeats."""

NORM_EPS = 1e-7
GRAM_MIN_SIDE = 128


def schedule_of(coefficients: Coefficients | Sequence[Coefficients], steps: int) -> list[Coefficients]:
    """The (a, b, c) of each of `steps` iterations; a shorter list repeats its last entry."""
    table = [coefficients] if isinstance(coefficients[0], float) else list(coefficients)
    return [table[min(i, len(table) - 1)] for i in range(steps)]  # type: ignore[misc]


def orthogonalize(
    stack: Tensor,
    steps: int = 5,
    coefficients: Coefficients | Sequence[Coefficients] = QUINTIC,
    dtype: torch.dtype = torch.float32,
    safety: float = 1.0,
) -> Tensor:
    """The nearly orthogonal factor of each matrix of `stack` (B, rows, cols), computed and returned in `dtype`.

    Each matrix is first divided by `safety` times its Frobenius norm (+ 1e-7), so an all-zero matrix stays zero.
    """
    x = stack.to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x / (norm * safety + NORM_EPS)
    table = schedule_of(coefficients, steps)
    # In float32 the m x m form is good enough and cheaper once n is well above m; bfloat16 cannot afford to square X.
    # A small matrix has nothing to save, and there the last digits count: under QAT a trajectory is chaotic in them.
    gram = dtype == torch.float32 and x.size(-1) >= 2 * x.size(-2) and x.size(-2) >= GRAM_MIN_SIDE
    x = _iterate_gram(x, table) if gram else _iterate(x, table)
    return x.mT if tall else x


def _iterate(x: Tensor, table: list[Coefficients]) -> Tensor:
    for a, b, c in table:
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def _iterate_gram(x: Tensor, table: list[Coefficients]) -> Tensor:
    """The same iteration on A = X X^T (m x m) only: X_k = Q_k X with Q_k a polynomial of A, applied once at the end.

    Relative error about 1e-4 in float32 over eight decades of singular values (plain form 1e-5, bfloat16 1e-1).
    """
    gram = torch.bmm(x, x.mT)
    total: Tensor | None = None
    for i, (a, b, c) in enumerate(table):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        total = factor if total is None else torch.bmm(factor, total)
        if i + 1 < len(table):
            gram = torch.bmm(torch.bmm(factor, gram), factor)
    return x if total is None else torch.bmm(total, x)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and _cpu_multiplies_bf16() else torch.float32


def _cpu_multiplies_bf16() -> bool:
    """x86 with AVX512-BF16 or AMX; elsewhere torch may emulate bfloat16 slowly."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
