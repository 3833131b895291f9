"""The byte table of a tokenizer against the documents themselves, document by document.

Bits per byte are bits over the bytes of the original text. A table that says how many bytes each token stands for is
right only if the tokenizer gives the text back unchanged and the table counts what it gives back. Where the documents
are at hand they decide, and this says in which of them the table differs, and which of the two reasons it has.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from paramgolf.data.dataset import Dataset
from paramgolf.data.shards import open_shard
from paramgolf.data.sources import Source
from paramgolf.data.tokenizer import Buffer
from paramgolf.errors import GolfError

SHOWN = 5
_DECODED_AT_ONCE = 1 << 16  # ids as Python numbers
TOKENIZER_CHANGES = "the tokenizer changes the text"
TABLE_MISCOUNTS = "the table miscounts the tokens"


class Table(Protocol):
    """Bytes of each target token given the one before it."""

    def count(self, prev: np.ndarray, target: np.ndarray) -> np.ndarray: ...


class Vocabulary(Protocol):
    """What is needed of a `Tokenizer`."""

    bos_id: int

    @property
    def token_bytes(self) -> Table: ...

    def decode(self, ids: Iterable[int]) -> bytes: ...


@dataclass(frozen=True)
class Difference:
    """One document (numbered from 0), its bytes, what the table counts, what its tokens decode to, and why."""

    document: int
    true_bytes: int
    table_bytes: int
    decoded_bytes: int
    cause: str


@dataclass(frozen=True)
class ByteCheck:
    """The result. `documents_changed`: how many the tokenizer does not give back, None where that was not looked at
    (their bytes were not at hand); `first`: the first few that the table counts wrongly."""

    documents: int
    true_bytes: int
    table_bytes: int
    documents_that_differ: int
    largest_difference: int
    documents_changed: int | None
    first: list[Difference]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


class ByteOracle:
    """Takes documents one by one with their tokens; `result` is what came of it."""

    def __init__(self, tokenizer: Vocabulary, table: Table | None = None) -> None:
        """`table`: another than the tokenizer's own."""
        self._tokenizer, self._table = tokenizer, table or tokenizer.token_bytes
        self._documents = self._true = self._counted = self._differ = self._largest = 0
        self._changed: int | None = 0
        self._first: list[Difference] = []

    def add(self, tokens: np.ndarray, document: Buffer | int) -> None:
        """A document's tokens, without BOS or with it, and the document or its length in bytes."""
        ids = np.asarray(tokens, dtype=np.int64)
        ids = ids[1:] if len(ids) and ids[0] == self._tokenizer.bos_id else ids
        size = document if isinstance(document, int) else len(document)
        before = np.concatenate((np.array([self._tokenizer.bos_id]), ids[:-1])) if len(ids) else ids
        counted = int(self._table.count(before, ids).sum())
        if isinstance(document, int):
            self._changed = None
        elif self._changed is not None and not getattr(self._tokenizer, "reversible", False):
            self._changed += self._decode(ids) != bytes(document)
        if counted != size:
            self._differ += 1
            self._largest = max(self._largest, abs(counted - size))
            if len(self._first) < SHOWN:
                decoded = len(self._decode(ids))
                causes = [TOKENIZER_CHANGES] * (decoded != size) + [TABLE_MISCOUNTS] * (decoded != counted)
                self._first.append(Difference(self._documents, size, counted, decoded, ", ".join(causes)))
        self._documents, self._true, self._counted = self._documents + 1, self._true + size, self._counted + counted

    def _decode(self, ids: np.ndarray) -> bytes:
        chunks = (ids[low : low + _DECODED_AT_ONCE].tolist() for low in range(0, len(ids), _DECODED_AT_ONCE))
        return self._tokenizer.decode(itertools.chain.from_iterable(chunks))

    def result(self) -> ByteCheck:
        return ByteCheck(
            self._documents, self._true, self._counted, self._differ, self._largest, self._changed, self._first
        )


def check_stream(
    tokens: np.ndarray, documents: Sequence[Buffer | int], tokenizer: Vocabulary, *, table: Table | None = None,
    where: str = "the text",
) -> ByteCheck:  # fmt: skip
    """The documents (or their lengths in bytes) of a stream in which BOS begins each; the first may lack its BOS.

    Raises GolfError if the stream holds another number of documents.
    """
    oracle = ByteOracle(tokenizer, table)
    parts = list(_parts(tokens, tokenizer.bos_id))
    if len(parts) != len(documents):
        raise GolfError(f"{where}: {len(documents)} documents, but the tokens hold {len(parts)}; prepare it again")
    for part, document in zip(parts, documents, strict=True):
        oracle.add(part, document)
    return oracle.result()


def check_dataset(dataset: Dataset, tokenizer: Vocabulary | None = None) -> ByteCheck | None:
    """The validation part of a prepared dataset; None where it came without its documents. `tokenizer`: another than
    the one that lies with it."""
    if dataset.val_text is None:
        return None
    tokens = dataset.val_tokens()
    texts = [document.data for document in Source(dataset.val_text, "text").documents()]
    return check_stream(tokens, texts, tokenizer or dataset.tokenizer, where=str(dataset.val_text))


def check_shards(shards: list[Path], documents: list[Source], tokenizer: Vocabulary) -> ByteCheck:
    """Shards against the documents they were made of, with which the sources begin."""
    tokens = np.concatenate([open_shard(path) for path in shards])
    texts = (document.data for source in documents for document in source.documents())
    number = sum(1 for _ in _parts(tokens, tokenizer.bos_id))
    return check_stream(tokens, list(itertools.islice(texts, number)), tokenizer, where=str(documents[0].path))


def _parts(tokens: np.ndarray, bos_id: int) -> Iterator[np.ndarray]:
    starts = np.flatnonzero(tokens == bos_id)
    if len(tokens) and (not len(starts) or starts[0]):
        starts = np.concatenate((np.array([0]), starts))
    yield from np.split(tokens, starts[1:]) if len(starts) else ()


def table_lines(check: dict[str, Any]) -> list[str]:
    """What a `ByteCheck.as_dict` says to a reader: a line, and one for each document shown."""
    differ, true, counted = check["documents_that_differ"], check["true_bytes"], check["table_bytes"]
    share = f" ({100 * (counted - true) / true:+.2g} %)" if true and counted != true else ""
    head = f"byte table {counted:,}{share}, true {true:,}, {differ:,} of {check['documents']:,} documents differ"
    head += f" (by at most {check['largest_difference']:,} bytes)" if differ else ""
    if changed := check["documents_changed"]:
        head += f"; the tokenizer changes the text of {changed:,}"
    lines = [head]
    for row in check["first"]:
        counts = f"true {row['true_bytes']:,}, table {row['table_bytes']:,}, decoded {row['decoded_bytes']:,}"
        lines.append(f"  document {row['document']}: {counts}: {row['cause']}")
    if differ > len(check["first"]):
        lines.append(f"  and {differ - len(check['first']):,} more")
    return lines
