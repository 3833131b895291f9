"""The file that `golf compress` and `golf prove` write: a header, frames, an end. Described in docs/format.md.

Readers never trust it: every length has a limit, every number its shortest form, and a fault is one GolfError.
Plain Python: listing a file needs neither numpy nor torch.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, BinaryIO, NamedTuple

from paramgolf.errors import GolfError
from paramgolf.pack.wire import Reader, varint

MAGIC = b"\x89GTX"
VERSION = 2
ID_BYTES = 16  # of the model's SHA-256 and of the content's
MAX_RAW = 1 << 30  # bytes that one frame may stand for
MAX_TOTAL = 1 << 62
MAX_WINDOW = 1 << 20
_HEADER = struct.Struct(f"<4sBB{ID_BYTES}sfII")
HEADER_BYTES = _HEADER.size + 4
_END = 255


class Content(IntEnum):
    """What the frames hold."""

    FILE = 0  # one file, cut anywhere
    DOCUMENTS = 1  # documents with 0x1E and a newline between them, cut between documents
    TOKENS = 2  # a token stream, two bytes a token


class Kind(IntEnum):
    """How a frame's bytes are coded."""

    RAW = 0
    ZSTD = 1
    LZMA = 2
    MODEL = 3  # the model's coder alone
    PATCHED = 4  # the model's coder, then what its text lacks
    ADAPTED = 5  # the model's coder, the model learning from what was read; then what its text lacks


@dataclass(frozen=True)
class Header:
    """`model`: the first 16 bytes of the artifact's SHA-256; tolerance in log-odds; seq_len and stride in tokens."""

    content: Content
    model: bytes
    tolerance: float
    seq_len: int
    stride: int

    def pack(self) -> bytes:
        body = _HEADER.pack(MAGIC, VERSION, self.content, self.model, self.tolerance, self.seq_len, self.stride)
        return body + zlib.crc32(body).to_bytes(4, "little")


class Frame(NamedTuple):
    """`raw` bytes of content, whose CRC-32 is `crc`, coded as `payload`."""

    kind: Kind
    raw: int
    crc: int
    payload: bytes

    @property
    def by_model(self) -> bool:
        return self.kind >= Kind.MODEL

    def pack(self) -> bytes:
        head = bytes([self.kind]) + varint(self.raw) + varint(len(self.payload)) + self.crc.to_bytes(4, "little")
        return head + self.payload


def pack_end(total: int, digest: bytes) -> bytes:
    """The end of a file whose `total` bytes of content have this SHA-256."""
    return bytes([_END]) + varint(total) + digest[:ID_BYTES]


class StreamReader(Reader):
    """`Reader` over a stream, of which it reads no byte more than it is asked for."""

    def __init__(self, stream: BinaryIO, where: str) -> None:
        super().__init__(b"", where)
        self._stream = stream

    def take(self, count: int) -> bytes:
        parts, missing = [], count
        while missing:
            part = self._stream.read(min(missing, 1 << 20))  # memory follows what is there, not what is promised
            if not part:
                raise self.fault(f"the file ends {missing} bytes too early")
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def end(self) -> None:
        if self._stream.read(1):
            raise self.fault("more bytes after the end")


def read_header(reader: StreamReader) -> Header:
    """The header; GolfError for another kind of file, another version or damage."""
    magic = reader.take(4)
    if magic != MAGIC:
        raise GolfError(f"{reader.where} was not made by golf compress; give a file that was")
    version = reader.u8()
    if version != VERSION:
        other = "a newer" if version > VERSION else "an older"
        raise GolfError(f"{reader.where} has format version {version}, this program reads {VERSION}; use {other} one")
    body = magic + bytes([version]) + reader.take(_HEADER.size - 5)
    if int.from_bytes(reader.take(4), "little") != zlib.crc32(body):
        raise reader.fault("a wrong checksum of the header")
    _, _, content, model, tolerance, seq_len, stride = _HEADER.unpack(body)
    sane = math.isfinite(tolerance) and 0 <= tolerance <= 1 and 1 <= stride <= seq_len <= MAX_WINDOW
    if content not in set(Content) or not sane:
        raise reader.fault("impossible settings")
    return Header(Content(content), model, tolerance, seq_len, stride)


@dataclass
class Ending:
    """Filled when the last frame has been read."""

    total: int = 0
    digest: bytes = b""


def read_frames(reader: StreamReader, ending: Ending) -> Iterator[Frame]:
    """The frames in order; at the end fills `ending` and checks that nothing follows."""
    known, total = set(Kind), 0
    while (kind := reader.u8()) != _END:
        if kind not in known:
            raise reader.fault(f"a frame of unknown kind {kind}")
        raw = reader.varint(MAX_RAW)
        size = reader.varint(2 * MAX_RAW)
        # A generic codec is not used where it does not shrink; a model must be, in a proof, at whatever size.
        if raw == 0 or (kind < Kind.MODEL and size > raw) or size > 16 * raw + 4096:
            raise reader.fault("impossible frame sizes")
        total += raw
        yield Frame(Kind(kind), raw, int.from_bytes(reader.take(4), "little"), reader.take(size))
    ending.total, ending.digest = reader.varint(MAX_TOTAL), reader.take(ID_BYTES)
    if ending.total != total:
        raise reader.fault(f"frames of {total} bytes where the end says {ending.total}")
    reader.end()


def describe(stream: BinaryIO, where: str) -> dict[str, Any]:
    """What `golf inspect` says of such a file; reads all of it, decodes nothing."""
    reader = StreamReader(stream, where)
    header, ending = read_header(reader), Ending()
    kinds = {kind.name.lower(): {"frames": 0, "raw_bytes": 0, "bytes": 0} for kind in Kind}
    size = HEADER_BYTES
    for frame in read_frames(reader, ending):
        row = kinds[frame.kind.name.lower()]
        coded = len(frame.pack())
        size += coded
        row["frames"] += 1
        row["raw_bytes"] += frame.raw
        row["bytes"] += coded
    size += len(pack_end(ending.total, ending.digest))
    return {
        "path": where,
        "bytes": size,
        "version": VERSION,
        "content": header.content.name.lower(),
        "model_sha256_start": header.model.hex(),
        "tolerance": header.tolerance,
        "seq_len": header.seq_len,
        "stride": header.stride,
        "raw_bytes": ending.total,
        "raw_sha256_start": ending.digest.hex(),
        "frames": {name: row for name, row in kinds.items() if row["frames"]},
    }
