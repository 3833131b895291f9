"""Encoder side: which scale class every row and column of every matrix gets. Floating point; nothing here is decoded.

A matrix is seen as noise whose log standard deviation is row class + column class. Classes start from second moments
and are then chosen by the exact code length of the table set they select, plus the length of their own side data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log

import numpy as np

from paramgolf.pack.codecs import scale_model as sm

_PAD = 4  # table rows repeated beyond either end, so that candidates need no clipping
SYMBOLS = 256
TAILS = (9, 8, 7, 6, 5, 4, 10, 11, 3, 12, 2, 1, 0, 13, 14, 15)  # indices into SHAPES, heaviest tails first


@dataclass
class Matrix:
    """One 2-D slice of a tensor while its classes are being chosen."""

    codes: np.ndarray  # int8 (rows, columns)
    row: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # classes; 0 = dead (all zero)
    column: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # class offsets
    fine_row: np.ndarray = field(default_factory=lambda: np.zeros(0))  # the same before rounding
    fine_column: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def cells(self, pad: int) -> np.ndarray:
        """Flat index (class + pad) * SYMBOLS + code + 128 of every element, int64 (rows, columns)."""
        low, high = (int(f(self.row)) + int(f(self.column)) for f in (np.min, np.max))
        if low >= 1 and high <= sm.CLASSES:
            index = ((self.row + pad) * SYMBOLS + 128)[:, None] + (self.column * SYMBOLS)[None, :]
        else:
            classes = np.clip(self.row[:, None] + self.column[None, :], 1, sm.CLASSES)
            index = (classes + pad) * SYMBOLS + 128
        index += self.codes
        return index


def start(matrix: Matrix, rounds: int = 3) -> None:
    """Rank-one fit of the second moments."""
    square = np.arange(-128, 128, dtype=np.float32) ** 2
    q = square.take(matrix.codes.astype(np.int16) + 128)
    rows, columns = q.shape
    across = np.ones(columns, np.float32)
    down = np.ones(rows, np.float32)
    for _ in range(rounds):
        down = np.maximum(q @ (1 / across) / columns, 1e-3)
        across = np.maximum((1 / down) @ q / rows, 1e-3)
        # columns are seen by `rows` samples only: shrink what noise alone explains
        across /= np.exp(np.log(across).mean())
    sigma = np.sqrt(np.maximum(down - 1 / 12, 0.1 * down**1.5 + 1e-4))
    matrix.fine_row = 1 + sm.RESOLUTION * (np.log2(sigma) - sm.LOWEST_OCTAVE)
    matrix.fine_column = sm.RESOLUTION * np.log2(across) / 2
    matrix.row = np.clip(np.rint(matrix.fine_row), 1, sm.CLASSES).astype(np.int64)
    matrix.column = np.rint(matrix.fine_column).astype(np.int64)


def count(matrices: list[Matrix]) -> np.ndarray:
    """How often each code occurs in each class: int64 (CLASSES + 1, SYMBOLS), symbol = code + 128."""
    total = np.zeros((sm.CLASSES + 1) * SYMBOLS, np.int64)
    for m in matrices:
        total += np.bincount(m.cells(0).ravel(), minlength=len(total))
    return total.reshape(-1, SYMBOLS)


def shape_masses(shape: int, low: int, high: int) -> np.ndarray:
    """Masses of all classes, float64 (CLASSES + 1, high - low + 1), rows sum to one; row 0 repeats row 1."""
    table = np.stack([sm.masses(shape, c, low, high) for c in range(1, sm.CLASSES + 1)]) + 1.0
    table /= table.sum(1, keepdims=True)
    return np.concatenate([table[:1], table])


def _log_gamma(x: np.ndarray) -> np.ndarray:
    """log Gamma of positive values, good to about 1e-9 (Stirling's series above 8, the recurrence below)."""
    shift = np.ones_like(x)
    y = x.copy()
    for _ in range(8):
        low = y < 8
        shift = np.where(low, shift * y, shift)
        y = np.where(low, y + 1, y)
    series = (1 / 12 - (1 / 360 - 1 / (1260 * y * y)) / (y * y)) / y
    return (y - 0.5) * np.log(y) - y + 0.9189385332046727 + series - np.log(shift)


def evidence_bits(counts: np.ndarray, prior: np.ndarray, strength: float) -> float:
    """Bits of coding the counted symbols with tables that start from `prior` worth `strength` observations."""
    total = counts.sum(1).astype(np.float64)
    some = counts > 0
    p = prior[some] * strength
    ends = _log_gamma(total + strength) - _log_gamma(np.full(len(total), float(strength)))
    return float(ends.sum() + (_log_gamma(p) - _log_gamma(counts[some] + p)).sum()) / log(2)


def best_shape(counts: np.ndarray, low: int, high: int, strengths: list[int]) -> tuple[float, int, int]:
    """(bits, index into SHAPES, index into strengths) of the cheapest start for these counts."""
    classes = np.flatnonzero(counts.sum(1))
    seen = counts[classes, low + 128 : high + 129]
    tried = []
    middle = len(strengths) // 2
    for shape in range(len(sm.SHAPES)):
        prior = np.stack([sm.masses(shape, max(c, 1), low, high) for c in classes.tolist()]) + 1.0
        prior /= prior.sum(1, keepdims=True)
        tried.append((evidence_bits(seen, prior, strengths[middle]), shape, prior))
    tried.sort(key=lambda item: item[:2])
    return min(
        (evidence_bits(seen, prior, s), shape, k) for _, shape, prior in tried[:3] for k, s in enumerate(strengths)
    )


def cost_table(counts: np.ndarray, shape: int, strength: float, low: int, high: int) -> np.ndarray:
    """Bits of each code in each class, float32 (CLASSES + 1 + 2 * _PAD, SYMBOLS), padded at both ends."""
    prior = shape_masses(shape, low, high) * strength
    seen = counts[:, low + 128 : high + 129] + prior
    bits = np.full((sm.CLASSES + 1, SYMBOLS), 40.0, np.float32)
    bits[:, low + 128 : high + 129] = -np.log2(seen / seen.sum(1, keepdims=True))
    return np.pad(bits, ((_PAD, _PAD), (0, 0)), mode="edge")


def axis_costs(matrix: Matrix, table: np.ndarray, axis: int, reach: int) -> np.ndarray:
    """Bits of every row (axis 0) or column (axis 1) with its class moved by -reach..reach: (2 * reach + 1, n)."""
    base = matrix.cells(_PAD)
    flat = table.ravel()
    moved = range(-reach, reach + 1)
    return np.stack([flat[d * SYMBOLS :].take(base).sum(1 - axis) if d >= 0 else
                     flat.take(base + d * SYMBOLS).sum(1 - axis) for d in moved])  # fmt: skip


def refine(
    matrix: Matrix, table: np.ndarray, axis: int, predicted: np.ndarray, reach: int = 2, rounds: int = 3
) -> None:
    """Move the classes of one axis to the least bits of codes plus side data; `predicted` is free of charge."""
    costs = axis_costs(matrix, table, axis, reach)
    now = matrix.row if axis == 0 else matrix.column
    middle = costs[reach]
    slope, bend = costs[reach + 1] - costs[reach - 1], costs[reach + 1] + costs[reach - 1] - 2 * middle
    fine = now - np.clip(slope / (2 * np.maximum(bend, 1e-3)), -reach, reach)
    if axis == 0:
        matrix.fine_row = fine
    else:
        matrix.fine_column = fine
    offsets = np.arange(-reach, reach + 1)[:, None]
    # what the estimates scatter beyond their own uncertainty (1 / curvature) is real; only that is worth sending
    real = max(float(((fine - predicted) ** 2).mean() - (1 / (np.log(2) * np.maximum(bend, 1e-3))).mean()), 0.02)
    residual = now - predicted
    for k in range(rounds):
        side = side_bits(residual) if k else (lambda values: values**2 * (0.72 / real))
        choice = (costs + side(now + offsets - predicted)).argmin(0)
        residual = now + choice - reach - predicted
    chosen = residual + predicted
    if axis == 0:
        matrix.row = np.clip(chosen, 1, sm.CLASSES)
    else:
        matrix.column = np.clip(chosen, -sm.CLASSES, sm.CLASSES)


def side_bits(residual: np.ndarray):  # type: ignore[no-untyped-def]
    """residual -> estimated bits of coding it, from how the residuals are distributed now."""
    limit = 24
    n = np.bincount(np.clip(residual, -limit, limit) + limit, minlength=2 * limit + 1) + 0.0
    spread = np.abs(residual).mean() + 0.3
    smooth = np.exp(-np.abs(np.arange(-limit, limit + 1)) / spread)
    n += 2 * smooth / smooth.sum()
    bits = -np.log2(n / n.sum())
    return lambda values: bits[np.clip(values, -limit, limit) + limit]
