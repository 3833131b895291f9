"""Arrays as bytes and back, by the byte compressors of pack/bytecoding.py at their strongest: the streams of
pack/codecs/bytecoders.py and pack/side.py without a check."""

from __future__ import annotations

import io
import lzma
import math
import zlib
from collections.abc import Sequence

import numpy as np

from paramgolf.pack.bytecoding import NAMES, RAW, ZLIB, ZSTD, lzma_filters
from paramgolf.pack.packing import pack6, packed6_size, unpack6
from paramgolf.pack.wire import varint

TRANSPOSED = 0x80  # set in the byte that names the coder of a stream of columns
SAMPLE = 1 << 18  # bytes on which the layouts of a larger stream are compared

Array = tuple[str, tuple[int, ...]]  # type and shape


def coders_of(codec: str) -> tuple[int, ...]:
    """The byte coders that a codec may take for a stream of weights."""
    return tuple(code for code, name in NAMES.items() if name.partition("-")[0] == codec)


def compress(data: bytes, coder: int) -> bytes:
    """`data` without headers that its size makes redundant."""
    if coder == RAW or not data:
        return data
    if coder == ZLIB:
        packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
        return packer.compress(data) + packer.flush()
    if coder == ZSTD:
        import zstandard

        parameters = zstandard.ZstdCompressionParameters.from_level(
            22, source_size=len(data), format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_content_size=True
        )
        return zstandard.ZstdCompressor(compression_params=parameters).compress(data)
    return lzma.compress(data, lzma.FORMAT_RAW, filters=lzma_filters(coder, 9, len(data)))


def expand(data: bytes, coder: int, size: int) -> bytes:
    """The `size` bytes that were compressed."""
    if coder == RAW or not size:
        return data
    if coder == ZLIB:
        return zlib.decompress(data, -15)
    if coder == ZSTD:
        import zstandard

        return zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS).decompress(data, size)
    return lzma.decompress(data, lzma.FORMAT_RAW, filters=lzma_filters(coder, 9, size))


def framed(header: int, coded: bytes) -> bytes:
    return bytes([header]) + varint(len(coded)) + coded


def read_framed(stream: io.BytesIO, size: int) -> tuple[int, bytes]:
    """The header of the next stream, and its `size` bytes."""
    header = stream.read(1)[0]
    return header, expand(stream.read(read_varint(stream)), header & ~TRANSPOSED, size)


def read_varint(stream: io.BytesIO) -> int:
    value = shift = 0
    while True:
        byte = stream.read(1)[0]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
        shift += 7


# -- codes of weights ------------------------------------------------------------------------------------------


def encode_codes(arrays: Sequence[np.ndarray], packed: bool, coders: Sequence[int]) -> bytes:
    """int8 arrays as one stream of rows or of columns, whichever is smaller, or four codes in three bytes."""
    ways = [
        (coder | flip, b"".join(lay_out(array, packed, flip) for array in arrays))
        for flip in ((0,) if packed else (0, TRANSPOSED))
        for coder in coders
    ]
    if len(ways[0][1]) > 2 * SAMPLE:
        ways = [min(ways, key=lambda way: len(compress(way[1][:SAMPLE], way[0] & ~TRANSPOSED)))]
    ways = [(header, compress(stream, header & ~TRANSPOSED)) for header, stream in ways]
    return framed(*min(ways, key=lambda way: len(way[1])))


def decode_codes(stream: io.BytesIO, shapes: Sequence[tuple[int, ...]], packed: bool) -> list[np.ndarray]:
    """The int8 arrays of these shapes."""
    sides = [(math.prod(shape[:-1]), shape[-1] if shape else 1) for shape in shapes]
    sizes = [packed6_size(*side) if packed else math.prod(side) for side in sides]
    header, data = read_framed(stream, sum(sizes))
    parts = np.split(np.frombuffer(data, np.uint8 if packed else np.int8), np.cumsum(sizes)[:-1])
    if packed:
        parts = [unpack6(part, rows, columns) for part, (rows, columns) in zip(parts, sides, strict=True)]
    elif header & TRANSPOSED:
        parts = [part.reshape(columns, rows).T for part, (rows, columns) in zip(parts, sides, strict=True)]
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def lay_out(codes: np.ndarray, packed: bool, flip: int) -> bytes:
    matrix = codes.reshape(-1, codes.shape[-1] if codes.ndim else 1)
    return (pack6(matrix) if packed else matrix.T if flip else matrix).tobytes()


# -- scales and tensors that are kept --------------------------------------------------------------------------


def encode_arrays(arrays: Sequence[np.ndarray], coders: Sequence[int]) -> bytes:
    """For each type its arrays as one stream, cut into byte planes, each by the coder that makes it smallest."""
    out = b""
    for dtype in dict.fromkeys(array.dtype for array in arrays):
        stream = b"".join(array.tobytes() for array in arrays if array.dtype == dtype)
        for plane in np.frombuffer(stream, np.uint8).reshape(-1, dtype.itemsize).T:
            ways = [(coder, compress(plane.tobytes(), coder)) for coder in coders]
            out += framed(*min(ways, key=lambda way: len(way[1])))
    return out


def decode_arrays(stream: io.BytesIO, specs: Sequence[Array]) -> list[np.ndarray]:
    """The arrays of these types and shapes."""
    found: dict[int, np.ndarray] = {}
    for dtype in dict.fromkeys(name for name, _ in specs):
        members = [index for index, (name, _) in enumerate(specs) if name == dtype]
        sizes = [math.prod(specs[index][1]) for index in members]
        planes = [read_framed(stream, sum(sizes))[1] for _ in range(np.dtype(dtype).itemsize)]
        values = np.stack([np.frombuffer(plane, np.uint8) for plane in planes], axis=1).reshape(-1).view(dtype)
        parts = np.split(values, np.cumsum(sizes)[:-1])
        found |= {index: part.reshape(specs[index][1]) for index, part in zip(members, parts, strict=True)}
    return [found[index] for index in range(len(specs))]
