"""General-purpose byte compressors with bounded decompression: the output size is known before and never exceeded."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterable

from paramgolf.errors import GolfError

# One byte names the coder in a file: the numbers are part of the format and never change.
RAW, ZLIB, ZSTD, LZMA, LZMA_BINARY, BROTLI = range(6)
NAMES = {RAW: "raw", ZLIB: "zlib", ZSTD: "zstd", LZMA: "lzma", LZMA_BINARY: "lzma-binary", BROTLI: "brotli"}
MAX_LEVEL = {RAW: 0, ZLIB: 9, ZSTD: 22, LZMA: 9, LZMA_BINARY: 9, BROTLI: 11}
STANDARD = (RAW, ZLIB, LZMA, LZMA_BINARY)  # those that Python itself has
LIBRARIES = {"zstd": (ZSTD,), "brotli": (BROTLI,)}
_MAX_DICTIONARY = 1 << 26


def _dictionary_size(size: int) -> int:
    """Window of LZMA and brotli for `size` bytes: the next power of two, so that decoding memory follows the size."""
    return min(max(1 << max(size - 1, 0).bit_length(), 1 << 12), _MAX_DICTIONARY)


def lzma_filters(coder: int, level: int, size: int) -> list[dict[str, int]]:
    """The filter chain of an LZMA coder for `size` bytes: no header says it."""
    literal = {"lc": 0, "lp": 0, "pb": 0} if coder == LZMA_BINARY else {"lc": 3, "lp": 0, "pb": 2}
    preset = level | lzma.PRESET_EXTREME
    return [{"id": lzma.FILTER_LZMA1, "preset": preset, "dict_size": _dictionary_size(size), **literal}]


def compress(data: bytes, coder: int, level: int = -1) -> bytes:
    """`data` coded by `coder` (a number above) without headers that the size makes redundant. Deterministic."""
    strongest = MAX_LEVEL[coder]
    level = strongest if level < 0 else min(level, strongest)
    if coder == RAW or not data:
        return data
    if coder == ZLIB:
        packer = zlib.compressobj(level, zlib.DEFLATED, -15, 9)
        return packer.compress(data) + packer.flush()
    if coder in (LZMA, LZMA_BINARY):
        return lzma.compress(data, lzma.FORMAT_RAW, filters=lzma_filters(coder, level, len(data)))
    if coder == ZSTD:
        return _compress_zstd(data, level)
    if coder == BROTLI:
        return _compress_brotli(data, level)
    raise ValueError(f"no byte coder {coder}")


def _compress_zstd(data: bytes, level: int) -> bytes:
    import zstandard

    parameters = zstandard.ZstdCompressionParameters.from_level(
        max(level, 1), source_size=len(data), format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_content_size=True
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


def _compress_brotli(data: bytes, level: int) -> bytes:
    import brotli

    window = max(10, min(24, _dictionary_size(len(data)).bit_length()))
    return brotli.compress(data, mode=brotli.MODE_GENERIC, quality=level, lgwin=window)


def smallest(data: bytes, coders: Iterable[int] = tuple(NAMES)) -> tuple[int, bytes]:
    """(coder, bytes) of the shortest coding of `data` at full strength; the first wins a tie."""
    best: tuple[int, bytes] | None = None
    for coder in coders:
        coded = compress(data, coder)
        if best is None or len(coded) < len(best[1]):
            best = coder, coded
    assert best is not None
    return best


def expand(data: bytes, coder: int, size: int) -> bytes:
    """Exactly `size` bytes back from `compress`; memory stays of the order of `size` whatever `data` holds.

    Raises GolfError when `data` is damaged, has another size or is not used up.
    """
    name = NAMES.get(coder)
    if name is None:
        raise GolfError(f"unknown byte coder {coder} in a section; written by a newer version? update paramgolf")
    try:
        out = _expand(data, coder, size)
    except (ValueError, EOFError, MemoryError, lzma.LZMAError, zlib.error) as error:
        raise GolfError(f"damaged {name} data ({error}); get the file again") from error
    if len(out) != size:
        raise GolfError(f"{name} data of another length than the {size} bytes promised; get the file again")
    return out


def _expand(data: bytes, coder: int, size: int) -> bytes:
    if coder == RAW or not size:
        return data
    if coder == ZLIB:
        inflater = zlib.decompressobj(-15)
        out = inflater.decompress(data, size + 1)
        _require(inflater.eof and not inflater.unused_data)
        return out
    if coder in (LZMA, LZMA_BINARY):
        reader = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=lzma_filters(coder, 9, size))
        out = reader.decompress(data, size + 1)
        if not reader.eof and len(out) == size:  # the end marker is only read when more output is asked for
            out += reader.decompress(b"", 1)
        _require(reader.eof and not reader.unused_data)
        return out
    if coder == ZSTD:
        return _expand_zstd(data, size)
    if coder == BROTLI:
        return _expand_brotli(data, size)
    raise ValueError("no such coder")


def _expand_zstd(data: bytes, size: int) -> bytes:
    import zstandard

    form = zstandard.FORMAT_ZSTD1_MAGICLESS
    try:
        frame = zstandard.get_frame_parameters(data, format=form)
        _require(frame.content_size == size and frame.window_size <= max(_dictionary_size(size), 1 << 17))
        return zstandard.ZstdDecompressor(format=form).decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error


def _expand_brotli(data: bytes, size: int) -> bytes:
    import brotli

    inflater = brotli.Decompressor()
    out = bytearray()
    try:
        chunk = inflater.process(data, output_buffer_limit=1 << 20)
        while True:
            out += chunk
            if inflater.is_finished() or len(out) > size or (not chunk and inflater.can_accept_more_data()):
                break
            chunk = inflater.process(b"", output_buffer_limit=1 << 20)
    except brotli.error as error:
        raise ValueError(str(error)) from error
    _require(inflater.is_finished())
    return bytes(out)


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError("cut short, overlong or followed by other bytes")
