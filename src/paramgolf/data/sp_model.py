"""Reading and writing the SentencePiece model file: a protobuf of which we need a dozen fields.

Written by hand because the protobuf package is not a dependency. Field numbers are those of the public
`sentencepiece_model.proto` (google/sentencepiece).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from paramgolf.errors import GolfError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE = 2
MAX_PIECES = 65_536  # a token takes two bytes in a shard
SPACE = "\u2581"  # SentencePiece writes a blank as this character

_NOT_A_MODEL = "not a SentencePiece model (.model file); give one made by SentencePiece or leave data.tokenizer empty"


@dataclass(frozen=True)
class Piece:
    """One vocabulary entry: its text (blanks as U+2581), its BPE priority (higher merges first) and its kind."""

    text: str
    score: float = 0.0
    kind: int = NORMAL


@dataclass(frozen=True)
class SpModel:
    """The parts of a SentencePiece model that decide how it encodes."""

    pieces: list[Piece]
    model_type: int = BPE
    byte_fallback: bool = True
    whitespace_suffix: bool = False
    charsmap: bytes = b""
    dummy_prefix: bool = True
    squeeze_blanks: bool = True
    escape_blanks: bool = True
    ids: dict[str, int] = field(default_factory=dict)  # unk, bos, eos, pad


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, value: int | float | bytes | str) -> bytes:
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(int(value))
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise GolfError(_NOT_A_MODEL)
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _read_varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _read_varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise GolfError(_NOT_A_MODEL)
        if at + size > len(data):
            raise GolfError(_NOT_A_MODEL)
        raw = bytes(data[at : at + size])
        at += size
        yield number, struct.unpack("<f", raw)[0] if wire == 5 else raw


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _parse_piece(data: bytes) -> Piece:
    text, score, kind = b"", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value
        elif number == 2 and isinstance(value, float):
            score = value
        elif number == 3 and isinstance(value, int):
            kind = value
    try:
        return Piece(text.decode("utf-8"), score, kind)
    except UnicodeDecodeError as error:
        raise GolfError(_NOT_A_MODEL) from error


def parse(data: bytes) -> SpModel:
    """The model in `data`; GolfError if it is none or does not fit in uint16 ids."""
    pieces: list[Piece] = []
    trainer: dict[int, int | float | bytes] = {}
    normalizer: dict[int, int | float | bytes] = {}
    for number, value in _fields(data):
        if isinstance(value, bytes):
            if number == 1:
                if len(pieces) == MAX_PIECES:
                    raise GolfError(f"tokenizer has more than {MAX_PIECES} pieces, the most that a shard can hold")
                pieces.append(_parse_piece(value))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
    if not pieces:
        raise GolfError(_NOT_A_MODEL)

    def number_of(table: dict[int, int | float | bytes], key: int, default: int) -> int:
        value = table.get(key, default)
        return _signed(value) if isinstance(value, int) else default

    charsmap = normalizer.get(2, b"")
    return SpModel(
        pieces=pieces,
        model_type=number_of(trainer, 3, 1),
        byte_fallback=bool(number_of(trainer, 35, 0)),
        whitespace_suffix=bool(number_of(trainer, 24, 0)),
        charsmap=charsmap if isinstance(charsmap, bytes) else b"",
        dummy_prefix=bool(number_of(normalizer, 3, 1)),
        squeeze_blanks=bool(number_of(normalizer, 4, 1)),
        escape_blanks=bool(number_of(normalizer, 5, 1)),
        ids={
            "unk": number_of(trainer, 40, 0),
            "bos": number_of(trainer, 41, 1),
            "eos": number_of(trainer, 42, 2),
            "pad": number_of(trainer, 43, -1),
        },
    )


def build(pieces: list[Piece]) -> bytes:
    """A BPE model that changes nothing in the text: identity normaliser, byte fallback, no dummy prefix.

    Ids pad 0, bos 1, eos 2, unk 3. Equal pieces give equal bytes.
    """
    out = bytearray()
    for piece in pieces:
        body = _field(1, piece.text) + _field(2, float(piece.score))
        if piece.kind != NORMAL:
            body += _field(3, piece.kind)
        out += _field(1, body)
    trainer = _field(3, BPE) + _field(4, len(pieces)) + _field(35, 1)
    trainer += _field(40, 3) + _field(41, 1) + _field(42, 2) + _field(43, 0)
    normalizer = _field(1, "identity") + _field(3, 0) + _field(4, 0) + _field(5, 1)
    return bytes(out + _field(2, trainer) + _field(3, normalizer))


def own_pieces(merges: list[str], chars: list[str], symbols: Iterable[str] = ()) -> list[Piece]:
    """The vocabulary of our own models: 4 controls, user-defined `symbols`, 256 bytes, merges in priority order, then
    single characters."""
    pieces = [Piece("<pad>", 0.0, CONTROL), Piece("<s>", 0.0, CONTROL), Piece("</s>", 0.0, CONTROL)]
    pieces += [Piece("<unk>", 0.0, UNKNOWN)] + [Piece(symbol, 0.0, USER_DEFINED) for symbol in symbols]
    pieces += [Piece(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    pieces += [Piece(text, -float(rank)) for rank, text in enumerate([*merges, *chars])]
    return pieces
