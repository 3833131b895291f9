"""What both sides of the weight coder walk through: groups of matrices, matrices, their class vectors.

Like `rans_side`, the `code_*` functions run both ways: a BitWriter codes the given values, a BitReader fills them in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from paramgolf.pack.codecs.base import CodeSpec
from paramgolf.pack.codecs.rans_bits import Bits, signed, unsigned
from paramgolf.pack.codecs.rans_offset import Component, code_components
from paramgolf.pack.codecs.rans_side import (
    UNIT,
    Predictor,
    Sources,
    code_live,
    code_predictor,
    code_residual,
    predict,
    scale_source,
)

STRENGTHS = [1 << k for k in range(3, 19)]  # a starting table weighs as much as that many observations
MOST_GROUPS = 8
_FAR = 4096  # classes beyond say nothing: sums are clipped to 1..CLASSES


@dataclass
class Group:
    """Matrices that share tables: codes low..high, shape and strength of the starting tables."""

    low: int = 0
    high: int = 0
    shape: int = 0
    strength: int = 0
    symmetric: int = 1


@dataclass
class View:
    """A matrix as both sides know it: its place in the tensor and, once coded, its classes."""

    tensor: int
    rows: int
    columns: int
    scale: np.ndarray | None  # rans_side.scale_source
    constant: int | None = None
    group: int = 0
    components: list[Component] = field(default_factory=list)
    live: list[np.ndarray] = field(default_factory=lambda: [np.zeros(0, bool)] * 2)
    classes: list[np.ndarray] = field(default_factory=lambda: [np.zeros(0, np.int64)] * 2)
    predictors: list[Predictor] = field(default_factory=lambda: [Predictor(), Predictor()])


def views_of(specs: Sequence[CodeSpec]) -> list[View]:
    """Every tensor as one matrix, or as a stack of matrices where its last two axes are long enough to be one."""
    out = []
    for index, spec in enumerate(specs):
        rows, columns = spec.matrix
        stacked = len(spec.shape) > 2 and min(spec.shape[-2:]) >= 16
        if spec.size == 0:
            continue
        scale = spec.scale
        if stacked:
            rows, columns = spec.shape[-2:]
            count = spec.size // (rows * columns)
            parts = np.reshape(scale, (count, -1)) if scale is not None and np.size(scale) == count * rows else None
            out += [View(index, rows, columns, scale_source(None if parts is None else parts[k], rows))
                    for k in range(count)]  # fmt: skip
        else:
            out.append(View(index, rows, columns, scale_source(scale, rows)))
    return out


def code_groups(coder: Bits, groups: list[Group]) -> list[Group]:
    """The groups, at most MOST_GROUPS; ValueError for damaged data."""
    count = unsigned(coder, "groups", len(groups))
    if count > MOST_GROUPS:
        raise ValueError("the weight stream has too many groups")
    out = []
    for k in range(count):
        g = groups[k] if groups else Group()
        low = coder.bits(g.low + 128, 8) - 128
        high = coder.bits(g.high + 128, 8) - 128
        out.append(Group(low, high, coder.bits(g.shape, 4), coder.bits(g.strength, 4), coder.bits(g.symmetric, 1)))
        if low > high:
            raise ValueError("the weight stream has a group without values")
    return out


def code_view(coder: Bits, view: View, groups: int, sources: Sources) -> None:
    """Everything but the codes of one matrix, in place."""
    if coder.bit("constant", view.constant is not None):
        view.constant = signed(coder, "constant value", view.constant or 0)
        return
    view.group = unsigned(coder, "group", view.group)
    if view.group >= groups:
        raise ValueError("the weight stream names an unknown group")
    view.components = code_components(coder, view.components, view.rows, view.columns)
    for axis, length in enumerate((view.rows, view.columns)):
        live = view.live[axis] = code_live(coder, axis, view.live[axis], length)
        known = sources.known(view.scale if axis == 0 else None, length)
        predictor = view.predictors[axis] = code_predictor(coder, axis, view.predictors[axis], len(known))
        predicted = predict(predictor, known, length)[live]
        given = view.classes[axis]
        residual = code_residual(coder, axis, given - predicted if len(given) else given, len(predicted))
        view.classes[axis] = predicted + residual
        remember(sources, view, axis)


def remember(sources: Sources, view: View, axis: int) -> None:
    """Make the classes of one axis known, as real weights' scales where the tensor's row scales are known."""
    live, classes = view.live[axis], np.clip(view.classes[axis], -_FAR, _FAR)
    full = np.full(len(live), int(classes.sum()) // max(len(classes), 1), np.int64)
    full[live] = classes
    own = view.scale if axis == 0 and view.scale is not None else 0
    sources.add(full * UNIT + own)


def slices(views: list[View], parts: list[np.ndarray]) -> list[np.ndarray]:
    """Each view's piece (rows, columns) of the flat `parts`, one of which a tensor has."""
    at = [0] * len(parts)
    out = []
    for v in views:
        size = v.rows * v.columns
        out.append(parts[v.tensor][at[v.tensor] : at[v.tensor] + size].reshape(v.rows, v.columns))
        at[v.tensor] += size
    return out
