"""Byte compressors as weight codecs: one byte a weight, one stream a role, transposed where that is smaller.

Stream of a role (all layers of, say, `attn.c_q.weight`): header byte (bits 0-6 byte coder, bit 7 transposed), varint
length, data. Grouping by role puts like statistics together; every orientation and coder variant that fits the codec's
name is tried (on a sample for large roles) and the smallest kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paramgolf.pack import bytecoding
from paramgolf.pack.codecs.base import CodeSpec, CodeTensor, role
from paramgolf.pack.packing import pack6, packed6_size, unpack6
from paramgolf.pack.wire import Reader, varint

_TRANSPOSED = 0x80
_SAMPLE = 1 << 18  # bytes on which the variants of a larger role are compared


def _by_role(specs: Sequence[CodeSpec]) -> list[list[int]]:
    """Indices of the tensors of each role, roles in order of first appearance; packed ones stand apart."""
    groups: dict[tuple[str, bool], list[int]] = {}
    for index, spec in enumerate(specs):
        groups.setdefault((role(spec.name), spec.packed), []).append(index)
    return list(groups.values())


def _stream_size(spec: CodeSpec) -> int:
    return packed6_size(*spec.matrix) if spec.packed else spec.size


def _lay_out(tensor: CodeTensor, transposed: bool) -> bytes:
    codes = np.ascontiguousarray(tensor.codes, dtype=np.int8).reshape(tensor.spec.matrix)
    if tensor.spec.packed:
        return pack6(codes).tobytes()
    return (codes.T if transposed else codes).tobytes()


def _restore(data: bytes, spec: CodeSpec, transposed: bool) -> np.ndarray:
    rows, columns = spec.matrix
    if spec.packed:
        codes = unpack6(np.frombuffer(data, np.uint8), rows, columns)
    else:
        codes = np.frombuffer(data, np.int8)
        codes = codes.reshape(columns, rows).T if transposed else codes.reshape(rows, columns)
    if codes.size and (codes.min() < spec.low or codes.max() > spec.high):
        raise ValueError(f"{spec.name}: a code outside its {spec.bits} bits")
    return np.ascontiguousarray(codes).reshape(spec.shape)


class _ByteCodec:
    """Shared by all: a subclass names itself and the byte coders it may use for a stream."""

    name = ""
    coders: tuple[int, ...] = ()

    def encode(self, tensors: Sequence[CodeTensor], level: int = -1) -> bytes:
        """See `codecs.base.Codec`. `level` -1 = the compressor's strongest."""
        out = bytearray()
        for group in _by_role([t.spec for t in tensors]):
            coder, transposed, coded = self._smallest([tensors[i] for i in group], level)
            out += bytes([coder | (_TRANSPOSED if transposed else 0)]) + varint(len(coded)) + coded
        return bytes(out)

    def _smallest(self, tensors: list[CodeTensor], level: int) -> tuple[int, bool, bytes]:
        flips = (False,) if self.coders == (bytecoding.RAW,) or tensors[0].spec.packed else (False, True)
        streams = {flip: b"".join(_lay_out(t, flip) for t in tensors) for flip in flips}
        variants = [(coder, flip) for flip in flips for coder in self.coders]
        if len(streams[False]) > 2 * _SAMPLE and len(variants) > 1:
            sizes = [len(bytecoding.compress(streams[flip][:_SAMPLE], coder, level)) for coder, flip in variants]
            variants = [variants[int(np.argmin(sizes))]]
        best: tuple[int, bool, bytes] | None = None
        for coder, flip in variants:
            coded = bytecoding.compress(streams[flip], coder, level)
            if best is None or len(coded) < len(best[2]):
                best = coder, flip, coded
        assert best is not None
        return best

    def decode(self, data: bytes, specs: Sequence[CodeSpec]) -> list[np.ndarray]:
        """See `codecs.base.Codec`."""
        reader = Reader(data, f"the {self.name} weights")
        arrays: dict[int, np.ndarray] = {}
        for group in _by_role(specs):
            header = reader.u8()
            coded = reader.take(reader.varint(len(reader)))
            size = sum(_stream_size(specs[i]) for i in group)
            stream = bytecoding.expand(coded, header & ~_TRANSPOSED, size)
            at = 0
            for index in group:
                length = _stream_size(specs[index])
                arrays[index] = _restore(stream[at : at + length], specs[index], bool(header & _TRANSPOSED))
                at += length
        reader.end()
        return [arrays[i] for i in range(len(specs))]


class RawCodec(_ByteCodec):
    name = "raw"
    coders = (bytecoding.RAW,)


class ZlibCodec(_ByteCodec):
    name = "zlib"
    coders = (bytecoding.ZLIB,)


class ZstdCodec(_ByteCodec):
    name = "zstd"
    coders = (bytecoding.ZSTD,)


class LzmaCodec(_ByteCodec):
    name = "lzma"
    coders = (bytecoding.LZMA, bytecoding.LZMA_BINARY)


class BrotliCodec(_ByteCodec):
    name = "brotli"
    coders = (bytecoding.BROTLI,)
