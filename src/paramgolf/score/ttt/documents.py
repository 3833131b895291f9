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

    def chunks(self, size: int) -> int:
        return -(-self.targets // size)


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


def window_of(targets: int, chunk: int, size: int, context: int, *, to_end: bool = False) -> Window:
    """The window of chunk number `chunk` of a document of `targets` targets in chunks of `size`: at most `context`
    tokens that end with the chunk, as if it were whole. A document longer than the context slides.

    With `to_end`, as in the records, the window of a last, shorter chunk ends with it and begins earlier by as much;
    that prediction then depends on where the document ends, which no token before says.
    """
    end = min((chunk + 1) * size, targets)
    start = max(0, (end if to_end else (chunk + 1) * size) - context)
    return Window(start, end - start, chunk * size - start, end - chunk * size)
