"""Float arrays (row scales, control tensors) as adaptive bits: magnitude classes modelled, the noise below them raw.

A float's bits, put in numerical order, are an integer; integers of one array lie near each other or near the same
place of an earlier array of equal length (the scales of one role in two layers). What is coded is the difference from
that prediction in steps of 2**shift, then `shift` plain bits. Trailing zero bits that all share are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paramgolf.pack.codecs.rans_bits import BitReader, Bits, BitWriter, signed, unsigned
from paramgolf.pack.codecs.rans_side import UNIT, Predictor, centred, choose, code_predictor, predict

_WIDTHS = {"float16": 16, "float32": 32}
_RECENT = 48


def ordered(bits: np.ndarray, width: int) -> np.ndarray:
    """Bit patterns -> integers in the order of the floats they stand for (and back: it is `unordered`'s inverse)."""
    top = 1 << (width - 1)
    return np.where(bits >= top, (2 * top - 1) - bits, bits + top)


def unordered(values: np.ndarray, width: int) -> np.ndarray:
    top = 1 << (width - 1)
    return np.where(values >= top, values - top, (2 * top - 1) - values)


def encode_floats(arrays: Sequence[np.ndarray]) -> bytes:
    """Lossless, bit for bit; types (float16, float32) and shapes are not in the bytes."""
    coder = BitWriter()
    past: dict[int, list[np.ndarray]] = {}
    for array in arrays:
        width = _WIDTHS[array.dtype.name]
        bits = np.ascontiguousarray(array).reshape(-1).view(f"<u{width // 8}").astype(np.int64)
        _code(coder, bits, len(bits), width, past)
    return coder.finish()


def decode_floats(data: bytes, specs: Sequence[tuple[str, tuple[int, ...]]]) -> list[np.ndarray]:
    """The arrays of these (type name, shape); damaged bytes give other values or ValueError, never more memory."""
    coder = BitReader(data)
    past: dict[int, list[np.ndarray]] = {}
    out = []
    for dtype, shape in specs:
        width = _WIDTHS[dtype]
        bits = _code(coder, np.zeros(0, np.int64), int(np.prod(shape, dtype=np.int64)), width, past)
        out.append(bits.astype(f"<u{width // 8}").view(f"<f{width // 8}").astype(dtype).reshape(shape))
    return out


def _code(coder: Bits, given: np.ndarray, length: int, width: int, past: dict[int, list[np.ndarray]]) -> np.ndarray:
    """One array's bit patterns, int64 (length,), both ways."""
    if length == 0:
        return given
    zeros, shift, values = 0, 0, given
    if len(given):
        union = int(np.bitwise_or.reduce(given))
        zeros = min((union & -union).bit_length() - 1, width - 2) if union else width - 2
        values = ordered(given >> zeros, width - zeros)
        spread = float(np.abs(values - np.median(values)).mean())
        shift = max(int(np.log2(spread + 1)) - 1, 0)
    zeros = unsigned(coder, "zeros", zeros)
    if zeros > width - 2:
        raise ValueError("a float array's trailing zeros do not fit its type")
    kept = width - zeros
    shift = unsigned(coder, "shift", shift)
    if shift >= kept:
        raise ValueError("a float array's shift does not fit its type")
    known = [centred(v) * UNIT >> shift for v in past.get(length, [])[: -_RECENT - 1 : -1]]
    predictor = Predictor()
    if len(given):
        predictor = choose((values / (1 << shift)), np.ones(length, bool), known)
    values = _values(coder, values, predictor, known, length, kept, shift)
    past.setdefault(length, []).append(np.clip(values, 0, 1 << 32))
    return unordered(values, kept) << zeros


def _values(
    coder: Bits, values: np.ndarray, predictor: Predictor, known: list[np.ndarray], length: int, kept: int, shift: int
) -> np.ndarray:
    middle = 1 << (kept - 1 - shift)  # floats near zero; most bases lie at either side
    base = coder.bits(int(np.clip(predictor.base, 0, 2 * middle - 1)), kept - shift)
    terms = code_predictor(coder, 2, Predictor(0, predictor.terms), len(known)).terms
    predicted = predict(Predictor(base, terms), known, length)
    given = ((values >> shift) - predicted).tolist() if len(values) else [0] * length
    constant = coder.bit("constant", bool(len(values)) and not any(given) and shift == 0)
    if constant:
        result = predicted
    else:
        level, out = 2, []
        for difference in given:
            difference = signed(coder, level, difference, 12)
            out.append(difference)
            size = abs(difference)  # neighbours are of like spread: follow it in coarse steps
            level = 1 if size < 2 else 2 if size < 6 else 3
        result = np.array(out, np.int64) + predicted
    low = (values & ((1 << shift) - 1)).tolist() if len(values) else [0] * length
    raw = np.array([coder.bits(v, shift) for v in low], np.int64) if shift else np.zeros(length, np.int64)
    result = (result << shift) | raw
    if result.min() < 0 or result.max() >= 1 << kept:
        raise ValueError("a float array holds a value outside its type")
    return result
