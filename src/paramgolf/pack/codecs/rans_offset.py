"""A few outer products of small integers taken off a matrix before it is coded.

Token embeddings have a common direction (columns with a mean, scaled by how often a token was seen); its share of the
variance is paid for in every code. Other matrices have no such direction, and then nothing is taken off.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paramgolf.pack.codecs.rans_bits import Bits, signed, unsigned

_MOST = 4  # components
_VALUE_BITS = 5.0  # about what one entry of a component costs
_AIM = 6.0  # root mean square of the entries of the row factors
_MOST_SHIFT = 12


@dataclass
class Component:
    """rows x columns / 2**shift."""

    rows: np.ndarray  # int64, |entry| <= 127
    columns: np.ndarray
    shift: int


def offset(components: list[Component], rows: int, columns: int) -> np.ndarray:
    """The integers taken off, int8 wrapped around (rows, columns)."""
    total = np.zeros((rows, columns), np.int64)
    for c in components:
        total += ((c.rows[:, None] * c.columns[None, :]) << _MOST_SHIFT) >> c.shift
    return ((total + (1 << (_MOST_SHIFT - 1))) >> _MOST_SHIFT).astype(np.int8)


def find(codes: np.ndarray, seed: int = 1) -> list[Component]:
    """Components that save more bits than they cost. Encoder only."""
    rows, columns = codes.shape
    cost = (rows + columns) * _VALUE_BITS + 40
    rest: np.ndarray = codes.astype(np.float32)
    out: list[Component] = []
    if codes.size < 1024 or min(rows, columns) < 8:
        return out
    rng = np.random.default_rng(seed)
    for _ in range(_MOST):
        left, right = _leading(rest, rng)
        power = float((rest * rest).mean())
        share = float((left @ left) * (right @ right)) / rest.size
        before = power + (1 / 12 if out else 0)  # the first rounding adds its own noise
        if codes.size / 2 * np.log2(before / max(power - share + 1 / 12, 1e-6)) < 1.3 * cost:
            break
        component = _rounded(left, right)
        out.append(component)
        taken: np.ndarray = np.outer(component.rows, component.columns)
        rest = rest - taken.astype(np.float32) * np.float32(0.5**component.shift)
    return out


def _leading(matrix: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The leading singular pair, roughly: left (rows,) of unit length, right (columns,) with the singular value."""
    right: np.ndarray = rng.standard_normal((matrix.shape[1],)).astype(np.float32)
    left: np.ndarray = matrix @ right
    for _ in range(4):
        left = matrix @ right
        left /= np.linalg.norm(left) + 1e-20
        right = left @ matrix
    return left, right


def _rounded(left: np.ndarray, right: np.ndarray) -> Component:
    scale = _AIM / max(float(np.sqrt((left**2).mean())), 1e-20)
    u = np.clip(np.rint(left * scale), -127, 127).astype(np.int64)
    spread = float(np.sqrt((right**2).mean())) / scale
    shift = int(np.clip(round(float(np.log2(_AIM / max(spread, 1e-20)))), 0, _MOST_SHIFT))
    v = np.clip(np.rint(right / scale * (1 << shift)), -127, 127).astype(np.int64)
    return Component(u, v, shift)


def code_components(coder: Bits, components: list[Component], rows: int, columns: int) -> list[Component]:
    """Runs both ways, like the functions of rans_side."""
    count = unsigned(coder, "components", len(components))
    if count > _MOST:
        raise ValueError("the weight stream takes too many components off a matrix")
    out = []
    for k in range(count):
        given = components[k] if components else None
        shift = unsigned(coder, "component shift", given.shift if given else 0)
        if shift > _MOST_SHIFT:
            raise ValueError("the weight stream has a component of impossible size")
        vectors = []
        for axis, length in enumerate((rows, columns)):
            entries = [0] * length if given is None else (given.columns if axis else given.rows).tolist()
            vector = np.array([signed(coder, ("component", axis), e, 10) for e in entries], np.int64)
            vectors.append(np.clip(vector, -127, 127))
        out.append(Component(vectors[0], vectors[1], shift))
    return out
