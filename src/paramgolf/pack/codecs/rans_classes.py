"""Encoder side: the classes of all matrices of a stream, fitted in the order in which they are coded."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from paramgolf.pack.codecs import rans_fit as fit
from paramgolf.pack.codecs.base import CodeSpec
from paramgolf.pack.codecs.rans_layout import MOST_GROUPS, STRENGTHS, Group, View, remember
from paramgolf.pack.codecs.rans_offset import find, offset
from paramgolf.pack.codecs.rans_side import Sources, choose, predict

Member = tuple[View, fit.Matrix]

_GROUP_BITS = 200.0  # what a group costs beyond its tables: header, and group numbers of the matrices
_MOST_SPLIT = 200  # matrices; more are not looked at one by one


def fit_views(views: list[View], pieces: list[np.ndarray], specs: Sequence[CodeSpec]) -> list[Group]:
    """Fill in the views (components, live rows and columns, classes, group) and return the groups.

    `pieces` become what is coded: where components are taken off a matrix, its piece is replaced.
    """
    by_bits: dict[int, list[Member]] = {}
    for number, (view, piece) in enumerate(zip(views, pieces, strict=True)):
        first = int(piece[0, 0])
        if (piece == first).all():
            view.constant = first
            continue
        view.components = find(piece)
        rest = piece - offset(view.components, view.rows, view.columns) if view.components else piece
        if rest.any():
            piece = pieces[number] = rest
        else:  # exactly its components: leave them, so that there is something to code
            view.components = []
        filled = piece != 0
        view.live = [filled.any(1), filled.any(0)]
        whole = all(bool(live.all()) for live in view.live)
        matrix = fit.Matrix(piece if whole else piece[np.ix_(*view.live)])
        fit.start(matrix)
        by_bits.setdefault(specs[view.tensor].bits, []).append((view, matrix))
    room = max(MOST_GROUPS // max(len(by_bits), 1), 1)
    families = [family for bits in sorted(by_bits) for family in _families(by_bits[bits], room)]
    groups = []
    for number, (members, counts) in enumerate(families):
        low, high = (int(f([f(m.codes) for _, m in members])) for f in (np.min, np.max))
        groups.append(Group(low, high, *fit.best_shape(counts, low, high, STRENGTHS)[1:]))
        for view, _ in members:
            view.group = number
    place = {id(view): k for k, view in enumerate(views)}
    order = sorted((member for members, _ in families for member in members), key=lambda m: place[id(m[0])])
    counted = [counts for _, counts in families]
    for reach in (2, 1):
        sources = Sources()
        costs = [fit.cost_table(c, g.shape, STRENGTHS[g.strength], g.low, g.high)
                 for g, c in zip(groups, counted, strict=True)]  # fmt: skip
        for view, matrix in order:
            _fit_view(view, matrix, costs[view.group], sources, reach)
        counted = [fit.count([m for _, m in members]) for members, _ in families]
        for g, c in zip(groups, counted, strict=True):
            _, g.shape, g.strength = fit.best_shape(c, g.low, g.high, STRENGTHS)
    return groups


def _families(members: list[Member], room: int) -> list[tuple[list[Member], np.ndarray]]:
    """Members split by the shape of their values (an embedding has heavier tails than a fresh projection), with counts.

    Matrices of one best shape start together; neighbours in the order of tails are merged while that saves bits.
    """
    low, high = (int(f([f(m.codes) for _, m in members])) for f in (np.min, np.max))
    if len(members) > _MOST_SPLIT or room == 1:
        return [(members, fit.count([m for _, m in members]))]
    start: dict[int, tuple[list[Member], np.ndarray]] = {}
    for member in members:
        counts = fit.count([member[1]])
        rank = fit.TAILS.index(fit.best_shape(counts, low, high, [256])[1])
        have = start.get(rank, ([], np.zeros_like(counts)))
        start[rank] = [*have[0], member], have[1] + counts
    families = [start[rank] for rank in sorted(start)]
    bits = [fit.best_shape(c, low, high, [1024])[0] + _GROUP_BITS for _, c in families]
    joint = [fit.best_shape(a[1] + b[1], low, high, [1024])[0] + _GROUP_BITS
             for a, b in pairwise(families)]  # fmt: skip
    while joint:
        gains = [bits[k] + bits[k + 1] - joint[k] for k in range(len(joint))]
        k = int(np.argmax(gains))
        if gains[k] < 0 and len(families) <= room:
            break
        families[k : k + 2] = [(families[k][0] + families[k + 1][0], families[k][1] + families[k + 1][1])]
        bits[k : k + 2] = [joint[k]]
        del joint[k]
        for side in (k - 1, k):
            if 0 <= side < len(joint):
                both = families[side][1] + families[side + 1][1]
                joint[side] = fit.best_shape(both, low, high, [1024])[0] + _GROUP_BITS
    return families


def _fit_view(view: View, matrix: fit.Matrix, costs: np.ndarray, sources: Sources, reach: int) -> None:
    for axis in (0, 1):
        known = sources.known(view.scale if axis == 0 else None, (view.rows, view.columns)[axis])
        live = view.live[axis]
        fine = matrix.fine_row if axis == 0 else matrix.fine_column
        predictor = view.predictors[axis] = choose(fine, live, known)
        fit.refine(matrix, costs, axis, predict(predictor, known, len(live))[live], reach)
        view.classes[axis] = matrix.row if axis == 0 else matrix.column
        remember(sources, view, axis)
