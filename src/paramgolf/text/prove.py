"""A score that is a file: documents coded with a model, decoded by another process, compared, and the file measured.

If the documents come back from a file of n bytes, the score is 8 n / bytes, and the model needed nothing but the text
before each token, gave probabilities that sum to one, and read the text once: otherwise it could not be decoded.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zstandard

from paramgolf.data.encode_pool import child_environment
from paramgolf.data.sources import SEPARATOR, spool_stdin
from paramgolf.errors import CheckFailed, GolfError
from paramgolf.files import atomic_path, sha256_file
from paramgolf.pack.container import read_artifact
from paramgolf.recipe.sections import TttSection
from paramgolf.score.scorer import score
from paramgolf.score.ttt.settings import check_used, chosen, settings_of
from paramgolf.text import format as form
from paramgolf.text import pieces as cut
from paramgolf.text.adapted import check_codable
from paramgolf.text.blocks import TOLERANCE, TextModel, encode_adapted_frame, encode_lanes, exact_arithmetic
from paramgolf.text.format import MAX_RAW, Content, Frame, Header, Kind
from paramgolf.text.peers import PEER_TEXT_LIMIT, compress_peers
from paramgolf.text.pieces import Corpus, Piece, TokenFile
from paramgolf.text.stream import one_thread

DIGEST_BYTES = 32
LANE_TOKENS, LEAST_LANE_TOKENS = 16_384, 2048  # of a token stream for which nobody says how many lanes
_PROGRESS_SECONDS = 5.0
Say = Callable[[str], None]


def prove(
    artifact: Path,
    source: str,
    *,
    limit: int = 0,
    stride: int = 0,
    lanes: int | None = None,
    tolerance: float = TOLERANCE,
    ttt: TttSection | None = None,
    out: Path | None = None,
    say: Say,
) -> dict[str, Any]:
    """The proof of `source` (as `golf score --data` takes it) or of its first `limit` bytes, as JSON-able facts.

    `lanes`: how many the scorer's plan cuts the whole stream into at document starts; 0 = many, of equal size, inside
    long documents too; None = the artifact's `score.lanes` if that is more than one, else 0. `out` keeps the file.
    `ttt`: the model learns on the way, in encoder and decoder alike, document for document in one frame.
    Raises CheckFailed if a document does not come back; GolfError if there is nothing to prove.
    """
    if out is not None and out.exists():
        raise GolfError(f"{out} exists; remove it or choose another name with --out")
    if ttt is not None:
        check_codable(ttt)
        lanes = 1
    model = TextModel(artifact, device="auto" if ttt is None else "cpu")
    with tempfile.TemporaryDirectory(prefix="golf-prove-") as folder:
        work = Work(Path(folder), model, _corpus(source, model, Path(folder)), limit)
        header = model.header(work.content, tolerance, stride)
        wanted = lanes if lanes is not None else (model.lanes_of_score if model.lanes_of_score > 1 else 0)
        say(f"scoring and encoding with {artifact}")
        with work.file.open("wb") as target:
            text = work.text if work.content is Content.DOCUMENTS else None
            tally = encode_proof(work.pieces(wanted), model, header, target, text, say, ttt)
        size = work.file.stat().st_size
        say(f"decoding {size:,} bytes in another process")
        back = decode_elsewhere(artifact, work.file, work.folder("there"))
        count = compare(work.expected(), Path(back["digests"]))
        facts = tally.facts(size, model, header) | {
            "content": work.content.name.lower(),
            "ttt": ttt.kind if ttt is not None else None,
            "documents": count if work.content is Content.DOCUMENTS else None,
            "data": source,
            "limit": limit,
            "text_sha256": back["sha256"],
            "text_file_sha256": tally.as_file(count),
            "file_sha256": sha256_file(work.file),
            "decode_bytes_per_second": tally.size / max(back["seconds"], 1e-9),
        }
        if work.content is Content.DOCUMENTS and tally.raw <= PEER_TEXT_LIMIT:
            say("the same text under other compressors")
            with work.text.open("ab") as text_file:
                text_file.write(tally.end_of_file(count))
            facts["peers"] = compress_peers(work.text, tally.size)
        if out is not None:
            with atomic_path(out) as temporary:
                shutil.copyfile(work.file, temporary)
    return facts


def ttt_section(artifact: Path, words: Sequence[str], ttt: bool) -> TttSection | None:
    """How the artifact learns while it is scored, with `words` like "ttt.lr=0.01" applied; None if it is not to.
    GolfError for a word that would change nothing: a proof has no tilt."""
    for word in words:
        if not word.strip().startswith("ttt."):
            raise GolfError(f"--set {word}: only ttt.* can be set for a proof; leave it out")
    check_used(words, ttt)
    if not ttt:
        return None
    section, _ = settings_of(read_artifact(artifact).manifest, words)
    return chosen(section, True)


def _corpus(source: str, model: TextModel, folder: Path) -> Corpus:
    """`source` opened; standard input is kept in `folder`, because a proof reads its documents twice."""
    if source == "-":
        source = str(spool_stdin(folder).path)
    return cut.open_corpus(source, model.tokenizer)


class Work:
    """The files of one proof in the making, in a folder of its own, and the text as it is to be proved."""

    def __init__(self, root: Path, model: TextModel, corpus: Corpus, limit: int) -> None:
        self._root, self._model, self._corpus, self._limit = root, model, corpus, limit
        self.content = Content.TOKENS if corpus.documents is None else Content.DOCUMENTS
        self.file, self.text = root / "proof.gtx", root / "text"

    def folder(self, name: str) -> Path:
        path = self._root / name
        path.mkdir()
        return path

    def pieces(self, lanes: int) -> Iterator[Piece]:
        """The frames of the proof; `lanes` as for `prove`, 0 = by size."""
        tokenizer = self._model.tokenizer
        most = max(1, self._model.lane_limit(self._model.seq_len))
        if self.content is Content.DOCUMENTS and not lanes:
            return cut.even_pieces(self._parts(), tokenizer, most)
        chunks: Iterator[np.ndarray]
        if self.content is Content.DOCUMENTS:
            chunks = (tokenizer.encode_documents([document]) for document in cut.whole(self._parts()))
        else:
            chunks = cut.shard_tokens(self._corpus, tokenizer, self._limit)
        tokens = TokenFile(self._root / "tokens").fill(chunks, tokenizer.bos_id)
        if tokens.count < 2 or tokens.documents[:1] != [0]:
            raise GolfError("the tokens do not begin with a document start; such a stream cannot be proved")
        if not lanes:
            most = min(most, cut.FRAME_LANES)
            lanes = max(1, tokens.count // LANE_TOKENS, min(most, tokens.count // LEAST_LANE_TOKENS))
        texts = self._parts() if self.content is Content.DOCUMENTS else None
        return cut.planned_pieces(tokens, lanes, most, texts, self._corpus.sizes)

    def _parts(self) -> Iterator[cut.Part]:
        assert self._corpus.documents is not None
        return cut.parts_of(self._corpus.documents(), self._limit)

    def expected(self) -> Path:
        """SHA-256 of each document, read anew from the source; of the whole stream if it is one of tokens."""
        path = self._root / "expected"
        with path.open("wb") as stream:
            if self.content is Content.TOKENS:
                stream.write(bytes.fromhex(sha256_file(self._root / "tokens")))
            else:
                for document in _digests(self._parts()):
                    stream.write(document)
        return path


def _digests(parts: Iterable[cut.Part]) -> Iterator[bytes]:
    digest = None
    for part in parts:
        if digest is not None and not part.joined:
            yield digest.digest()
            digest = None
        digest = digest or hashlib.sha256()
        digest.update(part.data)
    if digest is not None:
        yield digest.digest()


@dataclass
class Tally:
    """What was scored and encoded so far: bits by the scorer, bytes of the documents (`size`), content of the frames
    (`raw`), its hash and last byte, tokens, lanes, patched frames, seconds."""

    bits: float = 0.0
    size: int = 0
    raw: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    last: bytes = b""
    tokens: int = 0
    lanes: int = 0
    patched: int = 0
    score_seconds: float = 0.0
    encode_seconds: float = 0.0
    from_table: bool = False

    def end_of_file(self, documents: int) -> bytes:
        """What the validation file of a prepared dataset has behind its documents."""
        return b"\n" if documents > 1 and self.last != SEPARATOR[:1] else b""

    def as_file(self, documents: int) -> str:
        """SHA-256 of the documents as the validation file of a prepared dataset would hold them."""
        digest = self.digest.copy()
        digest.update(self.end_of_file(documents))
        return str(digest.hexdigest())

    def facts(self, file_bytes: int, model: TextModel, header: Header) -> dict[str, Any]:
        """The part of a result that is known before anything is decoded."""
        if self.size <= 0 or self.bits <= 0:
            raise GolfError("nothing to prove: the text has no tokens that stand for bytes")
        return {
            "proved_bpb": 8 * file_bytes / self.size,
            "val_bpb_same_windows": self.bits / self.size,
            "overhead": 8 * file_bytes / self.bits - 1,
            "file_bytes": file_bytes,
            "text_bytes": self.size,
            "bytes_from": "table" if self.from_table else "documents",
            "tokens": self.tokens,
            "lanes": self.lanes,
            "patched_frames": self.patched,
            "seq_len": header.seq_len,
            "stride": header.stride,
            "tolerance": header.tolerance,
            "model_sha256": model.sha256,
            "model_bytes": model.path.stat().st_size,
            "score_bytes_per_second": self.size / max(self.score_seconds, 1e-9),
            "encode_bytes_per_second": self.size / max(self.encode_seconds, 1e-9),
        }


def encode_proof(
    pieces: Iterable[Piece],
    model: TextModel,
    header: Header,
    target: BinaryIO,
    text: Path | None,
    say: Say,
    ttt: TttSection | None = None,
) -> Tally:
    """Score every piece, write it as a frame of the file in `target`; the first PEER_TEXT_LIMIT bytes of content go to
    `text`."""
    tally, spoken = Tally(), time.monotonic()
    target.write(header.pack())
    with contextlib.ExitStack() as held:
        copy = held.enter_context(text.open("wb")) if text is not None else None
        for piece in pieces:
            if ttt is not None:
                frame = _adapted(piece, model, header, ttt, tally)
            else:
                _score_piece(piece, model, header, tally)
                began = time.monotonic()
                frame = _frame(piece, model, header)
                tally.encode_seconds += time.monotonic() - began
            target.write(frame.pack())
            tally.digest.update(piece.raw)
            tally.last = piece.raw[-1:]
            tally.raw += len(piece.raw)
            tally.patched += frame.kind is Kind.PATCHED
            if copy is not None and tally.raw <= PEER_TEXT_LIMIT:
                copy.write(piece.raw)
            if time.monotonic() - spoken > _PROGRESS_SECONDS:
                spoken = time.monotonic()
                say(f"encoded {tally.size:,} bytes: {tally.bits / max(tally.size, 1):.4f} bits per byte by the scorer")
    target.write(form.pack_end(tally.raw, tally.digest.digest()))
    return tally


def _score_piece(piece: Piece, model: TextModel, header: Header, tally: Tally) -> None:
    tally.tokens += len(piece.tokens)
    tally.lanes += len(piece.starts)
    tally.from_table |= piece.size is None
    if len(piece.tokens) == len(piece.starts):  # documents that the tokenizer makes nothing of
        tally.size += piece.size or 0
        return
    with exact_arithmetic():
        scored = score(
            model.model, piece.tokens, token_bytes=model.tokenizer.token_bytes, true_bytes=piece.size,
            seq_len=header.seq_len, stride=header.stride, batch_tokens=model.batch_tokens, lane_starts=piece.starts,
            bos_id=model.tokenizer.bos_id, ngram=model.ngram,
        )  # fmt: skip
    loss = scored.val_loss if scored.ngram_loss is None else scored.ngram_loss
    tally.bits += loss * scored.scored_tokens / math.log(2)
    tally.size += scored.scored_bytes
    tally.score_seconds += scored.seconds


def _adapted(piece: Piece, model: TextModel, header: Header, ttt: TttSection, tally: Tally) -> Frame:
    """The frame of a piece of one lane, scored and coded in one pass, by one thread as the decoder has it."""
    if len(piece.raw) > MAX_RAW or len(piece.tokens) < 2:
        raise GolfError(f"a text of {len(piece.raw):,} bytes cannot be proved with test-time training; use --limit")
    began, table = time.monotonic(), model.tokenizer.token_bytes
    with one_thread():
        frame, bits = encode_adapted_frame(piece.raw, header, model, piece.tokens, ttt, None)
    tally.tokens += len(piece.tokens)
    tally.lanes += len(piece.starts)
    tally.from_table |= piece.size is None
    tally.bits += bits
    tally.size += table.total(piece.tokens) if piece.size is None else piece.size
    tally.encode_seconds += time.monotonic() - began
    tally.score_seconds = tally.encode_seconds
    return frame


def _frame(piece: Piece, model: TextModel, header: Header) -> Frame:
    if len(piece.raw) > MAX_RAW:
        raise GolfError(f"a lane of {len(piece.raw):,} bytes is too long for a proof; use more --lanes")
    crc = zlib.crc32(piece.raw)
    if len(piece.tokens) == len(piece.starts):
        packed = zstandard.ZstdCompressor(level=19).compress(piece.raw)
        smaller = len(packed) < len(piece.raw)
        return Frame(Kind.ZSTD if smaller else Kind.RAW, len(piece.raw), crc, packed if smaller else piece.raw)
    payload, patched = encode_lanes(piece.raw, header, model, piece.tokens, piece.starts, piece.joined)
    return Frame(Kind.PATCHED if patched else Kind.MODEL, len(piece.raw), crc, payload)


def decode_elsewhere(artifact: Path, file: Path, folder: Path) -> dict[str, Any]:
    """What `replay` says of the file in a process that has nothing else but the artifact: seconds, the SHA-256 of the
    content, and the path of a file with those of the documents."""
    given = folder / "proof.gtx"
    shutil.copyfile(file, given)
    command = [sys.executable, "-m", "paramgolf.text.replay", str(artifact.resolve()), given.name, "digests"]
    environment = {**child_environment(), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise CheckFailed(f"not proved: the file could not be decoded: {lines[-1]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer | {"digests": str(folder / "digests")}


def compare(expected: Path, got: Path) -> int:
    """How many documents there are, if the same came back as went in; CheckFailed if not."""
    count, back = expected.stat().st_size // DIGEST_BYTES, got.stat().st_size // DIGEST_BYTES
    if count != back:
        raise CheckFailed(f"not proved: {count} documents went in, {back} came back")
    wrong, first = 0, -1
    with expected.open("rb") as one, got.open("rb") as other:
        for number in itertools.count():
            a, b = one.read(DIGEST_BYTES), other.read(DIGEST_BYTES)
            if not a:
                break
            if a != b:
                wrong, first = wrong + 1, number if first < 0 else first
    if wrong:
        raise CheckFailed(f"not proved: {wrong} documents came back changed, the first is number {first}")
    return count
