"""The weight codec `rans`: entropy coding of quantised weights by row and column scale, integer arithmetic to decode.

Stream: varint length, side data (rans_bits), 16-bit little-endian words of the lanes (rans_lanes). The side data hold a
checksum, groups of matrices that share tables, per matrix its class vectors (rans_side), the lanes' states and the
values outside their table. Layout and model: docs of `rans_lanes`, `rans_side`, `scale_model`.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from paramgolf.pack.codecs import rans_fit as fit
from paramgolf.pack.codecs import rans_lanes as lanes_
from paramgolf.pack.codecs import scale_model as sm
from paramgolf.pack.codecs.base import CodeSpec, CodeTensor
from paramgolf.pack.codecs.rans_bits import Bits, BitReader, BitWriter, signed, unsigned
from paramgolf.pack.codecs.rans_side import (
    UNIT, Predictor, Sources, choose, code_live, code_predictor, code_residual, predict, scale_source,
)  # fmt: skip

STRENGTHS = [1 << k for k in range(3, 19)]  # a prior table weighs as much as that many observations
_TAIL_MASS = 1 << 7  # a table leaves out values whose mass beyond is at most this, of 2**20
_MOST_CONTEXTS = 1024
_MOST_LANES = 1024


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
    count = unsigned(coder, "groups", len(groups))
    if count > 16:
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
    for axis, length in enumerate((view.rows, view.columns)):
        live = view.live[axis] = code_live(coder, axis, view.live[axis], length)
        known = sources.known(view.scale if axis == 0 else None, length)
        predictor = view.predictors[axis] = code_predictor(coder, axis, view.predictors[axis], len(known))
        predicted = predict(predictor, known, length)[live]
        given = view.classes[axis]
        residual = code_residual(coder, given - predicted if len(given) else given, len(predicted))
        view.classes[axis] = predicted + residual
        remember(sources, view, axis)


def remember(sources: Sources, view: View, axis: int) -> None:
    """Make the classes of one axis known, as real weights' scales where the tensor's row scales are known."""
    live, classes = view.live[axis], np.clip(view.classes[axis], -4096, 4096)
    full = np.full(len(live), int(classes.sum()) // max(len(classes), 1), np.int64)
    full[live] = classes
    own = view.scale if axis == 0 and view.scale is not None else 0
    sources.add(full * UNIT + own)


@dataclass
class TableSet:
    """The learning tables of a stream, and what its symbols mean."""

    tables: lanes_.Tables
    first: np.ndarray  # (contexts,) code of symbol 0
    count: np.ndarray  # (contexts,) symbols that are codes; the next one, if there, stands for any other code
    context_of: np.ndarray  # (groups * (CLASSES + 1),) -> context

    @classmethod
    def build(cls, groups: list[Group], seen: np.ndarray) -> TableSet:
        """`seen`: flags of the (group, class) pairs that occur, flat."""
        pairs = np.flatnonzero(seen)
        if len(pairs) > _MOST_CONTEXTS:
            raise ValueError("the weight stream has too many tables")
        priors, first, count, mirrors = [], [], [], []
        for pair in pairs.tolist():
            group = groups[pair // (sm.CLASSES + 1)]
            mass = sm.masses(group.shape, pair % (sm.CLASSES + 1), group.low, group.high) + 1
            values = np.arange(group.low, group.high + 1)
            outside = np.array([int(mass[np.abs(values) > m].sum()) for m in range(129)])
            reach = int(np.argmax(outside <= _TAIL_MASS))
            kept = np.abs(values) <= max(reach, 1)
            rest = mass[~kept]
            part = mass[kept].tolist() + ([int(rest.sum())] if len(rest) else [])
            low = int(values[kept][0]) if kept.any() else 0
            first.append(low)
            count.append(int(kept.sum()))
            mirror = np.arange(257)
            if group.symmetric:
                opposite = -(low + np.arange(int(kept.sum()))) - low
                inside = (opposite >= 0) & (opposite < int(kept.sum()))
                mirror[: len(opposite)][inside] = opposite[inside]
            mirrors.append(mirror)
            priors.append(np.array(part + [0] * (257 - len(part)), np.int64) * STRENGTHS[group.strength])
        width = max((c + 1 for c in count), default=1)
        prior = np.stack(priors)[:, :width] if priors else np.zeros((0, width), np.int64)
        flat = np.array([m[:width] + k * width for k, m in enumerate(mirrors)], np.int64).reshape(-1)
        context_of = np.zeros(len(seen), np.int32)
        context_of[pairs] = np.arange(len(pairs))
        return cls(lanes_.Tables(prior, flat), np.array(first, np.int64), np.array(count, np.int64), context_of)


def contexts_of(views: list[View], groups: list[Group]) -> tuple[np.ndarray, TableSet]:
    """(context of every coded element uint16, tables)."""
    total = sum(len(v.classes[0]) * len(v.classes[1]) for v in views if v.constant is None)
    pairs = np.empty(total, np.uint16)
    at = 0
    for v in views:
        if v.constant is None:
            cell = np.clip(v.classes[0][:, None] + v.classes[1][None, :], 1, sm.CLASSES)
            cell += v.group * (sm.CLASSES + 1)
            pairs[at : at + cell.size] = cell.ravel()
            at += cell.size
    pair_count = len(groups) * (sm.CLASSES + 1)
    seen = np.bincount(pairs, minlength=pair_count) > 0
    tables = TableSet.build(groups, seen)
    return tables.context_of.astype(np.uint16).take(pairs), tables


def lanes_for(elements: int) -> int:
    return 1 << int(np.clip((elements >> 13).bit_length() - 1, 0, _MOST_LANES.bit_length() - 1))


def code_states(coder: Bits, states: np.ndarray, lanes: int) -> np.ndarray:
    """States in [2**16, 2**32), whose logarithm is uniform: length first, then the bits below the leading one."""
    given = states.tolist() if len(states) else [1 << 16] * lanes
    out = []
    for x in given:
        width = coder.bits(x.bit_length() - 17, 4) + 16
        out.append(1 << width | coder.bits(x & ((1 << width) - 1), width))
    return np.array(out, np.uint32)


def encode_tensors(tensors: Sequence[CodeTensor]) -> bytes:
    """The stream of these tensors, in order; classes are fitted here."""
    specs = [t.spec for t in tensors]
    views = views_of(specs)
    parts = [np.ascontiguousarray(t.codes, np.int8).reshape(-1) for t in tensors]
    pieces = _slices(views, parts)
    groups = _fit(views, pieces, specs)
    side = BitWriter()
    side.bits(zlib.crc32(b"".join(p.tobytes() for p in parts)), 32)
    code_groups(side, groups)
    sources = Sources()
    for view in views:
        code_view(side, view, len(groups), sources)
    contexts, tables = contexts_of(views, groups)
    coded = [piece[np.ix_(*v.live)].ravel() for v, piece in zip(views, pieces, strict=True) if v.constant is None]
    codes = np.concatenate(coded) if coded else np.zeros(0, np.int8)
    symbols, escaped = _symbols(contexts, codes, tables)
    words = _encode_lanes(side, symbols, tables.tables)
    for context, code in zip(contexts[escaped].tolist(), codes[escaped].tolist(), strict=True):
        code_escape(side, tables, context, code)
    body = side.finish()
    return _varint(len(body)) + body + words.astype("<u2").tobytes()


def _slices(views: list[View], parts: list[np.ndarray]) -> list[np.ndarray]:
    at = [0] * len(parts)
    out = []
    for v in views:
        size = v.rows * v.columns
        out.append(parts[v.tensor][at[v.tensor] : at[v.tensor] + size].reshape(v.rows, v.columns))
        at[v.tensor] += size
    return out


def code_escape(coder: Bits, tables: TableSet, context: int, code: int) -> int:
    """A code outside its table."""
    low = int(tables.first[context])
    high = low + int(tables.count[context]) - 1
    negative = coder.bit("outside sign", code < low)
    distance = unsigned(coder, "outside", (low - code if negative else code - high) - 1, direct=16)
    return low - 1 - distance if negative else high + 1 + distance


def _symbols(contexts: np.ndarray, codes: np.ndarray, tables: TableSet) -> tuple[np.ndarray, np.ndarray]:
    """(flat symbol ids int32, indices of elements outside their table)."""
    width = tables.tables.symbols
    every = np.arange(-128, 128)[None, :] - tables.first[:, None]
    inside = (every >= 0) & (every < tables.count[:, None])
    lookup = np.where(inside, every, tables.count[:, None]) + np.arange(len(every))[:, None] * width
    index = contexts.astype(np.int32) * 256 + (codes.astype(np.int32) + 128)
    ids = lookup.astype(np.int32).ravel().take(index) if len(index) else np.zeros(0, np.int32)
    outside = ~inside.ravel()
    escaped = np.flatnonzero(outside.take(index)) if len(index) else np.zeros(0, np.int64)
    return ids, escaped


def _encode_lanes(side: BitWriter, ids: np.ndarray, tables: lanes_.Tables) -> np.ndarray:
    lanes = lanes_for(len(ids))
    small = max(lanes // 32, 1)
    room = 2 * lanes - 4 * small  # bytes of words that fit into the carry of `lanes` states
    tail = 0
    if lanes >= 32:
        end = ids[-8 * lanes :]
        bits = -np.log2((np.bincount(end)[end] / len(end))).mean() + 0.3  # above the true cost in most cases
        tail = min(int(room * 8 * 0.98 / bits), len(ids) // 2)
    start = tables.counts.copy()
    while True:
        tables.counts[:] = start
        plan = lanes_.plan(ids[: len(ids) - tail], tables, lanes)
        carry = np.zeros(lanes, np.uint16)
        if tail == 0:
            break
        final = lanes_.plan(ids[len(ids) - tail :], tables, small, learn=False)
        states, words = lanes_.encode(ids[len(ids) - tail :], final, np.zeros(small, np.uint16))
        if 2 * len(words) <= room:
            carry[: 2 * small] = states.view(np.uint16)
            carry[2 * small : 2 * small + len(words)] = words
            break
        tail = tail * 15 // 16
    side.bits(tail, 16)
    states, words = lanes_.encode(ids[: len(ids) - tail], plan, carry)
    code_states(side, states, lanes)
    return words


def _decode_lanes(side: BitReader, contexts: np.ndarray, words: np.ndarray, tables: lanes_.Tables) -> np.ndarray:
    lanes = lanes_for(len(contexts))
    small = max(lanes // 32, 1)
    tail = side.bits(0, 16)
    if tail > len(contexts) or (tail and lanes < 32):
        raise ValueError("the weight stream has an impossible tail")
    states = code_states(side, np.zeros(0, np.uint32), lanes)
    decoder = lanes_.Decoder(states, words, tables)
    ids = decoder.run(contexts[: len(contexts) - tail])
    carry = decoder.finish()
    if not tail:
        return ids
    inner = lanes_.Decoder(carry[: 2 * small].view(np.uint32), carry[2 * small :], tables)
    return np.concatenate([ids, inner.run(contexts[len(contexts) - tail :], learn=False)])


def decode_tensors(data: bytes, specs: Sequence[CodeSpec]) -> list[np.ndarray]:
    """int8 arrays; ValueError for anything damaged. Memory is proportional to the specs and the data."""
    length, at = _read_varint(data)
    if length > len(data) - at or (len(data) - at - length) % 2:
        raise ValueError("the weight stream is cut")
    side = BitReader(data[at : at + length])
    words = np.frombuffer(data, "<u2", offset=at + length).astype(np.uint16)
    checksum = side.bits(0, 32)
    groups = code_groups(side, [])
    views = views_of(specs)
    sources = Sources()
    for view in views:
        code_view(side, view, len(groups), sources)
    contexts, tables = contexts_of(views, groups)
    ids = _decode_lanes(side, contexts, words, tables.tables)
    codes = _codes(side, contexts, ids, tables)
    out = [np.zeros(spec.size, np.int8) for spec in specs]
    at = 0
    for view, piece in zip(views, _slices(views, out), strict=True):
        if view.constant is not None:
            if not -128 <= view.constant <= 127:
                raise ValueError("the weight stream holds a code outside int8")
            piece[:] = view.constant
            continue
        rows, columns = (int(live.sum()) for live in view.live)
        block = codes[at : at + rows * columns].reshape(rows, columns)
        at += block.size
        if block.size == piece.size:
            piece[:] = block
        else:
            piece[np.ix_(*view.live)] = block
    if zlib.crc32(b"".join(o.tobytes() for o in out)) != checksum:
        raise ValueError("the checksum of the weights does not match")
    for spec, array in zip(specs, out, strict=True):
        if array.size and (array.min() < spec.low or array.max() > spec.high):
            raise ValueError(f"{spec.name}: a code outside its {spec.bits} bits")
    return [o.reshape(spec.shape) for o, spec in zip(out, specs, strict=True)]


def _codes(side: BitReader, contexts: np.ndarray, ids: np.ndarray, tables: TableSet) -> np.ndarray:
    symbol = np.arange(tables.tables.symbols)[None, :]
    value = np.clip(symbol + tables.first[:, None], -128, 127).astype(np.int8)
    codes = value.ravel().take(ids) if len(ids) else np.zeros(0, np.int8)
    is_escape = (symbol == tables.count[:, None]).ravel()
    for index in np.flatnonzero(is_escape.take(ids)).tolist() if len(ids) else []:
        code = code_escape(side, tables, int(contexts[index]), 0)
        if not -128 <= code <= 127:
            raise ValueError("the weight stream holds a code outside int8")
        codes[index] = code
    return codes


def _fit(views: list[View], pieces: list[np.ndarray], specs: Sequence[CodeSpec]) -> list[Group]:
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
    for last in (False, True):
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


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _read_varint(data: bytes) -> tuple[int, int]:
    value = 0
    for at in range(min(5, len(data))):
        value |= (data[at] & 127) << 7 * at
        if data[at] < 128:
            return value, at + 1
    raise ValueError("the weight stream is cut")


class RansCodec:
    """See `codecs.base.Codec`."""

    name = "rans"

    def encode(self, tensors: Sequence[CodeTensor], level: int = -1) -> bytes:
        """One stream for all tensors; `level` has no meaning here."""
        return encode_tensors(tensors)

    def decode(self, data: bytes, specs: Sequence[CodeSpec]) -> list[np.ndarray]:
        """int8 arrays of the specs' shapes; ValueError for damaged data."""
        return decode_tensors(data, specs)
