"""The tokenizer as the artifact carries it. First byte: 0 = the model file under lzma, 1 = a model of our own, coded,
2 = one of our own with case operators.

A model of our own is two lists of pieces (see `sp_model.own_pieces`): single characters, coded as gaps between code
points, and merges. A merge is the concatenation of two earlier pieces and is coded as that pair. The order of merges
within a bucket carries no information worth its bytes: `canonical` sorts each bucket (an eighth of the vocabulary so
far) when the tokenizer is made, and a sorted bucket is coded as how often each piece is the left half, then the right
halves. That saves the logarithm of (bucket size)! bits: 1.3 to 1.5 bytes a piece instead of 1.8 to 2.4 (3 for lzma).
"""

from __future__ import annotations

import lzma
from collections.abc import Sequence

from paramgolf.data.caseops import OPERATORS
from paramgolf.data.range_coder import Bit, Decoder, Encoder, Frequencies, Number
from paramgolf.data.sp_model import MAX_PIECES, NORMAL, build, own_pieces, parse
from paramgolf.errors import GolfError

MAX_MODEL_BYTES = 1 << 26
_FILTERS = [
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 22, "lc": 3, "lp": 0, "pb": 0}
]
_MAX_PIECE = 256  # characters
_MAX_STEPS = 1 << 22  # of all buckets; 65,536 pieces in canonical order take a sixth
_BUCKET_SHARE, _BUCKET_LEAST = 8, 16
_OWN = {b"\1": "", b"\2": OPERATORS}  # first byte -> user-defined symbols of a model of our own
_ADD, _NEW = 4, 1  # frequency of a right half: 4 for each use, 1 before the first

Pair = tuple[int, int]


class _Damaged(ValueError):
    pass


def pack(model: bytes) -> bytes:
    """The smallest form of a model file that `unpack` turns back into the same bytes."""
    pieces = [piece.text for piece in parse(model).pieces if piece.kind == NORMAL]
    merges, chars = [p for p in pieces if len(p) > 1], [p for p in pieces if len(p) == 1]
    for kind, symbols in _OWN.items():
        if chars == sorted(chars) and build(own_pieces(merges, chars, symbols)) == model:
            coded = _Coder(chars, len(merges)).encode(merges)
            if coded is not None and unpack(kind + coded) == model:
                return kind + coded
    return plain(model)


def plain(model: bytes) -> bytes:
    """The form that any model file has."""
    return b"\0" + lzma.compress(model, lzma.FORMAT_RAW, filters=_FILTERS)


def unpack(data: bytes) -> bytes:
    """The model file; GolfError for damaged input."""
    try:
        if data[:1] == b"\0":
            model = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS).decompress(data[1:], MAX_MODEL_BYTES)
            if model:
                return model
        if data[:1] in _OWN:
            return build(own_pieces(*_decode(data[1:]), _OWN[data[:1]]))
    except (lzma.LZMAError, EOFError, _Damaged):
        pass
    raise GolfError("the tokenizer in the artifact is damaged; make the artifact again")


def canonical(merges: Sequence[str], chars: Sequence[str]) -> list[str]:
    """`merges` in nearly the same order, each bucket sorted so that it codes small.

    Within a bucket the priorities are close, and the tokenizer is used in this order from the start: its tokens hold
    0 to 0.2 % fewer bytes (measured, 1,024 and 8,192 pieces). A merge whose parts are in the bucket waits for the next.
    """
    state = _Halves(chars)
    rest = list(merges)
    out: list[str] = []
    while rest:
        size = max(_BUCKET_LEAST, len(state.index) // _BUCKET_SHARE)
        pairs = [state.split(text) for text in rest[:size]]
        bucket = sorted(pair for pair in pairs if pair)
        waiting = [text for text, pair in zip(rest, pairs, strict=False) if not pair]
        if not bucket:  # pieces that are no merge of others; `pack` will fall back
            return out + rest
        out += [state.text[left] + state.text[right] for left, right in bucket]
        state.add(bucket)
        rest = waiting + rest[size:]
    return out


class _Halves:
    """The pieces so far and how often each was the left and the right half of a merge."""

    def __init__(self, chars: Sequence[str]) -> None:
        self.text = list(chars)
        self.index = {text: i for i, text in enumerate(self.text)}
        self.left, self.right = [0] * len(self.text), [0] * len(self.text)

    def split(self, text: str) -> Pair | None:
        """The pair of known pieces that makes `text`, the most used one; None if there is none."""
        best, most = None, -1
        for cut in range(1, len(text)):
            left, right = self.index.get(text[:cut]), self.index.get(text[cut:])
            if left is not None and right is not None:
                score = (3 * self.left[left] + 1) * (3 * self.right[right] + 1)
                if score > most:
                    best, most = (left, right), score
        return best

    def add(self, bucket: Sequence[Pair]) -> None:
        for left, right in bucket:
            self.left[left] += 1
            self.right[right] += 1
            self.index.setdefault(self.text[left] + self.text[right], len(self.text))
            self.text.append(self.text[left] + self.text[right])
            self.left.append(0)
            self.right.append(0)


class _Coder:
    """What encoder and decoder share: the adaptive model of buckets."""

    def __init__(self, chars: Sequence[str], merges: int) -> None:
        self.chars = chars
        self.halves = _Halves(chars)
        self.rights = Frequencies(len(chars) + merges, [_NEW] * len(chars))
        self._more: dict[tuple[int, int], Bit] = {}
        self._steps = 0

    def room(self) -> bool:
        """Whether another bucket may follow. Each takes a step for every piece so far: buckets of one merge would make
        that the square of the vocabulary."""
        self._steps += len(self.halves.text)
        return self._steps <= _MAX_STEPS

    def more(self, piece: int, so_far: int) -> Bit:
        """Whether `piece` is the left half of another merge of this bucket."""
        return self._more.setdefault((min(self.halves.left[piece].bit_length(), 9), min(so_far, 4)), Bit())

    def add(self, bucket: Sequence[Pair]) -> None:
        self.halves.add(bucket)
        for _, right in bucket:
            self.rights.add(right, _ADD)
            self.rights.append(_NEW)

    def encode(self, merges: Sequence[str]) -> bytes | None:
        """The coded model; None if some piece is no concatenation of two earlier ones, or the order is too wild."""
        coder, number = Encoder(), Number()
        number.write(coder, len(merges))
        number.write(coder, len(self.chars))
        gaps, last = Number(), -1
        for char in self.chars:
            gaps.write(coder, ord(char) - last - 1)
            last = ord(char)
        done = 0
        while done < len(merges):
            bucket = self._next_bucket(merges, done)
            if not bucket or not self.room():
                return None
            self._encode_bucket(coder, bucket)
            self.add(bucket)
            done += len(bucket)
        return coder.finish()

    def _next_bucket(self, merges: Sequence[str], start: int) -> list[Pair]:
        """The longest sorted run of merges whose parts are known."""
        bucket: list[Pair] = []
        for text in merges[start:]:
            pair = self.halves.split(text)
            if pair is None or (bucket and pair < bucket[-1]):
                break
            bucket.append(pair)
        return bucket

    def _encode_bucket(self, coder: Encoder, bucket: Sequence[Pair]) -> None:
        at = 0
        for left in range(len(self.halves.text)):
            count = 0
            while at < len(bucket) and bucket[at][0] == left:
                self.more(left, count).write(coder, True)
                self.rights.write(coder, bucket[at][1])
                at, count = at + 1, count + 1
            self.more(left, count).write(coder, False)


def _decode(data: bytes) -> tuple[list[str], list[str]]:
    """(merges, chars) of a coded model."""
    coder, number = Decoder(data), Number()
    count, letters = number.read(coder), number.read(coder)
    if count + letters > MAX_PIECES - 260:
        raise _Damaged
    gaps, last, chars = Number(), -1, []
    for _ in range(letters):
        last += gaps.read(coder) + 1
        if last > 0x10FFFF or 0xD800 <= last < 0xE000:
            raise _Damaged
        chars.append(chr(last))
    state = _Coder(chars, count)
    while len(state.halves.text) < letters + count:
        if not state.room():
            raise _Damaged
        bucket = _decode_bucket(coder, state, letters + count - len(state.halves.text))
        if not bucket or max(len(state.halves.text[a]) + len(state.halves.text[b]) for a, b in bucket) > _MAX_PIECE:
            raise _Damaged
        state.add(bucket)
    return state.halves.text[letters:], chars


def _decode_bucket(coder: Decoder, state: _Coder, room: int) -> list[Pair]:
    bucket: list[Pair] = []
    for left in range(len(state.halves.text)):
        count = 0
        while state.more(left, count).read(coder):
            bucket.append((left, state.rights.read(coder)))
            count += 1
            if len(bucket) > room:
                raise _Damaged
    return bucket
