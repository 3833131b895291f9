"""Building a dataset folder from text, in two passes with flat memory.

Pass 1 reads every document: its hash, its size and a sample for the tokenizer. Then the split is decided, the
tokenizer trained, and pass 2 writes the shards. The folder is complete or absent: it is built under another name and
renamed. The passport (passport.json) holds no time, path or host name.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import re
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paramgolf.data import builtin, split
from paramgolf.data.bpe import train_bpe
from paramgolf.data.cache import remembered_sha256, sweep
from paramgolf.data.encode_pool import encode_stream
from paramgolf.data.official import SIDECAR, check_case, check_vocabulary
from paramgolf.data.shards import ShardWriter, read_header, write_shards
from paramgolf.data.sources import Buffer, Document, Source, find, is_validation, spool_stdin
from paramgolf.data.tokenizer import Tokenizer
from paramgolf.errors import GolfError
from paramgolf.files import atomic_write, sha256_bytes, sha256_file
from paramgolf.recipe.sections import DataSection

Progress = Callable[[str, int, int | None], None]  # (phase, bytes done, bytes in all or None)

FORMAT = 3  # raise when the meaning of a prepared folder changes: the cache key holds it
PASSPORT, TOKENIZER, VAL_TEXT = "passport.json", "tokenizer.model", "val.txt"
_OURS = re.compile(rf"{PASSPORT}|{TOKENIZER}|{VAL_TEXT}|(train|val|{SIDECAR})_\d+\.bin")
_LISTED = 50  # names of skipped files the passport holds


def _silent(phase: str, done: int, total: int | None) -> None:
    pass


@dataclass(frozen=True)
class Inputs:
    """What is read: training text (a callable, because it is read twice) and validation text if it is apart."""

    train: Callable[[], Iterator[Document]]
    val: Callable[[], Iterator[Document]] | None
    origin: str  # how validation was chosen, unless it is split off
    label: list[dict[str, Any]]  # of `files`, then of the built-in text
    files: list[Source] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    temporary: Path | None = None


def build(
    section: DataSection, name: str, *, cache: Path, out: Path | None, progress: Progress | None, workers: int
) -> Path:
    """The folder of the prepared dataset; built only if there is none for the same content and settings."""
    progress = progress or _silent
    inputs = read_inputs(section, name, cache, progress)
    try:
        key = _key(section, inputs)
        folder = out or cache / key[:20]
        if _is_current(folder, key):
            return folder
        if out is not None and folder.exists() and not _replaceable(folder):
            raise GolfError(f"{folder}: not empty and not a prepared dataset alone; choose another --out")
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(cache)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            passport = _build_in(work, section, inputs, progress, workers)
            if _labels(inputs.files, cache, _silent) != inputs.label[: len(inputs.files)]:
                raise GolfError("the text changed while it was read; run again when nothing writes to it")
            atomic_write(work / PASSPORT, json.dumps({**passport, "key": key}, indent=1).encode())
            _publish(work, folder, key)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or error
        raise GolfError(f"cannot write the dataset in {out or cache}: {reason}; free space or change it") from error
    finally:
        if inputs.temporary:
            inputs.temporary.unlink(missing_ok=True)
    return folder


def _is_current(folder: Path, key: str) -> bool:
    """Whether `folder` is the whole dataset of `key`; a cache that lost a file is built again."""
    try:
        passport = json.loads((folder / PASSPORT).read_text(encoding="utf-8"))
        shards = [*passport["train"]["shards"], *passport["val"]["shards"], *passport["val"].get("sizes", [])]
        whole = all(read_header(folder / shard["name"]) == shard["tokens"] for shard in shards)
        hashes = {VAL_TEXT: passport["val"]["sha256"], TOKENIZER: passport["tokenizer"]["sha256"]}
        whole = whole and all(sha256_file(folder / name) == expected for name, expected in hashes.items())
        return bool(whole and passport["key"] == key)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, GolfError):
        return False


def _replaceable(folder: Path) -> bool:
    """Whether nothing of the user's is lost with `folder`: it is empty, or a prepared dataset and nothing else."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else [""]
    return not names or (PASSPORT in names and all(_OURS.fullmatch(name) for name in names))


def _publish(work: Path, folder: Path, key: str) -> None:
    work.chmod(0o755)
    for _ in range(3):
        try:
            os.rename(work, folder)
            return
        except OSError:
            if _is_current(folder, key):  # another process was faster with the same content
                return
            shutil.rmtree(folder, ignore_errors=True)
    raise GolfError(f"cannot write {folder}; remove it and try again")


def read_inputs(section: DataSection, name: str, cache: Path, progress: Progress = _silent) -> Inputs:
    """What `name` (file, folder, glob, "-", "" = built-in) and section.val give to read; which part is validation."""
    given = find(section.val, section.text_field)[0] if section.val else None  # or refused, before anything is read
    if not name:
        if given is not None:
            labels = [*_labels(given, cache, progress), _builtin_label()]
            return Inputs(builtin.documents, _reader(given), "data.val", labels, given)
        return Inputs(builtin.documents, None, "", [_builtin_label()])
    temporary: Path | None = None
    skipped: list[str] = []
    if name == "-":
        stdin = spool_stdin(cache, section.text_field)
        found, temporary = [stdin], stdin.path
    else:
        found, skipped = find(name, section.text_field)
    if given is not None:
        val = given
        same = {s.path.resolve() for s in val}
        found = [s for s in found if s.path.resolve() not in same]
        origin = "data.val"
        if not found:
            raise GolfError(f"data.val = '{section.val}' is all of the training text; name other files")
    else:
        val = [s for s in found if is_validation(s)]
        val = val if len(val) < len(found) else []  # all or the only one: then the name says nothing
        found = [s for s in found if s not in val]
        origin = "files named val"
    files = [*found, *val]
    labels = _labels(files, cache, progress)
    return Inputs(_reader(found), _reader(val) if val else None, origin, labels, files, skipped, temporary)


def _reader(found: list[Source]) -> Callable[[], Iterator[Document]]:
    return lambda: itertools.chain.from_iterable(source.documents() for source in found)


def _labels(found: list[Source], cache: Path, progress: Progress) -> list[dict[str, Any]]:
    total, done, labels = sum(s.size() for s in found), 0, []
    for source in found:
        labels.append({"name": source.name, "kind": source.kind, "sha256": remembered_sha256(source.path, cache)})
        done += source.size()
        progress("hash", done, total)
    return labels


def _builtin_label() -> dict[str, Any]:
    content = sha256_bytes(b"".join(d.name.encode() + b"\0" + bytes(d.data) + b"\0" for d in builtin.documents()))
    return {"name": builtin.version(), "kind": "builtin", "sha256": content}


def _key(section: DataSection, inputs: Inputs) -> str:
    tokenizer = Tokenizer.load(section.tokenizer).sha256 if section.tokenizer else ""
    settings = [FORMAT, section.vocab_size, section.val_max_bytes, section.text_field, section.split_digits]
    settings += [section.tokenizer_text_bytes, tokenizer, inputs.origin]
    settings += ["caseops"] if section.caseops else []  # folders made without it keep their key
    settings += ["no copies"] if inputs.files and inputs.val is None else []  # not a folder that may hold such
    return sha256_bytes(json.dumps([settings, inputs.label]).encode())


@dataclass
class _Scan:
    """Pass 1: a 64-bit hash, a split key and a size for every document, and the sample."""

    digests: array[int] = field(default_factory=lambda: array("Q"))
    keys: array[int] = field(default_factory=lambda: array("Q"))
    sizes: array[int] = field(default_factory=lambda: array("Q"))
    total: int = 0


class _Sample:
    """The documents of largest hash, together just over `limit` bytes: an even sample, flat in memory.

    Largest, because a split takes the smallest for validation and those must not be in it.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._heap: list[tuple[int, bytes]] = []
        self._size = 0

    def add(self, digest: int, data: Buffer) -> None:
        if self._size >= self.limit and digest <= self._heap[0][0]:
            return
        text = _excerpt(data, max(self.limit // 4, 1 << 16))
        heapq.heappush(self._heap, (digest, text))
        self._size += len(text)
        while self._size - len(self._heap[0][1]) >= self.limit:
            self._size -= len(heapq.heappop(self._heap)[1])

    def texts(self, leave_out: set[int]) -> list[bytes]:
        return [text for digest, text in sorted(self._heap) if digest not in leave_out]


def _excerpt(data: Buffer, limit: int, parts: int = 16) -> bytes:
    """`data`, or evenly spaced parts of it of `limit` bytes in all."""
    if len(data) <= limit:
        return bytes(data)
    size = limit // parts
    stride = (len(data) - size) // (parts - 1)
    return b"\n".join(bytes(data[i * stride : i * stride + size]) for i in range(parts))


def _build_in(work: Path, section: DataSection, inputs: Inputs, progress: Progress, workers: int) -> dict[str, Any]:
    given = Tokenizer.load(section.tokenizer) if section.tokenizer else None
    if given:
        check_vocabulary(given, section, where=section.tokenizer, given=True)
        check_case(given, section, where=section.tokenizer)
    sample = _Sample(section.tokenizer_text_bytes)
    scan = _Scan()
    only: Document | None = None
    for document in inputs.train():
        scan.digests.append(split.digest(document.data))
        scan.keys.append(split.digest(document.name) if document.name else scan.digests[-1])
        scan.sizes.append(len(document.data))
        scan.total += len(document.data)
        if given is None:
            sample.add(scan.digests[-1], document.data)
        only = document if len(scan.sizes) == 1 else None
        progress("read", scan.total, None)
    if not scan.total:
        raise GolfError("the training text is empty; give a file with text in it")
    val_documents, train, removed, origin = _split(section, inputs, scan, only)
    held = {split.digest(d) for d in val_documents}
    if given is None and origin == "paragraphs":
        sample = _Sample(section.tokenizer_text_bytes)
        for document in train():
            sample.add(split.digest(document.data), document.data)
    if given is None:
        progress("tokenizer", 0, None)
        given = train_bpe(
            sample.texts(held), section.vocab_size, split_digits=section.split_digits, case_operators=section.caseops
        )
    atomic_write(work / TOKENIZER, given.to_bytes())
    val_part = _write(work, "val", (Document(d) for d in val_documents), given, 0, _silent, 1)
    if given.case_operators:
        val_part["sizes"] = _write_sizes(work, val_documents, given)
    text = split.join(val_documents)
    atomic_write(work / VAL_TEXT, text)
    train_part = _write(work, "train", train(), given, scan.total, progress, workers, held)
    if not train_part["tokens"]:
        raise GolfError("every training document is also a validation document; nothing is left to train on")
    leaked = train_part.pop("held")
    return {
        "format": FORMAT,
        "kind": "text",
        "source": inputs.label,
        "skipped_files": inputs.skipped[:_LISTED],
        "tokenizer": {
            "sha256": given.sha256,
            "vocab_size": given.vocab_size,
            "reversible": given.reversible,
            "origin": "given" if section.tokenizer else "trained on the training text",
        },
        "split": origin,
        "train": train_part,
        "val": {**{k: v for k, v in val_part.items() if k != "held"}, "sha256": sha256_bytes(text)},
        "removed_from_train": removed,
        "val_documents_in_train": leaked,
    }


def _split(
    section: DataSection, inputs: Inputs, scan: _Scan, only: Document | None
) -> tuple[list[bytes], Callable[[], Iterable[Document]], int, str]:
    """(validation documents, training documents, how many were removed as copies of validation, the rule used)."""
    if inputs.val is not None:
        val = [bytes(d.data) for d in inputs.val()]
        if not val:
            raise GolfError("the validation text is empty; give a file with text in it or leave data.val out")
        return *_without(inputs, scan, val, 0), inputs.origin
    limit = split.val_limit(scan.total, section.val_max_bytes)
    chosen = split.pick(scan.keys, scan.sizes, limit) if len(scan.sizes) > 1 else []
    if chosen:
        wanted = set(chosen)
        unique = {scan.digests[i]: d.data for i, d in enumerate(inputs.train()) if i in wanted}
        return *_without(inputs, scan, [bytes(d) for d in unique.values()], len(unique)), "document hash"
    if only is None:  # several documents, all larger than the validation may be: one of them is cut
        index = min(range(len(scan.keys)), key=lambda i: (scan.keys[i], i))
        only = next(itertools.islice(inputs.train(), index, None))
    else:
        index = 0
    return _split_one(inputs, scan, only, index, section.val_max_bytes)


def _without(
    inputs: Inputs, scan: _Scan, val: list[bytes], own: int
) -> tuple[list[bytes], Callable[[], Iterable[Document]], int]:
    held = {split.digest(d) for d in val}
    copies = sum(1 for d in scan.digests if d in held)

    def train() -> Iterator[Document]:
        return (d for d, digest in zip(inputs.train(), scan.digests, strict=False) if digest not in held)

    return val, train, copies - own


def _split_one(
    inputs: Inputs, scan: _Scan, only: Document, index: int, most: int
) -> tuple[list[bytes], Callable[[], Iterable[Document]], int, str]:
    """The same for one document that is cut; other documents stay whole, but for its copies, which hold all of it."""
    data = only.data
    copies = scan.digests.count(scan.digests[index]) - 1
    train_spans, val_spans = split.split_single(data, split.val_limit(scan.total - copies * len(data), most))
    if not val_spans or not train_spans:
        raise GolfError(
            f"the text is one document of {len(data)} bytes that cannot be split into training and validation;"
            " give more text, or validation text with data.val"
        )
    val = [bytes(data[a:b]) for a, b in val_spans]

    def train() -> Iterator[Document]:
        for at, (document, digest) in enumerate(zip(inputs.train(), scan.digests, strict=False)):
            if at == index:
                for a, b in train_spans:
                    yield Document(document.data[a:b])
            elif digest != scan.digests[index]:
                yield document

    return val, train, copies, "paragraphs"


def _write(
    work: Path,
    prefix: str,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    total: int,
    progress: Progress,
    workers: int,
    held: set[int] | None = None,
) -> dict[str, Any]:
    """Write one side's shards; its part of the passport. `held`: hashes whose documents are counted, not dropped."""
    counts = {"documents": 0, "bytes": 0, "held": 0}

    def counted() -> Iterator[Document]:
        for document in documents:
            counts["documents"] += 1
            counts["bytes"] += len(document.data)
            counts["held"] += bool(held) and split.digest(document.data) in (held or ())
            yield document

    done = 0
    with ShardWriter(work, prefix) as writer:
        for tokens, size in encode_stream(counted(), tokenizer, total_bytes=total, workers=workers):
            writer.write(tokens)
            done += size
            progress("tokenise", done, total)
    shards = [{"name": path.name, "tokens": read_header(path), "sha256": sha256_file(path)} for path in writer.paths]
    return {**counts, "tokens": writer.tokens, "shards": shards}


def _write_sizes(work: Path, documents: Iterable[bytes], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The sidecar of the validation shards: the bytes of original text of every token, in shards of the same sizes."""
    paths = write_shards(work, SIDECAR, (tokenizer.sizes(document) for document in documents))
    return [{"name": path.name, "tokens": read_header(path), "sha256": sha256_file(path)} for path in paths]
