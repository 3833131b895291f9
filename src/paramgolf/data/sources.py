"""Where text comes from: files, folders, globs and standard input, as a stream of documents.

A document is bytes of UTF-8 text. A plain text file is one document, or several separated by the byte 0x1E and a
newline; the separators and one final newline of such a file belong to no document. The same two bytes separate
documents inside a JSONL or parquet row, so that every document can be kept in a plain text file. Empty documents are
dropped.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import glob
import gzip
import io
import json
import lzma
import mmap
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from paramgolf.data.tokenizer import Buffer
from paramgolf.errors import GolfError
from paramgolf.files import user_path

SEPARATOR = b"\x1e\n"
COMPRESSED = {".gz", ".xz", ".zst", ".bz2", ".lzma"}
KINDS = {".txt": "text", ".text": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_VALIDATION = re.compile(r"(?<![^\W\d_])val(id|idation)?(?![^\W\d_])")  # no letter before or after
_BLOCK = 1 << 20
_LONGEST_LINE = 1 << 26  # of standard input that is looked at to tell JSONL from text
_BZ2 = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")  # the first block, or the end of an empty stream
# A folder that holds one of these pairs is the program's own output: a prepared dataset, a run.
_MADE = (("passport.json", "tokenizer.model"), ("recipe.toml", "record.json"), ("recipe.toml", "data.json"))
_LARGE = 1 << 23  # documents above this size stay in the memory map instead of being copied


@dataclass(frozen=True)
class Document:
    """One document; `name` (of a built-in one) decides its place in a split instead of its content."""

    data: Buffer
    name: str = ""


@dataclass(frozen=True)
class Source:
    """One input file and how it is read; `field` is the JSONL key or parquet column."""

    path: Path
    kind: str
    field: str = "text"
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or self.path.name

    def size(self) -> int:
        return self.path.stat().st_size

    def documents(self) -> Iterator[Document]:
        """Its documents in order, flat in memory. GolfError with file and place for what is not text."""
        with _reading(str(self.path)):
            if self.kind == "text":
                for data in _text_documents(self):
                    yield Document(data)
            else:
                rows = _jsonl_rows(self) if self.kind == "jsonl" else _parquet_rows(self)
                for row in rows:
                    for part in row.split(SEPARATOR):
                        if part:
                            yield Document(part)


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    """Inside, a file that cannot be read or unpacked is a GolfError."""
    try:
        yield
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise GolfError(f"{what}: damaged compressed file ({error}); make it again") from error
    except OSError as error:
        if error.errno is None:  # what bz2 and gzip raise for data that they cannot unpack
            raise GolfError(f"{what}: damaged compressed file ({error}); make it again") from error
        raise GolfError(f"cannot read {what}: {error.strerror}") from error


def kind_of(path: Path) -> str | None:
    """text, jsonl, parquet or None by file name, compression suffixes aside."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def is_validation(source: Source) -> bool:
    """Whether the file name says validation: `val`, `valid` or `validation` as a word, not as in `interval`."""
    return _VALIDATION.search(source.path.name.lower()) is not None


def find(source: str | Path, field: str = "text") -> tuple[list[Source], list[str]]:
    """The inputs `source` names (file, folder or glob), sorted by path, and the names of files left out.

    A file named outright or by a glob is text unless its name says JSONL or parquet; in a folder only .txt, .text,
    .jsonl, .ndjson and .parquet files count (with .gz, .xz, .zst, .bz2 as well), and nothing of the
    runs and prepared datasets in it.
    """
    path = user_path(source)
    if path.is_file():
        return [Source(path, kind_of(path) or "text", field)], []
    if path.is_dir():
        return _find_in_folder(path, field)
    if glob.has_magic(str(source)):
        paths = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if paths:
            return [Source(p, kind_of(p) or "text", field) for p in paths], []
        raise GolfError(f"no file matches '{source}'; check the pattern")
    if path.exists():
        raise GolfError(f"{source} is neither a file nor a folder; give what it holds on standard input, by '-'")
    raise GolfError(f"no such file or folder: {source}; check data.train or --data")


def _find_in_folder(folder: Path, field: str) -> tuple[list[Source], list[str]]:
    found, skipped = [], []
    made: Path | None = None
    for path in sorted(folder.rglob("*")):  # a folder comes right before what is in it
        relative = path.relative_to(folder)
        if made in path.parents or any(part.startswith(".") for part in relative.parts):
            continue
        if path.is_dir() and any(all((path / name).is_file() for name in pair) for pair in _MADE):
            made = path
            skipped.append(f"{relative.as_posix()}/")
        if not path.is_file():
            continue
        kind = kind_of(path)
        if kind:
            found.append(Source(path, kind, field, relative.as_posix()))
        else:
            skipped.append(relative.as_posix())
    if not found:
        seen = f"it holds {', '.join(skipped[:5])}" if skipped else "it is empty"
        raise GolfError(f"{folder}: no .txt, .jsonl or .parquet file ({seen}); give such files or name one outright")
    return found, skipped


def spool_stdin(folder: Path, field: str = "text") -> Source:
    """Standard input, kept in a file under `folder` because it is read twice; its name says what it holds."""
    if sys.stdin is None:
        raise GolfError("standard input is closed; pipe the text in, or name a file")
    path: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="stdin.", delete=False) as stream:
            path = Path(stream.name)
            shutil.copyfileobj(sys.stdin.buffer, stream, _BLOCK)
        with _reading("standard input"):
            kind = _kind_of_content(path, field)
        return Source(path.rename(path.with_name(f"{path.name}.{kind}")), kind, field, "stdin")
    except BaseException as error:
        if path is not None:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise GolfError(f"cannot keep standard input in {folder}: {error.strerror or error}; free space") from error
        raise


def _kind_of_content(path: Path, field: str) -> str:
    with _open(path) as text:
        line = text.readline(_LONGEST_LINE)
    if line[:4] == b"PAR1":
        return "parquet"
    try:
        first = json.loads(line)
    except (ValueError, RecursionError):
        return "text"
    return "jsonl" if isinstance(first, dict) and field in first else "text"


def _open(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed by what its first bytes say."""
    with path.open("rb") as stream:
        magic = stream.read(10)
    suffix = path.suffix.lower()
    if magic[:2] == b"\x1f\x8b":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if magic[:6] == b"\xfd7zXZ\0" or (suffix == ".lzma" and magic[:3] == b"\x5d\0\0"):
        return lzma.open(path, "rb")
    if _BZ2.match(magic) or (magic[:3] == b"BZh" and suffix == ".bz2"):
        return bz2.open(path, "rb")
    if magic[:4] == b"\x28\xb5\x2f\xfd":
        return _open_zstd(path)
    if suffix in COMPRESSED and magic:
        raise GolfError(f"{path}: not a {suffix[1:]} file although its name says so; rename or make it again")
    return path.open("rb")


def _open_zstd(path: Path) -> IO[bytes]:
    return io.BufferedReader(_ZstdFile(path), _BLOCK)


class _ZstdFile(io.RawIOBase):
    """A zstd file of one or several frames; unlike the library's own reader it notices a truncated one."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._ready:
            packed = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            packed = packed or self._file.read(1 << 17)
            if not packed:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("the zstd stream ends early")
                return 0
            self._ready = self._decompress(packed)
        count = min(len(target), len(self._ready))
        target[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _decompress(self, packed: bytes) -> bytes:
        import zstandard

        if self._frame is None or self._frame.eof:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            return bytes(self._frame.decompress(packed))
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from error

    def close(self) -> None:
        self._file.close()
        super().close()


def _check_utf8(data: Buffer, source: Source, offset: int) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(data), _BLOCK):
        try:
            decoder.decode(bytes(data[start : start + _BLOCK]), final=start + _BLOCK >= len(data))
        except UnicodeDecodeError as error:
            pending = len(error.object) - len(data[start : start + _BLOCK])
            at = offset + start - pending + error.start
            raise GolfError(
                f"{source.path}: not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {at};"
                " convert the file to UTF-8 or leave it out"
            ) from error


def _text_documents(source: Source) -> Iterator[Buffer]:
    with _open(source.path) as stream:
        plain = isinstance(stream, io.BufferedReader) and isinstance(stream.raw, io.FileIO)
        if plain and source.size():
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            parts = _split_mapped(mapped)
        else:
            parts = _split_stream(stream)
        for offset, data in parts:
            _check_utf8(data, source, offset)
            if len(data):
                yield data


def _split_mapped(mapped: mmap.mmap) -> Iterator[tuple[int, Buffer]]:
    """(offset, document) of a memory-mapped text file. Large documents are views of the map: the kernel pages them."""
    start, size, several = 0, len(mapped), False
    while start < size:
        end = mapped.find(SEPARATOR, start)
        following = end + 2
        if end < 0:
            end = following = size
            if several and mapped[size - 1] == 0x0A:
                end -= 1
        several = True
        yield start, memoryview(mapped)[start:end] if end - start > _LARGE else mapped[start:end]
        start = following


def _split_stream(stream: IO[bytes]) -> Iterator[tuple[int, Buffer]]:
    """(offset, document) of a stream of text."""
    rest, offset, several = bytearray(), 0, False
    while block := stream.read(_BLOCK):
        searched = max(len(rest) - 1, 0)
        rest += block
        while (end := rest.find(SEPARATOR, searched)) >= 0:
            yield offset, bytes(rest[:end])
            del rest[: end + 2]
            offset, searched, several = offset + end + 2, 0, True
    if several and rest.endswith(b"\n"):
        del rest[-1:]
    if rest:
        yield offset, bytes(rest)


def _jsonl_rows(source: Source) -> Iterator[bytes]:
    with _open(source.path) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{source.path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise GolfError(f"{where}: not JSON ({error}); each line must be one JSON object") from error
            if isinstance(row, dict) and row.get(source.field, "") is None:
                continue  # no document, as a null in parquet
            if not isinstance(row, dict) or not isinstance(row.get(source.field), str):
                keys = f"keys: {', '.join(map(str, list(row)[:8]))}" if isinstance(row, dict) else "not an object"
                raise GolfError(f"{where}: no text in field '{source.field}' ({keys}); set data.text_field")
            try:
                yield row[source.field].encode()
            except UnicodeEncodeError as error:
                raise GolfError(f"{where}: lone surrogate in the text; it cannot be written as UTF-8") from error


def _parquet_rows(source: Source) -> Iterator[bytes]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise GolfError(f"{source.path}: reading parquet needs pyarrow; pip install 'paramgolf[data]'") from error
    try:
        table = pyarrow.parquet.ParquetFile(source.path, memory_map=True)
        names = table.schema_arrow.names
        if source.field not in names:
            columns = ", ".join(names)
            raise GolfError(f"{source.path}: no column '{source.field}' (columns: {columns}); set data.text_field")
        for batch in table.iter_batches(batch_size=256, columns=[source.field]):
            column = batch.column(0)
            if not pyarrow.types.is_string(column.type) and not pyarrow.types.is_large_string(column.type):
                where = f"{source.path}: column '{source.field}'"
                raise GolfError(f"{where} holds {column.type}, not text; set data.text_field")
            for text in column.to_pylist():
                if text:
                    yield text.encode()
    except UnicodeDecodeError as error:
        raise GolfError(f"{source.path}: column '{source.field}' is not UTF-8 ({error}); make it again") from error
    except pyarrow.ArrowException as error:
        raise GolfError(f"{source.path}: damaged or not a parquet file ({error}); make it again") from error
