"""Which text is held back for validation: by document hash, or by blocks of paragraphs where there is one document."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence

from paramgolf.data.sources import SEPARATOR, Buffer

_SALT = b"paramgolf"  # part of the format: changing it changes every split
VAL_SHARE = 10  # a small text gives at most one part in so many to validation


def digest(data: Buffer | str) -> int:
    """64-bit hash of a document (or of its name)."""
    raw = data.encode() if isinstance(data, str) else data
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8, key=_SALT).digest(), "little")


def val_limit(total_bytes: int, val_max_bytes: int) -> int:
    """Bytes a split of our own may hold back."""
    return max(min(val_max_bytes, total_bytes // VAL_SHARE), 1)


def pick(keys: Sequence[int], sizes: Sequence[int], limit: int) -> list[int]:
    """Indices of the documents held back: in hash order, those that fit, until nine tenths of `limit` are full."""
    chosen, filled = [], 0
    for index in sorted(range(len(keys)), key=lambda i: (keys[i], i)):
        if filled + sizes[index] <= limit:
            chosen.append(index)
            filled += sizes[index]
            if 10 * filled >= 9 * limit:
                break
    return sorted(chosen)


def blocks(document: Buffer, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of contiguous parts of about `size` bytes that end at a paragraph, else a line, else a character."""
    start, total = 0, len(document)
    while start < total:
        end = min(start + size, total)
        if end < total:
            end = _paragraph_end(bytes(document[end : end + size // 2 + 4]), end)
        if end < total:
            yield start, end
            start = end
        else:
            yield start, total
            start = total


def _paragraph_end(window: bytes, at: int) -> int:
    for pattern in (rb"\n\n+", rb"\n", rb"(?=[^\x80-\xbf])"):
        found = re.search(pattern, window, re.DOTALL)
        if found:
            return at + found.end()
    return at + len(window)


def split_single(document: Buffer, limit: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(training, validation) spans of one document: about ten contiguous blocks are held back, chosen by hash.

    A block whose text occurs again is never chosen, and neighbours that land on the same side are one span.
    """
    spans = list(blocks(document, max(limit // 10, 1)))
    keys = [digest(document[a:b]) for a, b in spans]
    seen: dict[int, int] = {}
    for key in keys:
        seen[key] = seen.get(key, 0) + 1
    single = [i for i, key in enumerate(keys) if seen[key] == 1]
    held = {single[i] for i in pick([keys[i] for i in single], [spans[i][1] - spans[i][0] for i in single], limit)}
    if len(held) == len(spans):
        held.clear()
    train: list[tuple[int, int]] = []
    val: list[tuple[int, int]] = []
    for index, (start, end) in enumerate(spans):
        side = val if index in held else train
        if side and side[-1][1] == start:
            side[-1] = (side[-1][0], end)
        else:
            side.append((start, end))
    return train, val


def join(documents: Sequence[Buffer]) -> bytes:
    """Documents as one plain text file that reads back as the same documents."""
    text = SEPARATOR.join(map(bytes, documents))
    return text if len(documents) < 2 or text.endswith(b"\x1e") else text + b"\n"
