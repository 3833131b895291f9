"""Integer probability tables for quantised weights: one per scale class, from a named shape and counts seen so far.

A class is the base-2 logarithm of a standard deviation in steps of 1/RESOLUTION octave. Its table starts as the
discretised shape (Student's t or a generalised Gaussian, unit variance) of that width and moves towards the counts of
what was already coded. All arithmetic that the decoder repeats is done in int64, so tables are equal on every machine.
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt

import numpy as np

PRECISION = 14  # frequencies of a table sum to 2**PRECISION
TOTAL = 1 << PRECISION
RESOLUTION = 6  # classes per octave
LOWEST_OCTAVE = -4  # class 1 has a standard deviation of 2**LOWEST_OCTAVE quantisation steps
CLASSES = 14 * RESOLUTION  # classes 1..CLASSES; class 0 = "every value is zero"

# (kind, parameter in sixteenths): t = Student's t with that many degrees of freedom, g = exp(-|x|**parameter).
SHAPES: tuple[tuple[str, int], ...] = (
    ("g", 32), ("t", 16 * 40), ("t", 16 * 20), ("t", 16 * 12), ("t", 16 * 8), ("t", 16 * 6), ("t", 16 * 5),
    ("t", 16 * 4), ("t", 52), ("g", 16), ("g", 20), ("g", 24), ("g", 28), ("g", 40), ("g", 56), ("g", 128),
)  # fmt: skip

_FRACTION = 16  # fixed-point bits of logarithms
_GRID = 64  # points of the shape per unit of x
_REACH = 40  # the shape is tabulated for 0 <= x < _REACH
_MASS = 1 << 20  # a table of masses sums to about this


def _exp2_constants() -> list[int]:
    """2**-(1/2), 2**-(1/4), ... in 30-bit fixed point, by exact integer square roots."""
    out, value = [], 1 << 59
    for _ in range(_FRACTION):
        root = isqrt(value << 60)  # value is 2**(60 - 2**-k); sqrt gives 2**(60 - 2**-(k+1))
        value = root
        out.append(value >> 30)
    return out


_ROOTS = _exp2_constants()


def exp2_neg(e: np.ndarray) -> np.ndarray:
    """floor-like 2**(30 - e / 2**16) of non-negative int64 `e`, the same integers on every machine."""
    whole, part = e >> _FRACTION, e & ((1 << _FRACTION) - 1)
    out = np.full(e.shape, 1 << 30, np.int64)
    for k, root in enumerate(_ROOTS):
        bit = (part >> (_FRACTION - 1 - k)) & 1
        out = np.where(bit == 1, (out * root) >> 30, out)
    return out >> np.minimum(whole, 40)


def log2_fixed(n: np.ndarray) -> np.ndarray:
    """log2 of positive int64 `n` (< 2**62) in 16-bit fixed point, by repeated squaring."""
    n = np.asarray(n, np.int64)
    whole = np.zeros(n.shape, np.int64)
    rest = n.copy()
    for shift in (32, 16, 8, 4, 2, 1):
        big = rest >= (np.int64(1) << shift)
        whole = np.where(big, whole + shift, whole)
        rest = np.where(big, rest >> shift, rest)
    mantissa = np.where(whole <= 30, n << np.maximum(30 - whole, 0), n >> np.maximum(whole - 30, 0))  # 1.0 = 2**30
    out = whole << _FRACTION
    for k in range(_FRACTION):
        mantissa = (mantissa * mantissa) >> 30
        big = mantissa >= (1 << 31)
        mantissa = np.where(big, mantissa >> 1, mantissa)
        out = np.where(big, out + (1 << (_FRACTION - 1 - k)), out)
    return out


@lru_cache(maxsize=32)
def _shape(index: int) -> tuple[np.ndarray, int]:
    """(cumulative mass at x = i / _GRID for i = 0.._REACH*_GRID, standard deviation of the shape in 2**-16)."""
    kind, parameter = SHAPES[index]
    i = 2 * np.arange(_REACH * _GRID, dtype=np.int64) + 1  # x = i / (2 * _GRID)
    one = log2_fixed(np.array([2 * _GRID]))[0]
    if kind == "g":  # exp(-x**p) = 2**-(log2(e) * 2**(p * log2 x))
        power = parameter * (log2_fixed(i) - one) // 16
        fine = exp2_neg(np.maximum((14 << _FRACTION) - power, 0))  # x**p in 2**-16, at most 2**14
        energy = np.minimum(fine, 1 << 24) * 94548 >> 16  # log2(e) = 94548 / 65536
    else:  # (1 + x*x/v) ** -((v+1)/2), v = parameter / 16
        inside = parameter * (2 * _GRID) ** 2 + 16 * i * i
        ratio = log2_fixed(inside) - log2_fixed(np.array([parameter * (2 * _GRID) ** 2]))[0]
        energy = ratio * (parameter + 16) // 32
    density = exp2_neg(energy)
    cumulative = np.concatenate([np.zeros(1, np.int64), np.cumsum(density)])
    second = sum(int(d) * int(x) * int(x) for d, x in zip(density, i, strict=True))
    variance = (second << 32) // (int(cumulative[-1]) * (2 * _GRID) ** 2)  # in 2**-32
    return cumulative, isqrt(variance)


@lru_cache(maxsize=4096)
def masses(shape: int, cls: int, low: int, high: int) -> np.ndarray:
    """int64 masses of the integers low..high for class `cls` >= 1, tails added to the ends; they sum to about 2**20."""
    cumulative, deviation = _shape(shape)
    exponent = (LOWEST_OCTAVE << _FRACTION) + ((cls - 1) << _FRACTION) // RESOLUTION  # log2 of the width
    inverse = int(exp2_neg(np.array([(exponent + (8 << _FRACTION))]))[0])  # 2**(22 - exponent)
    # edge k + 1/2 in grid points, 2**-16: (2k+1)/2 * deviation/2**16 * _GRID / width
    edges = 2 * np.arange(0, max(abs(low), abs(high)) + 1, dtype=np.int64) + 1
    per_edge = (deviation * _GRID * inverse) >> 23  # 2**-16 of a grid point per unit of edges
    at = np.minimum(edges * per_edge, (_REACH * _GRID << 16) - 1)
    left = at >> 16
    upto = cumulative[left] + (((cumulative[left + 1] - cumulative[left]) * (at & 0xFFFF)) >> 16)
    half = int(cumulative[-1])
    scaled = (upto // 2 * (_MASS >> 1)) // (half // 2)  # mass of |x| below the edge, in units of half the table
    positive = np.diff(scaled, prepend=0)  # [0] = half of the zero bin
    out = np.concatenate([positive[:0:-1], [2 * positive[0]], positive[1:]])
    middle = len(positive) - 1
    out = out[middle + low : middle + high + 1].copy()
    out[0] += (_MASS >> 1) - int(scaled[-low]) if low < 0 else 0
    out[-1] += (_MASS >> 1) - int(scaled[high]) if high > 0 else 0
    out.setflags(write=False)
    return out


def normalise(weights: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Frequencies (int64, rows sum to TOTAL, every used symbol >= 1) proportional to the rows of `weights` >= 0."""
    weights = np.where(used, weights, 0)
    total = np.maximum(weights.sum(1, keepdims=True), 1)
    freq = (2 * weights * TOTAL + total) // (2 * total)
    freq = np.where(used, np.maximum(freq, 1), 0)
    rows = np.arange(len(freq))
    for _ in range(4 * weights.shape[1]):
        missing = TOTAL - freq.sum(1)
        if not missing.any():
            return freq
        top = freq.argmax(1)
        # taking too much from one symbol would let it fall below others: at most half of it at a time
        freq[rows, top] += np.maximum(missing, -(freq[rows, top] // 2))
    raise AssertionError("a table of more symbols than TOTAL")
