"""Encoder side: the classes of all matrices of a stream, fitted in the order in which they are coded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paramgolf.pack.codecs import rans_fit as fit
from paramgolf.pack.codecs.base import CodeSpec
from paramgolf.pack.codecs.rans_layout import STRENGTHS, Group, View, remember
from paramgolf.pack.codecs.rans_side import Sources, choose, predict


def fit_views(views: list[View], pieces: list[np.ndarray], specs: Sequence[CodeSpec]) -> list[Group]:
    """Fill in the views (classes, predictors, live rows and columns) and return the groups."""
    members: dict[int, list[tuple[View, fit.Matrix]]] = {}
    for view, piece in zip(views, pieces, strict=True):
        first = int(piece[0, 0])
        if (piece == first).all():
            view.constant = first
            continue
        filled = piece != 0
        view.live = [filled.any(1), filled.any(0)]
        whole = all(bool(live.all()) for live in view.live)
        matrix = fit.Matrix(piece if whole else piece[np.ix_(*view.live)])
        fit.start(matrix)
        members.setdefault(specs[view.tensor].bits, []).append((view, matrix))
    groups = []
    sources = Sources()
    state = []
    for bits in sorted(members):
        matrices = [m for _, m in members[bits]]
        low, high = (int(f([f(m.codes) for m in matrices])) for f in (np.min, np.max))
        counts = fit.count(matrices)
        _, shape, strength = fit.best_shape(counts, low, high, STRENGTHS)
        groups.append(Group(low, high, shape, strength))
        for view, _ in members[bits]:
            view.group = len(groups) - 1
        state.append((matrices, counts))
    order = [(v, m) for bits in members for v, m in members[bits]]
    position = {id(v): k for k, v in enumerate(views)}
    order.sort(key=lambda pair: position[id(pair[0])])
    for _round in range(2):
        sources = Sources()
        costs = [fit.cost_table(c, g.shape, STRENGTHS[g.strength], g.low, g.high)
                 for g, (_, c) in zip(groups, state, strict=True)]  # fmt: skip
        for view, matrix in order:
            _fit_view(view, matrix, costs[view.group], sources)
        state = [(matrices, fit.count(matrices)) for matrices, _ in state]
        for g, (_, c) in zip(groups, state, strict=True):
            _, g.shape, g.strength = fit.best_shape(c, g.low, g.high, STRENGTHS)
    return groups


def _fit_view(view: View, matrix: fit.Matrix, costs: np.ndarray, sources: Sources) -> None:
    for axis in (0, 1):
        known = sources.known(view.scale if axis == 0 else None, (view.rows, view.columns)[axis])
        live = view.live[axis]
        fine = matrix.fine_row if axis == 0 else matrix.fine_column
        predictor = view.predictors[axis] = choose(fine, live, known)
        fit.refine(matrix, costs, axis, predict(predictor, known, len(live))[live])
        view.classes[axis] = matrix.row if axis == 0 else matrix.column
        remember(sources, view, axis)
