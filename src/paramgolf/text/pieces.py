"""What is proved, in pieces that each become one frame of the file: documents cut into lanes, or a token stream.

Everything here is read as it is needed, so that memory does not grow with the text: a document of any size comes in
parts, tokens that must all be known at once (to plan lanes over the whole stream) lie in a file.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from paramgolf.data import official, sources
from paramgolf.data.build import PASSPORT, VAL_TEXT
from paramgolf.data.dataset import open_sizes
from paramgolf.data.shards import open_shard
from paramgolf.data.sources import SEPARATOR
from paramgolf.data.tokenizer import Buffer, Tokenizer
from paramgolf.errors import GolfError
from paramgolf.files import user_path
from paramgolf.score.windows import lanes_between

FRAME_BYTES = 1 << 19
FRAME_LANES = 12  # each costs 2 bytes and a beginning without context
LEAST_LANE = 1 << 15  # bytes: a short text gains more from one long context than from speed
MAX_LANES = 64
_BLANK = re.compile(rb"[ \n]")


class Part(NamedTuple):
    """A document or, where it is `joined` to what came before, the next part of one."""

    data: bytes
    joined: bool


@dataclass(frozen=True)
class Piece:
    """One frame's worth. `tokens`: lanes that each begin with the begin-of-document token, at `starts`; `joined`: lanes
    before which no document begins; `raw`: what the frame stands for; `size`: bytes of the documents in it, None where
    only the tokenizer's table can say."""

    raw: bytes
    tokens: np.ndarray
    starts: tuple[int, ...]
    joined: tuple[bool, ...]
    size: int | None


def place_to_cut(data: Buffer, at: int) -> int:
    """The first place from `at` on after a blank or line end, or within 200 bytes at least between characters."""
    near = bytes(data[at : at + 200])
    if found := _BLANK.search(near):
        return at + found.end()
    return at + next((i for i, byte in enumerate(near[:4]) if byte & 0xC0 != 0x80), 0)


def parts_of(documents: Iterable[Buffer], limit: int = 0) -> Iterator[Part]:
    """The documents, those above FRAME_BYTES in several parts; only the first `limit` bytes of all if that is not 0,
    not cutting a character."""
    left = limit or 1 << 62
    for document in documents:
        end = len(document)
        if end > left:
            end = left
            while end and document[end] & 0xC0 == 0x80:
                end -= 1
        left -= len(document)
        start = 0
        while start < end:
            stop = place_to_cut(document, start + FRAME_BYTES) if end - start > FRAME_BYTES else end
            stop = min(stop, end)
            yield Part(bytes(document[start:stop]), start > 0)
            start = stop
        if left <= 0:
            return


def even_pieces(parts: Iterable[Part], tokenizer: Tokenizer, most_lanes: int) -> Iterator[Piece]:
    """Frames of about FRAME_BYTES in lanes of nearly equal size. A lane begins at a document where one begins near,
    else inside one: then its first token is the given begin-of-document token as for every lane."""
    first = True
    for group in _groups(parts):
        count = max(1, min(FRAME_LANES, most_lanes, sum(len(p.data) for p in group) // LEAST_LANE))
        lanes = split(group, even_places(b"".join(p.data for p in group), count, tokenizer))
        yield _piece(lanes, tokenizer, first)
        first = False


def _groups(parts: Iterable[Part]) -> Iterator[list[Part]]:
    held: list[Part] = []
    size = 0
    for part in parts:
        held.append(part)
        size += len(part.data)
        if size >= FRAME_BYTES:
            yield held
            held, size = [], 0
    if held:
        yield held


def even_places(data: bytes, count: int, tokenizer: Tokenizer) -> list[int]:
    """About where to cut `data` into `count` lanes of equally many tokens: of lanes that are decoded side by side the
    longest takes the time."""
    if count < 2:
        return []
    tokens = tokenizer.encode_documents([data])
    ends = np.cumsum(tokenizer.token_bytes.count(tokens[:-1], tokens[1:]), dtype=np.int64)
    if not ends.any():  # a tokenizer that makes nothing of it
        return [len(data) * i // count for i in range(1, count)]
    places = (int(ends[len(ends) * i // count]) * len(data) // int(ends[-1]) for i in range(1, count))
    return [min(place, max(len(data) - 1, 0)) for place in places]


def split(parts: list[Part], places: Sequence[int]) -> list[list[Part]]:
    """`parts` in runs that begin near `places` (bytes), between parts or, where none begins near, inside."""
    edges = [0, *itertools.accumulate(len(part.data) for part in parts)]
    total, count = edges[-1], len(places) + 1
    cuts = {0, total}
    for ideal in places:
        number = bisect.bisect_right(edges, ideal) - 1
        at = min(edges[number : number + 2], key=lambda edge: abs(edge - ideal))
        if abs(at - ideal) > total // (4 * count):
            at = edges[number] + min(place_to_cut(parts[number].data, ideal - edges[number]), len(parts[number].data))
        cuts.add(at)
    runs = []
    for low, high in itertools.pairwise(sorted(cuts)):
        run = []
        for part, start in zip(parts, edges, strict=False):
            data = part.data[max(low - start, 0) : max(high - start, 0)]
            if data:
                run.append(Part(data, part.joined or low > start))
        runs.append(run)
    return runs


def _piece(lanes: list[list[Part]], tokenizer: Tokenizer, first: bool) -> Piece:
    joined = tuple((first and i == 0) or lane[0].joined for i, lane in enumerate(lanes))
    texts = [_text(lane) for lane in lanes]
    raw = b"".join((b"" if j else SEPARATOR) + text for j, text in zip(joined, texts, strict=True))
    tokens = [tokenizer.encode_documents(text.split(SEPARATOR)) for text in texts]
    starts = tuple(int(s) for s in np.cumsum([0, *map(len, tokens)])[:-1])
    size = sum(len(part.data) for lane in lanes for part in lane)
    return Piece(raw, np.concatenate(tokens), starts, joined, size)


def _text(lane: list[Part]) -> bytes:
    return b"".join((b"" if part.joined or i == 0 else SEPARATOR) + part.data for i, part in enumerate(lane))


@dataclass
class TokenFile:
    """A token stream in a file, and where its documents begin."""

    path: Path
    documents: list[int] = field(default_factory=list)
    count: int = 0

    def fill(self, chunks: Iterable[np.ndarray], bos_id: int) -> TokenFile:
        with self.path.open("wb") as stream:
            for chunk in chunks:
                self.documents += (np.flatnonzero(chunk == bos_id) + self.count).tolist()
                stream.write(np.asarray(chunk, dtype=np.uint16).tobytes())
                self.count += len(chunk)
        return self

    def tokens(self) -> np.ndarray:
        return np.memmap(self.path, dtype=np.uint16, mode="r", shape=(self.count,))


def planned_pieces(
    tokens: TokenFile, lane_count: int, most_lanes: int, texts: Iterator[Part] | None, sizes: np.ndarray | None
) -> Iterator[Piece]:
    """The lanes that the scorer's plan cuts the whole stream into, at most MAX_LANES a frame.

    `texts` are the documents, one part or several each, or None for a stream of tokens alone, which `sizes` (n,) may
    count the bytes of.
    """
    starts = lanes_between(np.array(tokens.documents), tokens.count, lane_count)
    together = min(MAX_LANES, most_lanes)
    documents = None if texts is None else whole(texts)
    stream, done = tokens.tokens(), 0
    for i, (low, high) in enumerate(itertools.pairwise([*starts[::together], tokens.count])):
        piece = np.array(stream[low:high])
        mine = tuple(start - low for start in starts[i * together : (i + 1) * together])
        if documents is None:
            size = None if sizes is None else int(sizes[low:high].sum(dtype=np.int64))
            yield Piece(piece.astype("<u2").tobytes(), piece, mine, (False,) * len(mine), size)
            continue
        end = bisect.bisect_left(tokens.documents, high)
        held = list(itertools.islice(documents, end - done))
        done = end
        raw = (b"" if i == 0 else SEPARATOR) + SEPARATOR.join(held)
        yield Piece(raw, piece, mine, (i == 0, *(False,) * (len(mine) - 1)), sum(map(len, held)))


def whole(parts: Iterator[Part]) -> Iterator[bytes]:
    held: list[bytes] = []
    for part in parts:
        if held and not part.joined:
            yield b"".join(held)
            held = []
        held.append(part.data)
    if held:
        yield b"".join(held)


@dataclass(frozen=True)
class Corpus:
    """What `golf score --data` takes: documents, which can be read again and again, or shards without them."""

    documents: Callable[[], Iterator[Buffer]] | None
    shards: Sequence[Path] = ()
    sizes: np.ndarray | None = None  # bytes of each token of the shards, where a sidecar counts them


def open_corpus(source: str | Path, tokenizer: Tokenizer) -> Corpus:
    """The whole of `source`; of a folder its validation part, if it has one."""
    path = user_path(source)
    if path.is_dir() and (path / VAL_TEXT).is_file() and (path / PASSPORT).is_file():
        path = path / VAL_TEXT
    elif path.is_dir() and official.has_shards(path):
        return Corpus(None, official.shard_files(path)[1], open_sizes(path, tokenizer))
    elif path.suffix == ".bin":
        return Corpus(None, [path], open_sizes(path, tokenizer))
    found, _ = sources.find(path)
    held = [s for s in found if sources.is_validation(s)]
    chosen = held if held and path.is_dir() else found

    def documents() -> Iterator[Buffer]:
        return (document.data for one in chosen for document in one.documents())

    if next(documents(), None) is None:
        raise GolfError(f"{source}: the text is empty; nothing to prove")
    return Corpus(documents)


def shard_tokens(corpus: Corpus, tokenizer: Tokenizer, limit: int) -> Iterator[np.ndarray]:
    """The shards' tokens in chunks, up to `limit` bytes if that is not 0 (two tokens at least)."""
    done = counted = 0
    previous = 0
    for path in corpus.shards:
        shard = open_shard(path, tokenizer.vocab_size)
        for low in range(0, len(shard), 1 << 20):
            chunk = np.array(shard[low : low + (1 << 20)])
            if limit:
                if corpus.sizes is None:
                    each = tokenizer.token_bytes.count(np.append(previous, chunk[:-1]), chunk)
                else:
                    each = corpus.sizes[done : done + len(chunk)]
                within = int(np.searchsorted(counted + np.cumsum(each, dtype=np.int64), limit, side="right"))
                counted += int(np.sum(each, dtype=np.int64))
                if within < len(chunk):
                    yield chunk[: max(within, 2 - done)]
                    return
            yield chunk
            done, previous = done + len(chunk), int(chunk[-1])
