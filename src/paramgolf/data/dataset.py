"""From a source of text to a dataset: tokenizer, shards, validation documents and the passport that ties them."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import (
    Annotated,
    Any,
    NotRequired,  # before Python 3.12 pydantic cannot read typing's own
)

import numpy as np
from pydantic import Field, InstanceOf, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from paramgolf import strict_json
from paramgolf.data import build, official, sources
from paramgolf.data.build import PASSPORT, TOKENIZER, VAL_TEXT, Progress
from paramgolf.data.cache import remembered_sha256
from paramgolf.data.shards import open_shard
from paramgolf.data.tokenizer import Tokenizer
from paramgolf.errors import GolfError
from paramgolf.files import user_path
from paramgolf.recipe.sections import DataSection

_Count = Annotated[int, Field(ge=0, lt=2**63)]


class _File(TypedDict):
    """A file of text that the data was made of."""

    sha256: NotRequired[str | None]


class _Shard(TypedDict):
    """A file of tokens."""

    name: str
    sha256: str


class _Side(TypedDict):
    """The training or the validation part."""

    documents: _Count | None
    tokens: _Count
    bytes: _Count | None
    shards: Annotated[list[_Shard], Field(min_length=1)]
    sizes: NotRequired[list[_Shard]]
    sha256: NotRequired[str | None]


class _Tokenizer(TypedDict):
    """The tokenizer, by the hash of its file."""

    sha256: str


class _Passport(TypedDict):
    """The keys of `passport.json` that programs read; the folder may come from anybody."""

    source: NotRequired[list[_File]]
    skipped_files: NotRequired[list[InstanceOf[str]]]  # names, which need not be UTF-8: no `str` to pydantic
    tokenizer: _Tokenizer
    split: str
    train: _Side
    val: _Side
    removed_from_train: NotRequired[_Count]
    val_documents_in_train: NotRequired[_Count | None]


@cache
def _form() -> TypeAdapter[Any]:
    return TypeAdapter(_Passport)


def _read_passport(path: Path) -> dict[str, Any]:
    """The passport in a file. ValueError that names the first key of another form."""
    passport: dict[str, Any] = strict_json.loads(path.read_text(encoding="utf-8"))
    try:
        _form().validate_python(passport, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        message = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise ValueError(message.removeprefix(": ")) from None
    return passport


@dataclass(frozen=True)
class Dataset:
    """Tokens to train on and to score, with what is needed to count bytes.

    val_bytes: true bytes of the validation documents, None for shards that come without their documents.
    val_text: those documents as a plain text file (0x1E and newline between them), None likewise.
    val_sizes: shards beside `val_shards` with the bytes of every token, where its id alone does not say (CaseOps).
    passport: hashes and counts (JSON-able), see `build.py`.
    """

    root: Path
    tokenizer: Tokenizer
    train_shards: list[Path]
    val_shards: list[Path]
    val_bytes: int | None
    val_text: Path | None
    passport: dict[str, Any]
    val_sizes: list[Path] = field(default_factory=list)

    def train_tokens(self) -> list[np.memmap]:
        """The training shards as memory maps, uint16."""
        return [open_shard(path) for path in self.train_shards]

    def val_tokens(self) -> np.ndarray:
        """The whole validation stream, uint16 (n,)."""
        return np.concatenate([open_shard(path) for path in self.val_shards])

    @classmethod
    def open(cls, folder: str | Path) -> Dataset:
        """A folder made by `prepare`."""
        folder = Path(folder)
        try:
            passport = _read_passport(folder / PASSPORT)
            text = folder / VAL_TEXT
            return cls(
                root=folder,
                tokenizer=Tokenizer.load(folder / TOKENIZER),
                train_shards=[folder / shard["name"] for shard in passport["train"]["shards"]],
                val_shards=[folder / shard["name"] for shard in passport["val"]["shards"]],
                val_bytes=passport["val"]["bytes"],
                val_text=text if text.is_file() else None,
                passport=passport,
                val_sizes=[folder / shard["name"] for shard in passport["val"].get("sizes", [])],
            )
        except (OSError, ValueError, RecursionError) as error:
            raise GolfError(f"{folder}: not a prepared dataset ({error}); prepare it again") from error

    def check_hashes(self, cache: Path) -> None:
        """GolfError unless every file is the one that the passport names. Hashes of large files are kept in `cache`."""
        train, val = self.passport["train"], self.passport["val"]
        said = {s["name"]: s.get("sha256") for s in (*train["shards"], *val["shards"], *val.get("sizes", []))}
        said[TOKENIZER] = self.passport["tokenizer"]["sha256"]
        if self.val_text is not None:
            said[VAL_TEXT] = val.get("sha256")
        for name, expected in said.items():
            if remembered_sha256(self.root / name, cache) != expected:
                raise GolfError(f"{self.root / name} is not the file that {PASSPORT} names; prepare it again")


def prepare(
    section: DataSection,
    source: str | Path | None = None,
    *,
    cache: Path,
    progress: Progress | None = None,
    workers: int = 0,
    out: Path | None = None,
) -> Dataset:
    """The dataset of `source` (default: section.train; "" = the built-in corpus, "-" = standard input).

    Text, JSONL and parquet are tokenised into `cache / <content hash>` (or `out`), once for the same content and
    settings. A folder of shards is used where it is. workers: processes, 0 = one for each processor.
    """
    name = str(source if source is not None else section.train)
    folder = user_path(name)
    if name and folder.is_dir():
        if (folder / PASSPORT).is_file():
            dataset = Dataset.open(folder)
            official.check_vocabulary(dataset.tokenizer, section, where=str(folder / TOKENIZER), given=True)
            official.check_case(dataset.tokenizer, section, where=str(folder / TOKENIZER))
            dataset.check_hashes(cache)
            return dataset
        if official.has_shards(folder):
            if out is not None:
                raise GolfError(f"{name}: these are shards already; use the folder where it is, without --out")
            shards = official.find(folder, section, cache)
            size = shards.passport["val"]["bytes"]
            return Dataset(
                folder, shards.tokenizer, shards.train, shards.val, size, None, shards.passport, shards.sizes
            )
    if name and folder.suffix == ".bin":
        raise GolfError(f"{name}: give the folder of the shards, not one shard")
    return Dataset.open(build.build(section, name, cache=Path(cache), out=out, progress=progress, workers=workers))


def open_text(
    source: str | Path, tokenizer: Tokenizer, *, field: str = "text"
) -> tuple[np.ndarray, int | None, list[int]]:
    """(tokens uint16 with BOS before each document, true bytes, bytes of each document) of the whole of `source`.

    Of a folder: its validation part if it has one. Shards carry no documents: (tokens, None, []), with the bytes of a
    CaseOps export where its sidecar is.
    """
    if not str(source):
        raise GolfError("no text is named, as by a variable that is not set; give a file, a folder or '-'")
    if str(source) == "-":
        with tempfile.TemporaryDirectory() as spool:
            documents = [bytes(d.data) for d in sources.spool_stdin(Path(spool), field).documents()]
        return _as_stream(documents, "standard input", tokenizer)
    path = user_path(source)
    if path.is_dir() and (path / VAL_TEXT).is_file() and (path / PASSPORT).is_file():
        path = path / VAL_TEXT
    elif path.is_dir() and official.has_shards(path):
        _, val = official.shard_files(path)
        tokens = np.concatenate([open_shard(p, tokenizer.vocab_size) for p in val])
        sizes = open_sizes(path, tokenizer)
        return tokens, None if sizes is None else int(sizes.sum(dtype=np.int64)), []
    elif path.suffix == ".bin":
        sizes = open_sizes(path, tokenizer)
        tokens = np.array(open_shard(path, tokenizer.vocab_size))
        return tokens, None if sizes is None else int(sizes.sum(dtype=np.int64)), []
    found, _ = sources.find(path, field)
    held = [s for s in found if sources.is_validation(s)]
    documents = [bytes(d.data) for s in (held if held and path.is_dir() else found) for d in s.documents()]
    return _as_stream(documents, str(source), tokenizer)


def open_sizes(source: str | Path, tokenizer: Tokenizer) -> np.ndarray | None:
    """Bytes of original text of every token of the shards in `source` (a folder's validation part, or one shard), as
    the sidecar of a CaseOps export counts them, uint16 (n,); None where the tokenizer's table counts or is exact."""
    path = user_path(source)
    if not tokenizer.case_operators or tokenizer.reversible:
        return None
    if path.is_dir() and not (path / PASSPORT).is_file() and official.has_shards(path):
        paths = official.sidecar(path, tokenizer, official.shard_files(path)[1])
    elif path.suffix == ".bin":
        paths = [official.sidecar_of(path)]
    else:
        return None
    return np.concatenate([open_shard(p) for p in paths])


def _as_stream(documents: list[bytes], where: str, tokenizer: Tokenizer) -> tuple[np.ndarray, int, list[int]]:
    if not documents:
        raise GolfError(f"{where}: the text is empty; nothing to score")
    sizes = [len(document) for document in documents]
    return tokenizer.encode_documents(documents), sum(sizes), sizes
