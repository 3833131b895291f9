"""Scales and unquantised tensors as bytes: one stream a type, cut into byte planes, each in its smallest byte coder;
or floats as adaptive bits (codecs/rans_floats), whichever is smaller.

The high bytes of floats (sign, exponent) repeat, the low ones are noise: apart they code better than together.
A plane: coder byte, varint length, data. A type coded as adaptive bits: byte 255, varint length, data.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paramgolf.pack import bytecoding
from paramgolf.pack.codecs.rans_floats import decode_floats, encode_floats
from paramgolf.pack.wire import Reader, varint

_FLOATS = 255  # in place of a byte coder's number
_MOST_FLOATS = 1 << 17  # values; about 10 us each

ArraySpec = tuple[str, tuple[int, ...]]  # numpy type name, shape


def _groups(dtypes: Sequence[str]) -> list[tuple[str, list[int]]]:
    groups: dict[str, list[int]] = {}
    for index, dtype in enumerate(dtypes):
        groups.setdefault(dtype, []).append(index)
    return list(groups.items())


def encode_arrays(
    arrays: Sequence[np.ndarray], coders: Sequence[int] = tuple(bytecoding.NAMES), adaptive: bool = True
) -> bytes:
    """Lossless, bit for bit (little-endian); types and shapes are not in the bytes.

    `coders` are the byte coders to choose from, `adaptive` whether adaptive bits may be taken.
    """
    out = bytearray()
    for dtype, members in _groups([a.dtype.name for a in arrays]):
        little = np.dtype(dtype).newbyteorder("<")
        stream = b"".join(np.ascontiguousarray(arrays[i], dtype=little).tobytes() for i in members)
        planes = bytearray()
        for plane in np.frombuffer(stream, np.uint8).reshape(-1, little.itemsize).T:
            coder, coded = bytecoding.smallest(plane.tobytes(), coders)
            planes += bytes([coder]) + varint(len(coded)) + coded
        if adaptive and dtype in ("float16", "float32") and len(stream) <= _MOST_FLOATS * little.itemsize:
            coded = encode_floats([arrays[i] for i in members])
            if 1 + len(varint(len(coded))) + len(coded) < len(planes):
                planes = bytearray([_FLOATS]) + varint(len(coded)) + coded
        out += planes
    return bytes(out)


def decode_arrays(data: bytes, specs: Sequence[ArraySpec], where: str) -> list[np.ndarray]:
    """The arrays back, given their types and shapes. Raises GolfError on damaged bytes."""
    reader = Reader(data, where)
    arrays: dict[int, np.ndarray] = {}
    for dtype, members in _groups([spec[0] for spec in specs]):
        little = np.dtype(dtype).newbyteorder("<")
        sizes = [int(np.prod(specs[i][1], dtype=np.int64)) for i in members]
        planes = np.empty((sum(sizes), little.itemsize), np.uint8)
        coder = reader.u8()
        if coder == _FLOATS:
            if dtype not in ("float16", "float32") or sum(sizes) > _MOST_FLOATS:
                raise reader.fault("an impossible coding of floats")
            coded = reader.take(reader.varint(len(reader)))
            try:
                floats = decode_floats(coded, [specs[i] for i in members])
            except ValueError as error:
                raise reader.fault(str(error)) from error
            arrays.update(zip(members, floats, strict=True))
            continue
        for column in range(little.itemsize):
            coder = reader.u8() if column else coder
            coded = reader.take(reader.varint(len(reader)))
            planes[:, column] = np.frombuffer(bytecoding.expand(coded, coder, len(planes)), np.uint8)
        if dtype == "bool" and planes.size and planes.max() > 1:
            raise reader.fault("a truth value above 1")
        stream = planes.reshape(-1).view(little)
        for index, start, size in zip(members, np.cumsum([0, *sizes[:-1]]), sizes, strict=True):
            arrays[index] = stream[start : start + size].reshape(specs[index][1]).astype(np.dtype(dtype))
    reader.end()
    return [arrays[i] for i in range(len(specs))]
