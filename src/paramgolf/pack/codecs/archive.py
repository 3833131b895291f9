"""The layouts of two records as weight codecs, for comparison: `shuffled` (#1394) and `grouped` (#1855).

`auto` leaves them out: both are slow, and the plain coders or `rans` are smaller.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paramgolf.pack import bytecoding
from paramgolf.pack.codecs.base import CodeSpec, CodeTensor, role
from paramgolf.pack.codecs.rearrange import (
    byte_shuffle,
    byte_unshuffle,
    join_streams,
    similarity_order,
    split_streams,
)

_STRIDE = 2
# Roles whose rows have no order of their own: tokens, query channels, hidden channels.
REORDERED = ("tok_emb.weight", "attn.c_q.weight", "mlp.fc.weight")
_MOST_ROWS = 1 << 16
_CODERS = (bytecoding.LZMA, bytecoding.LZMA_BINARY, bytecoding.ZSTD, bytecoding.BROTLI)


def _checked(codes: np.ndarray, spec: CodeSpec) -> np.ndarray:
    if codes.size and (codes.min() < spec.low or codes.max() > spec.high):
        raise ValueError(f"{spec.name}: a code outside its {spec.bits} bits")
    return np.ascontiguousarray(codes).reshape(spec.shape)


class ShuffledCodec:
    """All codes as one string of bytes, even places before odd ones, brotli."""

    name = "shuffled"

    def encode(self, tensors: Sequence[CodeTensor], level: int = -1) -> bytes:
        """See `codecs.base.Codec`."""
        plain = b"".join(np.ascontiguousarray(t.codes, np.int8).tobytes() for t in tensors)
        return bytecoding.compress(byte_shuffle(plain, _STRIDE), bytecoding.BROTLI, level)

    def decode(self, data: bytes, specs: Sequence[CodeSpec]) -> list[np.ndarray]:
        """See `codecs.base.Codec`."""
        size = sum(spec.size for spec in specs)
        shuffled = size if size < _STRIDE else size + 5
        plain = byte_unshuffle(bytecoding.expand(data, bytecoding.BROTLI, shuffled), size, _STRIDE)
        flat, at, out = np.frombuffer(plain, np.int8), 0, []
        for spec in specs:
            out.append(_checked(flat[at : at + spec.size].copy(), spec))
            at += spec.size
        return out


def reorders(spec: CodeSpec) -> bool:
    """Whether `grouped` puts the rows of this tensor in order of likeness."""
    return role(spec.name) in REORDERED and 1 < spec.matrix[0] <= _MOST_ROWS


def group_streams(tensors: Sequence[CodeTensor]) -> tuple[dict[str, bytes], np.ndarray]:
    """(bytes of each role, permutations uint16): what `grouped` compresses.

    A role's tensors follow each other in the order given, each transposed so that the row is what changes fastest.
    Roles are in the order of their names, the embedding first; permutations follow in that order.
    """
    streams: dict[str, bytes] = {}
    orders: list[np.ndarray] = []
    for index in _by_role([t.spec for t in tensors]):
        tensor = tensors[index]
        codes = np.ascontiguousarray(tensor.codes, np.int8).reshape(tensor.spec.matrix)
        if reorders(tensor.spec):
            orders.append(similarity_order(codes))
            codes = codes[orders[-1]]
        name = role(tensor.spec.name)
        streams[name] = streams.get(name, b"") + codes.T.tobytes()
    return streams, np.concatenate(orders) if orders else np.zeros(0, np.uint16)


def _by_role(specs: Sequence[CodeSpec]) -> list[int]:
    """Indices of the tensors, roles together."""
    keys = [(role(spec.name) != "tok_emb.weight", role(spec.name), index) for index, spec in enumerate(specs)]
    return [index for _, _, index in sorted(keys)]


class GroupedCodec:
    """One stream a role, rows of some in order of likeness, each in its smallest byte coder.

    The record had an external program (lrzip -z) for the streams; here it is what the package has.
    """

    name = "grouped"

    def encode(self, tensors: Sequence[CodeTensor], level: int = -1) -> bytes:
        """See `codecs.base.Codec`; `level` is not used, every stream is coded at full strength."""
        streams, orders = group_streams(tensors)
        coded = []
        for stream in (*streams.values(), orders.astype("<u2").tobytes()):
            coder, body = bytecoding.smallest(stream, (bytecoding.RAW, *_CODERS))
            coded.append(bytes([coder]) + body)
        return join_streams(coded)

    def decode(self, data: bytes, specs: Sequence[CodeSpec]) -> list[np.ndarray]:
        """See `codecs.base.Codec`."""
        coded = split_streams(data)
        sizes: dict[str, int] = {}
        for index in _by_role(specs):
            name = role(specs[index].name)
            sizes[name] = sizes.get(name, 0) + specs[index].size
        rows = sum(spec.matrix[0] for spec in specs if reorders(spec))
        if len(coded) != len(sizes) + 1 or not all(coded):
            raise ValueError("a bundle of another number of streams")
        plain = [
            bytecoding.expand(body[1:], body[0], size)
            for body, size in zip(coded, [*sizes.values(), 2 * rows], strict=True)
        ]
        orders = np.frombuffer(plain[-1], "<u2").astype(np.int64)
        streams = dict(zip(sizes, plain, strict=False))
        return self._arrays(specs, streams, orders)

    def _arrays(self, specs: Sequence[CodeSpec], streams: dict[str, bytes], orders: np.ndarray) -> list[np.ndarray]:
        out: dict[int, np.ndarray] = {}
        at, used = dict.fromkeys(streams, 0), 0
        for index in _by_role(specs):
            spec, name = specs[index], role(specs[index].name)
            rows, columns = spec.matrix
            part = np.frombuffer(streams[name], np.int8, spec.size, at[name]) if spec.size else np.zeros(0, np.int8)
            at[name] += spec.size
            codes = part.reshape(columns, rows).T
            if reorders(spec):
                order = orders[used : used + rows]
                used += rows
                if not np.array_equal(np.sort(order), np.arange(rows)):
                    raise ValueError(f"{spec.name}: its order of rows is not one")
                restored = np.empty_like(codes)
                restored[order] = codes
                codes = restored
            out[index] = _checked(codes, spec)
        return [out[index] for index in range(len(specs))]
