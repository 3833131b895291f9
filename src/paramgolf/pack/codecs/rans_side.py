"""Side data of the weight coder: class vectors of rows and columns, predicted from vectors that are known already.

Known before a vector is coded: the tensor's row scales, and every row or column vector coded earlier (all layers read
and write one residual stream, and the rows of an MLP's first matrix are the columns of its second, so they are alike).
A prediction is a sum of a few of them times slopes in sixteenths, all in integers. The functions here run both ways:
with a BitWriter they code their arguments, with a BitReader they ignore them and return what was coded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from paramgolf.pack.codecs import scale_model as sm
from paramgolf.pack.codecs.rans_bits import Bits, signed, unsigned

UNIT = 16  # sources and slopes are integers in 1/UNIT
_TERMS = 3
_RECENT = 64  # sources of one length that are considered
_SPREADS = 8


@dataclass
class Predictor:
    """base + sum of slope * source: `terms` holds (index into the sources, slope in 1/UNIT)."""

    base: int = 0
    terms: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Sources:
    """Vectors known to both sides, by length; each int64, in 1/UNIT class, mean about zero."""

    by_length: dict[int, list[np.ndarray]] = field(default_factory=dict)

    def known(self, scale: np.ndarray | None, length: int) -> list[np.ndarray]:
        """What may predict a vector of `length`: the tensor's own scale first if it has one, then the newest first."""
        past = self.by_length.get(length, [])[: -_RECENT - 1 : -1]
        return past if scale is None else [scale, *past]

    def add(self, vector: np.ndarray) -> None:
        self.by_length.setdefault(len(vector), []).append(centred(vector))


def centred(vector: np.ndarray) -> np.ndarray:
    """An int64 vector less its mean, rounded down."""
    return vector - int(vector.sum()) // max(len(vector), 1)


def scale_source(scale: np.ndarray | None, rows: int) -> np.ndarray | None:
    """UNIT * classes of the row scales (fp16 or fp32, any values), or None where there is no scale per row."""
    if scale is None or rows < 2:
        return None
    flat = np.asarray(scale).reshape(-1)
    if flat.size != rows or flat.dtype not in (np.float16, np.float32):
        return None
    bits = flat.astype(np.float32).view(np.uint32).astype(np.int64)
    exponent = np.clip((bits >> 23) & 0xFF, 87, 167)  # far-off scales predict nothing: keep the numbers small
    mantissa = (bits & 0x7FFFFF) | 0x800000
    logarithm = sm.log2_fixed(mantissa) + ((exponent - 150) << 16)
    return centred(logarithm * (UNIT * sm.RESOLUTION) >> 16)


def predict(predictor: Predictor, sources: list[np.ndarray], length: int) -> np.ndarray:
    """int64 classes (length,)."""
    total = np.full(length, predictor.base * UNIT * UNIT + UNIT * UNIT // 2, np.int64)
    for index, slope in predictor.terms:
        total += slope * sources[index]
    return total >> 8


def choose(fine: np.ndarray, live: np.ndarray, sources: list[np.ndarray]) -> Predictor:
    """The sources that explain the real-valued classes `fine` (given for the `live` entries) best. Encoder only."""
    y = fine - fine.mean()
    chosen: list[int] = []
    slopes = np.zeros(0)
    stack = np.stack([s[live] for s in sources]) / UNIT if sources else np.zeros((0, len(y)))
    stack = stack - stack.mean(1, keepdims=True) if len(stack) else stack
    power = (stack**2).sum(1) + 1e-9
    rest, noise = y, 0.15
    while len(chosen) < _TERMS and len(stack):
        gains = (stack @ rest) ** 2 / power
        gains[chosen] = 0
        best = int(gains.argmax())
        before, after = (rest**2).mean() + noise, (rest**2).mean() + noise - gains[best] / len(y)
        if len(y) / 2 * np.log2(before / after) < 16:
            break
        chosen.append(best)
        slopes = np.linalg.lstsq(stack[chosen].T, y, rcond=None)[0]
        rest = y - slopes @ stack[chosen]
    terms = [(i, int(np.clip(round(s * UNIT), -64, 64))) for i, s in zip(chosen, slopes.tolist(), strict=True)]
    bare = predict(Predictor(0, terms), sources, len(live) if live.dtype == bool else len(fine))[live]
    return Predictor(round(float((fine - bare).mean())), terms)


def code_predictor(coder: Bits, axis: int, predictor: Predictor, sources: int) -> Predictor:
    """A predictor over so many `sources`; ValueError for damaged data."""
    terms = []
    count = unsigned(coder, ("terms", axis), len(predictor.terms))
    if count > min(_TERMS, sources):
        raise ValueError("a predictor of the weight classes has too many terms")
    for k in range(count):
        index, slope = predictor.terms[k] if predictor.terms else (0, 0)
        index = unsigned(coder, ("index", axis), index, direct=8)
        slope = signed(coder, ("slope", axis), slope - UNIT // 2) + UNIT // 2
        if index >= sources or abs(slope) > 1024:
            raise ValueError("a predictor of the weight classes names an unknown vector")
        terms.append((index, slope))
    base = signed(coder, ("base", axis), predictor.base)
    return Predictor(base, terms)


def code_residual(coder: Bits, axis: int, residual: np.ndarray, length: int) -> np.ndarray:
    """Differences from the prediction, int64 (length,)."""
    spread = 0
    if len(residual):
        mean = float(np.abs(residual).mean())
        spread = 0 if mean == 0 else int(np.clip(round(4 + 2 * np.log2(mean)), 1, _SPREADS - 1))
    spread = coder.bits(spread, 3)
    if spread == 0:
        return np.zeros(length, np.int64)
    given = residual.tolist() if len(residual) else [0] * length
    out = []
    for value in given:
        out.append(signed(coder, (axis, spread), value, 12))
    return np.array(out, np.int64)


def code_live(coder: Bits, axis: int, live: np.ndarray, length: int) -> np.ndarray:
    """Which rows or columns hold anything but zeros: bool (length,)."""
    if not coder.bit(("dead", axis), len(live) > 0 and not live.all()):
        return np.ones(length, bool)
    given = live.tolist() if len(live) else [True] * length
    out, last = [], 0
    for bit in given:
        last = coder.bit(("live", axis, last), bit)  # empty ones come in runs
        out.append(bool(last))
    return np.array(out, bool)
