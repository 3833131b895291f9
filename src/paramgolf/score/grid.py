"""A grid on log-odds that an encoder and a slightly different decoder read alike.

Two computations of the same model differ in the last digits, and an arithmetic coder needs equal probabilities. So a
log-odds is replaced by the cell it falls in, and the encoder slides the grid, block by block, to a place where no
log-odds of the block lies within the tolerance of a cell boundary. A decoder within the tolerance then finds the same
cells. The proof, the costs and how this differs from published schemes: docs/coder.md.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from paramgolf.score.rans import ONE

LIMIT = 12.0  # log-odds beyond this are treated as this: a probability of 6e-6
# Added to the tolerance: covers the float64 rounding of the log-odds and of the warp, both far below 1e-12, so that a
# tolerance of 0 means "the same logits" and not "the same instructions".
GUARD = 1e-9
_BEND = 6.0  # where cells begin to widen: equal loss over cells asks for widths like (p (1 - p))^(-1/3)
_SAMPLES = 8  # points of a cell whose mean probability it gets


def warp(log_odds: np.ndarray) -> np.ndarray:
    """Log-odds (float64) to the coordinate in which cells have equal width. Odd, increasing, slope at most 1.

    Only +, *, / and sqrt, which IEEE 754 rounds alike everywhere.
    """
    x = np.clip(log_odds, -LIMIT, LIMIT)
    return 2.0 * x / (1.0 + np.sqrt(1.0 + (2.0 / _BEND * x) ** 2))


def unwarp(u: np.ndarray) -> np.ndarray:
    """The inverse of `warp`, for |u| below 6."""
    return u / (1.0 - (u / _BEND) ** 2)


def reach(log_odds: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """(lowest, highest) warped value that a decoder within the tolerance can have."""
    around = tolerance + GUARD
    return warp(log_odds - around), warp(log_odds + around)


@dataclass(frozen=True)
class Grid:
    """Cells of equal width in `warp`: width_4096 / 4096 wide, at one of `shifts` evenly spaced places."""

    width_4096: int
    shifts: int

    @property
    def width(self) -> float:
        return self.width_4096 / 4096

    def cells(self, warped: np.ndarray, shift: np.ndarray | int) -> np.ndarray:
        """The cell (int64, from 0) of each warped log-odds when the grid is at place `shift` (broadcast), 0..shifts."""
        return np.floor(warped / self.width - shift / self.shifts).astype(np.int64) + self._offset

    @property
    def _offset(self) -> int:
        return int(np.ceil(float(warp(np.array(LIMIT))) / self.width)) + 1

    @functools.cached_property
    def zero_freq(self) -> np.ndarray:
        """(shifts + 1, cells) uint32: 65536 times the probability of a 0 for each cell. The last row is 1/2
        throughout: the place without a model, which every decoder reads alike."""
        edges = np.arange(-self._offset, self._offset + 1, dtype=np.float64)
        points = (np.arange(_SAMPLES) + 0.5) / _SAMPLES
        place = np.arange(self.shifts) / self.shifts
        u = (edges[None, :, None] + points + place[:, None, None]) * self.width
        top = float(warp(np.array(LIMIT)))
        values = _logistic(unwarp(np.clip(u, -top, top)))
        one = sum(values[..., i] for i in range(_SAMPLES)) / _SAMPLES  # in this order on every machine
        table = np.full((self.shifts + 1, len(edges)), ONE // 2, dtype=np.uint32)
        table[:-1] = np.clip(np.rint((1.0 - one) * ONE), 1, ONE - 1)
        return table


def _logistic(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x) from IEEE basic operations only: the same bits on every machine, which no `exp` promises."""
    y = -np.abs(x) / 4096.0
    term, series = np.ones_like(y), np.ones_like(y)
    for k in range(1, 9):
        term = term * y / k
        series = series + term
    for _ in range(12):
        series = series * series
    low = series / (1.0 + series)  # of -|x|
    return np.where(x < 0, low, 1.0 - low)
