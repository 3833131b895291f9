"""The weight codec `rans`: entropy coding of quantised weights by row and column scale; decoding is integer only.

Stream: varint length, side data (rans_bits), 16-bit little-endian words of the lanes (rans_lanes). The side data hold a
checksum, the groups of matrices that share tables and every matrix's class vectors (rans_layout, rans_side), the states
of the lanes, and the codes outside their tables (rans_tables). The tables themselves are learned (scale_model).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from paramgolf.pack.codecs import rans_lanes
from paramgolf.pack.codecs.base import CodeSpec, CodeTensor
from paramgolf.pack.codecs.rans_bits import BitReader, Bits, BitWriter
from paramgolf.pack.codecs.rans_classes import fit_views
from paramgolf.pack.codecs.rans_layout import code_groups, code_view, slices, views_of
from paramgolf.pack.codecs.rans_offset import offset
from paramgolf.pack.codecs.rans_side import Sources
from paramgolf.pack.codecs.rans_tables import code_escape, codes_of, contexts_of, symbols_of

_MOST_LANES = 1024


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
    pieces = slices(views, parts)
    groups = fit_views(views, pieces, specs)
    side = BitWriter()
    side.bits(zlib.crc32(b"".join(p.tobytes() for p in parts)), 32)
    code_groups(side, groups)
    sources = Sources()
    for view in views:
        code_view(side, view, len(groups), sources)
    contexts, tables = contexts_of(views, groups)
    coded = [piece[np.ix_(*v.live)].ravel() for v, piece in zip(views, pieces, strict=True) if v.constant is None]
    codes = np.concatenate(coded) if coded else np.zeros(0, np.int8)
    symbols, escaped = symbols_of(contexts, codes, tables)
    words = _encode_lanes(side, symbols, tables.tables)
    for context, code in zip(contexts[escaped].tolist(), codes[escaped].tolist(), strict=True):
        code_escape(side, tables, context, code)
    body = side.finish()
    return _varint(len(body)) + body + words.astype("<u2").tobytes()


def _encode_lanes(side: BitWriter, ids: np.ndarray, tables: rans_lanes.Tables) -> np.ndarray:
    lanes = lanes_for(len(ids))
    small = max(lanes // 32, 1)
    room = 2 * lanes - 4 * small  # bytes of words that fit into the carry of `lanes` states
    tail = 0
    if lanes >= 32:
        end = ids[-8 * lanes :]
        bits = -np.log2(np.bincount(end)[end] / len(end)).mean() + 0.3  # above the true cost in most cases
        tail = min(int(room * 8 * 0.98 / bits), len(ids) // 2)
    start = tables.counts.copy()
    while True:
        tables.counts[:] = start
        plan = rans_lanes.plan(ids[: len(ids) - tail], tables, lanes)
        carry = np.zeros(lanes, np.uint16)
        if tail == 0:
            break
        final = rans_lanes.plan(ids[len(ids) - tail :], tables, small, learn=False)
        states, words = rans_lanes.encode(ids[len(ids) - tail :], final, np.zeros(small, np.uint16))
        if 2 * len(words) <= room:
            carry[: 2 * small] = states.view(np.uint16)
            carry[2 * small : 2 * small + len(words)] = words
            break
        tail = tail * 15 // 16
    side.bits(tail, 16)
    states, words = rans_lanes.encode(ids[: len(ids) - tail], plan, carry)
    code_states(side, states, lanes)
    return words


def _decode_lanes(side: BitReader, contexts: np.ndarray, words: np.ndarray, tables: rans_lanes.Tables) -> np.ndarray:
    lanes = lanes_for(len(contexts))
    small = max(lanes // 32, 1)
    tail = side.bits(0, 16)
    if tail > len(contexts) or (tail and lanes < 32):
        raise ValueError("the weight stream has an impossible tail")
    states = code_states(side, np.zeros(0, np.uint32), lanes)
    decoder = rans_lanes.Decoder(states, words, tables)
    ids = decoder.run(contexts[: len(contexts) - tail])
    carry = decoder.finish()
    if not tail:
        return ids
    inner = rans_lanes.Decoder(carry[: 2 * small].view(np.uint32), carry[2 * small :], tables)
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
    codes = codes_of(side, contexts, ids, tables)
    out = [np.zeros(spec.size, np.int8) for spec in specs]
    at = 0
    for view, piece in zip(views, slices(views, out), strict=True):
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
        if view.components:
            piece += offset(view.components, view.rows, view.columns)
    if zlib.crc32(b"".join(o.tobytes() for o in out)) != checksum:
        raise ValueError("the checksum of the weights does not match")
    for spec, array in zip(specs, out, strict=True):
        if array.size and (array.min() < spec.low or array.max() > spec.high):
            raise ValueError(f"{spec.name}: a code outside its {spec.bits} bits")
    return [o.reshape(spec.shape) for o, spec in zip(out, specs, strict=True)]


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
