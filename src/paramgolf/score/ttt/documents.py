"""The documents of a stream, in which order and in which chunks test-time training goes through them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Document:
    """`tokens[start : start + length]`: begin-of-document token first, the next document's included as last target."""

    number: int
    start: int
    length: int

    @property
    def targets(self) -> int:
        return self.length - 1


@dataclass(frozen=True)
class Chunks:
    """How documents are cut: targets begin(n) .. begin(n + 1) - 1 of each are its chunk n.

    Chunks have `size` targets, but those that begin before a limit of `short` (limit, size), in rising order, its size.
    """

    size: int
    short: tuple[tuple[int, int], ...] = ()

    def begin(self, number: int) -> int:
        """The first target of chunk `number`."""
        at = 0
        for size, count in self._runs():
            if number <= count:
                return at + number * size
            at, number = at + count * size, number - count
        return at + number * self.size

    def count(self, targets: int) -> int:
        """Chunks of a document of so many targets."""
        at = done = 0
        for size, count in self._runs():
            if targets <= at + count * size:
                return done + -(-(targets - at) // size)
            at, done = at + count * size, done + count
        return done + -(-(targets - at) // self.size)

    def _runs(self) -> list[tuple[int, int]]:
        """(size, how many) of the short chunks, in order."""
        at, runs = 0, []
        for limit, size in self.short:
            count = max(0, -(-(limit - at) // size))
            at += count * size
            runs.append((size, count))
        return runs


def documents_of(tokens: np.ndarray, bos_id: int) -> list[Document]:
    """Every target of the stream (all tokens but the first) belongs to one document: the tokens up to and including
    the next begin-of-document token. What comes before the first such token is a document too."""
    starts = np.flatnonzero(tokens == bos_id)
    starts = np.unique(np.concatenate(([0], starts[starts < len(tokens) - 1])))
    ends = np.append(starts[1:] + 1, len(tokens))
    return [Document(i, int(a), int(b - a)) for i, (a, b) in enumerate(zip(starts, ends, strict=True))]


@dataclass(frozen=True)
class Batch:
    """Documents side by side. `number` is the place of a batch where scored text is put together again: by length, if
    batches are made by length, shortest first, whatever the order of scoring."""

    number: int
    documents: list[Document]

    def chunks(self, size: int, short: tuple[tuple[int, int], ...], order: str) -> Chunks:
        """How the documents of this batch are cut.

        In the records (`order` longest) a batch whose longest document has at most so many tokens takes that size for
        all chunks (#2014). From left to right nothing may show how long a document will be, so every one begins with
        small chunks and goes on with larger ones at the same limits.
        """
        if order != "longest":
            return Chunks(size, short)
        longest = max(d.length for d in self.documents)
        return Chunks(next((own for limit, own in short if longest <= limit), size))


def batches_of(documents: list[Document], size: int, order: str) -> list[Batch]:
    """Batches of `size` documents in the order in which they are scored.

    "stream": as they come. "longest": documents of similar length together (sorted by length, cut into batches), the
    batch with the longest one first, as the records do: not from left to right, and by what only the whole text shows.
    """
    longest = order == "longest"
    ordered = sorted(documents, key=lambda d: d.length) if longest else documents
    batches = [Batch(i, ordered[at : at + size]) for i, at in enumerate(range(0, len(ordered), size))]
    return sorted(batches, key=lambda batch: -max(d.length for d in batch.documents)) if longest else batches


@dataclass(frozen=True)
class Window:
    """What a chunk of a document is predicted from: tokens start .. start + length - 1 of the document predict
    start + 1 .. start + length; of these positions `offset` .. `offset` + `count` - 1 are the chunk's."""

    start: int
    length: int
    offset: int
    count: int


def window_of(targets: int, first: int, end: int, context: int, *, to_end: bool = False) -> Window:
    """The window of the chunk `first` .. `end` - 1 of a document of `targets` targets: at most `context` tokens that
    end with the chunk, as if it were whole. A document longer than the context slides.

    With `to_end`, as in the records, the window of a last, shorter chunk ends with it and begins earlier by as much;
    that prediction then depends on where the document ends, which no token before says.
    """
    last = min(end, targets)
    start = max(0, (last if to_end else end) - context)
    return Window(start, last - start, first - start, last - first)
