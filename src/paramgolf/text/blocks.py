"""One block of bytes to a frame and back: by the model where that is smallest, else by a generic codec.

The model's arithmetic is float32 without TF32, on whatever device; see docs/coder.md for what encoder and decoder may
differ in.
"""

from __future__ import annotations

import contextlib
import itertools
import lzma
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import zstandard

from paramgolf.api import LanguageModel, load
from paramgolf.data.sources import SEPARATOR
from paramgolf.data.tokenizer import Tokenizer
from paramgolf.errors import CheckFailed, GolfError
from paramgolf.pack.wire import Reader, varint
from paramgolf.recipe.sections import TttSection
from paramgolf.score import coder
from paramgolf.score.scorer import score
from paramgolf.score.stream import decode_stream, encode_stream
from paramgolf.text.adapted import decode_adapted, encode_adapted
from paramgolf.text.format import ID_BYTES, MAX_WINDOW, Content, Frame, Header, Kind
from paramgolf.text.pieces import MAX_LANES, even_places, place_to_cut

TOLERANCE = 1e-4  # log-odds; a few times what thread counts, batch shapes and devices were seen to change
LANE_BYTES, LEAST_LANE = 16384, 4096  # each lane costs 2 bytes
CACHE_BYTES = 1 << 30  # of the decoder, for the keys and values of all lanes
_SETTLED = 0.03  # a block that zstd shrinks to less is not worth another try
_SAMPLES, _SAMPLE_BYTES = 4, 4096
_LZMA: list[dict[str, int]] = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
_CONTROLS = bytes({*range(32)} - {*b"\t\n\v\f\r\x1b\x1e"})
_BROKEN = re.compile("[\udc80-\udcff]")
Progress = Callable[[int, int], None]


class TextModel:
    """A language model as a coder of text. `seq_len` and `stride` are those of the windows."""

    def __init__(self, path: str | Path, *, device: str = "auto") -> None:
        language_model = load(path, device=device)
        self.path, self.tokenizer = Path(path), language_model.tokenizer
        self.model, self.seq_len = language_model.model, language_model.seq_len
        self.sha256, self.lanes_of_score = language_model.sha256, language_model.lanes
        self.ngram = language_model.ngram
        self.dtype = str(self.model.compute_dtype).removeprefix("torch.")
        self.model.compute_dtype = torch.float32
        self.batch_tokens = _batch_tokens(language_model)

    @property
    def id(self) -> bytes:
        return bytes.fromhex(self.sha256)[:ID_BYTES]

    def header(self, content: Content, tolerance: float = TOLERANCE, stride: int = 0) -> Header:
        """Raises GolfError for a stride outside 1..seq_len (0 = seq_len)."""
        if not 0 <= stride <= self.seq_len <= MAX_WINDOW:
            raise GolfError(f"--stride {stride} is not between 1 and the window length, {self.seq_len}")
        return Header(content, self.id, float(np.float32(tolerance)), self.seq_len, stride or self.seq_len)

    def check(self, header: Header, where: str) -> None:
        """GolfError unless the file was made with this model, and so in its windows."""
        if header.model != self.id:
            raise GolfError(
                f"{where} was made with model {header.model.hex()[:16]}..., you gave {self.path} which is "
                f"{self.sha256[:16]}...; give the model.golf with that SHA-256 by -m"
            )
        if header.seq_len != self.seq_len:
            raise GolfError(
                f"{where} has windows of {header.seq_len} tokens, its model has {self.seq_len}; the file is damaged: "
                "get it again"
            )

    def lane_limit(self, seq_len: int) -> int:
        """Lanes that fit in the decoder's memory."""
        section = self.model.section
        width = section.dim // section.num_heads * section.num_kv_heads
        return CACHE_BYTES // (8 * len(self.model.order.layers) * seq_len * width)

    def lanes(self, size: int) -> int:
        """Lanes to cut `size` bytes into."""
        count = max(size // LANE_BYTES, min(8, size // LEAST_LANE))
        return max(1, min(MAX_LANES, self.lane_limit(self.seq_len), count))

    def encode(
        self, header: Header, tokens: np.ndarray, lane_starts: tuple[int, ...], progress: Progress | None = None
    ) -> bytes:
        """A token stream whose lanes begin with the begin-of-document token."""
        with exact_arithmetic():
            return encode_stream(
                self.model, tokens, seq_len=header.seq_len, stride=header.stride, lane_starts=lane_starts,
                tolerance=header.tolerance, batch_tokens=self.batch_tokens, ngram=self.ngram.levels,
                bos_id=self.tokenizer.bos_id, progress=progress,
            )  # fmt: skip

    def decode(self, header: Header, data: bytes, limit: int, progress: Progress | None = None) -> list[np.ndarray]:
        """The lanes of `encode`, at most `limit` tokens in all."""
        lengths = coder.Decoder(data).lengths
        lanes = max(1, min(MAX_LANES, self.lane_limit(header.seq_len)))  # what every writer keeps to
        if sum(lengths.tolist()) > limit or len(lengths) > lanes:
            raise GolfError("a frame of impossible size; the file is damaged: get it again")
        with exact_arithmetic():
            return decode_stream(
                self.model, data, first_token=self.tokenizer.bos_id, seq_len=header.seq_len, stride=header.stride,
                ngram=self.ngram.levels, progress=progress,
            )  # fmt: skip

    def text(self, content: Content, lanes: list[np.ndarray], joined: Sequence[bool]) -> bytes:
        """What the tokens of the lanes stand for, in the form of `content`; no document begins with a `joined` lane."""
        if content is Content.TOKENS:
            return np.concatenate(lanes).astype("<u2").tobytes()
        between = SEPARATOR if content is Content.DOCUMENTS else b""
        return b"".join((b"" if j else between) + self._lane_text(t) for t, j in zip(lanes, joined, strict=True))

    def _lane_text(self, tokens: np.ndarray) -> bytes:
        cuts = np.flatnonzero(tokens == self.tokenizer.bos_id)[1:]
        documents = np.split(tokens, cuts)  # each with its begin-of-document token, which decodes to nothing
        return SEPARATOR.join(self.tokenizer.decode(document[1:].tolist()) for document in documents)

    def bits_of_sample(self, raw: bytes) -> float:
        """Bits a byte that the model needs for a few pieces of the block."""
        step = max(_SAMPLE_BYTES, (len(raw) - _SAMPLE_BYTES) // _SAMPLES)
        pieces = [raw[at : at + _SAMPLE_BYTES] for at in range(0, max(1, len(raw) - _SAMPLE_BYTES // 2), step)]
        tokens = self.tokenizer.encode_documents(pieces)
        if len(tokens) < 2:
            return math.inf
        with exact_arithmetic():
            scored = score(
                self.model, tokens, token_bytes=self.tokenizer.token_bytes, true_bytes=sum(map(len, pieces)),
                seq_len=self.seq_len, batch_tokens=self.batch_tokens, bos_id=self.tokenizer.bos_id, ngram=self.ngram,
            )  # fmt: skip
        return scored.val_bpb if scored.val_bpb_ngram is None else scored.val_bpb_ngram


def _batch_tokens(model: LanguageModel) -> int:
    return 131_072 if model.model.tok_emb.weight.is_cuda else 16_384


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Inside: float32 products are float32 products, on a GPU too."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def encode_block(raw: bytes, header: Header, model: TextModel, progress: Progress | None = None) -> Frame:
    """The smallest frame for a block of a file."""
    quick = zstandard.ZstdCompressor(level=3).compress(raw)
    best, kind = (quick, Kind.ZSTD) if len(quick) < len(raw) else (raw, Kind.RAW)
    if len(best) > _SETTLED * len(raw):
        packed = lzma.compress(raw, format=lzma.FORMAT_RAW, filters=_LZMA)
        if len(packed) < len(best):
            best, kind = packed, Kind.LZMA
        # Near the end of a choice the model is tried anyway: a sample says it only within some percent.
        if is_text(raw) and model.bits_of_sample(raw) * len(raw) / 8 < 1.1 * len(best):
            payload, patched = _by_model(raw, header, model, progress)
            if len(payload) < len(best):
                best, kind = payload, Kind.PATCHED if patched else Kind.MODEL
    return Frame(kind, len(raw), zlib.crc32(raw), best)


def is_text(raw: bytes) -> bool:
    """Whether a model of text could be better: few control characters and little that is not UTF-8."""
    head = raw[:65536]
    controls = len(head) - len(head.translate(None, _CONTROLS))
    wrong = controls + len(_BROKEN.findall(head.decode("utf-8", "surrogateescape")))
    return wrong <= 0.1 * len(head)


def _by_model(raw: bytes, header: Header, model: TextModel, progress: Progress | None) -> tuple[bytes, bool]:
    pieces = cut_evenly(raw, model.lanes(len(raw)), model.tokenizer)
    lanes = [model.tokenizer.encode_documents(piece.split(SEPARATOR)) for piece in pieces]
    starts = tuple(int(s) for s in np.cumsum([0, *map(len, lanes)])[:-1])
    return encode_lanes(raw, header, model, np.concatenate(lanes), starts, progress=progress)


def encode_lanes(
    raw: bytes,
    header: Header,
    model: TextModel,
    tokens: np.ndarray,
    starts: tuple[int, ...],
    joined: tuple[bool, ...] = (),
    progress: Progress | None = None,
) -> tuple[bytes, bool]:
    """(payload, whether it ends in a patch) of `raw`, whose tokens are given with the starts of their lanes; `joined`
    (of documents) as for `TextModel.text`, () = none."""
    joined = joined or (False,) * len(starts)
    stream = model.encode(header, tokens, starts, progress)
    head = _pack_joined(joined) if header.content is Content.DOCUMENTS else b""
    said = model.text(header.content, np.split(tokens, starts[1:]), joined)
    if said == raw:
        return head + stream, False
    return head + varint(len(stream)) + stream + _patch(said).compress(raw), True


def _pack_joined(joined: Sequence[bool]) -> bytes:
    """A varint length and a bit for each lane, least significant first, without bytes of zeros at the end."""
    bits = np.packbits(np.array(joined, bool), bitorder="little").tobytes().rstrip(b"\0")
    return varint(len(bits)) + bits


def _patch(said: bytes) -> zstandard.ZstdCompressor:
    """A compressor of what resembles `said`."""
    level = 19 if len(said) < 1 << 22 else 3
    wide = max(10, min(27, (2 * len(said) + 1024).bit_length()))
    settings = zstandard.ZstdCompressionParameters.from_level(
        level, window_log=wide, enable_ldm=len(said) > 1 << 20, write_content_size=False
    )
    return zstandard.ZstdCompressor(dict_data=_as_dictionary(said), compression_params=settings)


def _as_dictionary(said: bytes) -> zstandard.ZstdCompressionDict:
    # Fewer than 8 bytes are no dictionary for the library.
    return zstandard.ZstdCompressionDict(said.ljust(8, b" "), dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def cut_evenly(raw: bytes, count: int, tokenizer: Tokenizer) -> list[bytes]:
    """`raw` in about `count` parts of about equally many tokens, cut after a blank or line end where one is near."""
    places = even_places(raw, count, tokenizer)
    edges = sorted({0, len(raw), *(min(place_to_cut(raw, place), len(raw)) for place in places)})
    return [raw[a:b] for a, b in itertools.pairwise(edges)]


def decode_frame(frame: Frame, header: Header, model: TextModel | None, progress: Progress | None = None) -> bytes:
    """The frame's content, checked. GolfError for damage; `model` is not needed for the generic codecs."""
    try:
        raw = _decode(frame, header, model, progress)
    except CheckFailed as error:
        raise GolfError(str(error)) from error
    except (zstandard.ZstdError, lzma.LZMAError, EOFError) as error:
        raise GolfError(f"a frame cannot be unpacked ({error}); the file is damaged: get it again") from error
    if len(raw) != frame.raw or zlib.crc32(raw) != frame.crc:
        raise GolfError("a frame does not match its checksum; the file is damaged: get it again")
    return raw


def _decode(frame: Frame, header: Header, model: TextModel | None, progress: Progress | None) -> bytes:
    if frame.kind is Kind.RAW:
        return frame.payload
    if frame.kind is Kind.ZSTD:
        return _unzstd(frame.payload, frame.raw, None)
    if frame.kind is Kind.LZMA:
        return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_LZMA).decompress(frame.payload, frame.raw + 1)
    assert model is not None
    # A token stands for a byte or more, but for case operators and for a tokenizer that rewrites text.
    most = (2 if model.tokenizer.case_operators else 1) if model.tokenizer.reversible else 8
    limit = frame.raw * most + 64
    if frame.kind is Kind.ADAPTED:
        return _decode_adapted(frame, header, model, limit, progress)
    reader, bits = Reader(frame.payload, "a frame"), b""
    if header.content is Content.DOCUMENTS:
        bits = reader.take(reader.varint(MAX_LANES))
    stream = reader.take(reader.varint(len(reader)) if frame.kind is Kind.PATCHED else len(reader))
    patch = reader.take(len(reader))
    lanes = model.decode(header, stream, limit, progress)
    joined = [i < 8 * len(bits) and bool(bits[i // 8] >> i % 8 & 1) for i in range(len(lanes))]
    said = model.text(header.content, lanes, joined)
    return _unzstd(patch, frame.raw, said) if frame.kind is Kind.PATCHED else said


def encode_adapted_frame(
    raw: bytes, header: Header, model: TextModel, tokens: np.ndarray, section: TttSection, progress: Progress | None
) -> tuple[Frame, float]:
    """(the frame of `raw`, which is `tokens` in one lane, by the model learning on the way; the bits of its score)."""
    with exact_arithmetic():
        stream, bits = encode_adapted(
            model.model, tokens, section, seq_len=header.seq_len, tolerance=header.tolerance,
            bos_id=model.tokenizer.bos_id, progress=progress,
        )  # fmt: skip
    said = model.text(header.content, [tokens], [True])
    patch = b"" if said == raw else _patch(said).compress(raw)
    return Frame(Kind.ADAPTED, len(raw), zlib.crc32(raw), varint(len(stream)) + stream + patch), bits


def _decode_adapted(frame: Frame, header: Header, model: TextModel, limit: int, progress: Progress | None) -> bytes:
    reader = Reader(frame.payload, "a frame")
    stream = reader.take(reader.varint(len(reader)))
    patch = reader.take(len(reader))
    with exact_arithmetic():
        tokens = decode_adapted(
            model.model, stream, seq_len=header.seq_len, bos_id=model.tokenizer.bos_id, limit=limit, progress=progress
        )
    said = model.text(header.content, [tokens], [True])
    return _unzstd(patch, frame.raw, said) if patch else said


def _unzstd(packed: bytes, size: int, said: bytes | None) -> bytes:
    """At most `size` + 1 bytes, whatever the frame claims."""
    dictionary = None if said is None else _as_dictionary(said)
    unpacker = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=1 << 27)
    with unpacker.stream_reader(packed) as stream:
        parts, missing = [], size + 1
        while missing and (part := stream.read(min(missing, 1 << 20))):
            parts.append(part)
            missing -= len(part)
    return b"".join(parts)
