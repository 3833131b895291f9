"""Reading text: formats, compression, separators, folders, and one clear error for each kind of bad input."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import sys
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from paramgolf.data import builtin, sources, split
from paramgolf.data.sources import Source, find, is_validation, kind_of, spool_stdin
from paramgolf.errors import GolfError


def read(path: Path, field: str = "text") -> list[bytes]:
    found, _ = find(path, field)
    return [bytes(d.data) for source in found for d in source.documents()]


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        (b"one\n", [b"one\n"]),  # a single document keeps its newline
        (b"one", [b"one"]),
        (b"one\x1e\ntwo\n", [b"one", b"two"]),
        (b"one\x1e\ntwo\n\n", [b"one", b"two\n"]),
        (b"one\x1e\n\x1e\ntwo", [b"one", b"two"]),
        (b"one\x1e\n", [b"one"]),
        (b"\x1e\n\n", []),
        (b"a\x1eb\x1e\nc\x1e", [b"a\x1eb", b"c\x1e"]),
        (b"", []),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_separators_and_the_last_newline_belong_to_no_document(
    tmp_path: Path, text: bytes, documents: list[bytes], suffix: str
) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(gzip.compress(text) if suffix else text)
    assert read(path) == documents


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab\n\x1eé "), min_size=1, max_size=6), min_size=1, max_size=6))
def test_joined_documents_read_back(texts: list[str]) -> None:
    import tempfile

    documents = [part for text in texts for part in text.encode().split(sources.SEPARATOR) if part]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.txt")
        path.write_bytes(split.join(documents))
        assert read(path) == documents


def test_large_documents_cross_the_blocks(tmp_path: Path) -> None:
    documents = [b"x" * 1_500_000 + "é".encode() * 700_000, b"y" * 10_000_000, b"z"]
    text = split.join(documents)
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / "b.txt.zst").write_bytes(zstandard.compress(text, 1))
    assert read(tmp_path / "a.txt") == documents
    assert read(tmp_path / "b.txt.zst") == documents


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        (".gz", gzip.compress),
        (".xz", lzma.compress),
        (".bz2", bz2.compress),
        (".zst", lambda data: zstandard.compress(data[:4]) + zstandard.compress(data[4:])),
    ],
)
def test_compressed_files(tmp_path: Path, suffix: str, pack: object) -> None:
    data = pack(b"hello\x1e\nworld\n")  # type: ignore[operator]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(data)
    assert read(path) == [b"hello", b"world"]
    path.write_bytes(data[: len(data) - 5])
    with pytest.raises(GolfError, match=r"a\.txt\..*damaged compressed file"):
        read(path)
    path.write_bytes(b"plain text, not compressed")
    with pytest.raises(GolfError, match="although its name says so"):
        read(path)


@pytest.mark.parametrize("suffix", [".BZ2", ".LZMA", ".GZ"])
def test_suffixes_of_compression_in_capitals(tmp_path: Path, suffix: str) -> None:
    pack = {".BZ2": bz2.compress, ".LZMA": lambda data: lzma.compress(data, lzma.FORMAT_ALONE), ".GZ": gzip.compress}
    (tmp_path / f"a.txt{suffix}").write_bytes(pack[suffix](b"hello"))
    assert read(tmp_path / f"a.txt{suffix}") == [b"hello"]


def test_bz2_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    for data in (b"", b"hello"):
        (tmp_path / "a.txt").write_bytes(bz2.compress(data))
        assert read(tmp_path / "a.txt") == ([data] if data else [])
    (tmp_path / "a.txt").write_bytes(b"BZh9 is how such files begin\n")
    assert read(tmp_path / "a.txt") == [b"BZh9 is how such files begin\n"]


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)])
def test_a_changed_byte_of_a_file_that_carries_sums(tmp_path: Path, suffix: str, pack: object) -> None:
    data = pack(b"hello " * 100)  # type: ignore[operator]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(data[:-6] + bytes([data[-6] ^ 255]) + data[-5:])
    with pytest.raises(GolfError, match=r"a\.txt\..*damaged compressed file.*make it again"):
        read(path)


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\\nline"}\n\n{"text": "two\\u001e\\nthree", "x": 1}\n{"text": ""}\n{"text": null}\n')
    assert read(path) == [b"one\nline", b"two", b"three"]
    path.write_text('{"body": "é"}\n')
    assert read(path, "body") == ["é".encode()]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "line 2: not JSON"),
        ('{"body": "a"}', r"line 2: no text in field 'text' \(keys: body\)"),
        ('{"text": 3}', "line 2: no text in field 'text'"),
        ('["a"]', "line 2: .*not an object"),
        ('{"text": "\\ud800"}', "line 2: lone surrogate"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(GolfError, match=message):
        read(path)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "zwei é", ""], "n": [1, 2, 3, 4]}), path)
    assert read(path) == [b"one", "zwei é".encode()]
    with pytest.raises(GolfError, match=r"no column 'body' \(columns: text, n\)"):
        read(path, "body")
    with pytest.raises(GolfError, match="holds int64, not text"):
        read(path, "n")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(GolfError, match="damaged or not a parquet file"):
        read(path)


@pytest.mark.parametrize("suffix", [".txt", ".txt.xz"])
@pytest.mark.parametrize(
    ("data", "offset", "byte"),
    [
        (b"abc\xff", 3, "ff"),
        (b"one\x1e\ntw\xc3", 7, "c3"),
        (b"\x80", 0, "80"),
        (b"x" * 1_048_575 + "é".encode() + b"\xfe", 1_048_577, "fe"),
        (b"x" * 1_048_575 + b"\xc3(", 1_048_575, "c3"),
    ],
)
def test_binary_is_refused_with_file_and_offset(
    tmp_path: Path, data: bytes, offset: int, byte: str, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(lzma.compress(data, preset=0) if suffix.endswith("xz") else data)
    with pytest.raises(GolfError, match=rf"a\.txt.*not UTF-8 text: byte 0x{byte} at offset {offset};"):
        read(path)


def test_a_folder_lists_what_it_leaves_out(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl", "readme.md", "pic.png", ".hidden.txt", "sub/c.text.gz", "sub/d.tar.xz"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    found, skipped = find(tmp_path)
    assert [source.name for source in found] == ["a.jsonl", "b.txt", "sub/c.text.gz"]
    assert skipped == ["pic.png", "readme.md", "sub/d.tar.xz"]


def test_runs_and_prepared_datasets_in_a_folder_are_left_out(tmp_path: Path) -> None:
    names = ["a.txt", "runs/b/recipe.toml", "runs/b/data.json", "runs/b/train.jsonl", "runs/b/deep/c.txt"]
    names += ["runs/d/recipe.toml", "runs/d/record.json", "runs/d/train.jsonl", "runs/notes.txt"]
    names += ["made/passport.json", "made/tokenizer.model", "made/val.txt"]
    names += ["mine/passport.json", "mine/e.txt", "own/recipe.toml", "own/train.jsonl"]  # only half of ours
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found, skipped = find(tmp_path)
    assert [source.name for source in found] == ["a.txt", "mine/e.txt", "own/train.jsonl", "runs/notes.txt"]
    assert skipped == ["made/", "mine/passport.json", "own/recipe.toml", "runs/b/", "runs/d/"]


def test_globs_and_files_named_outright_take_any_name(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("print()\n")
    (tmp_path / "b.py").write_text("pass\n")
    assert [s.kind for s in find(tmp_path / "a.py")[0]] == ["text"]
    assert [s.name for s in find(str(tmp_path / "*.py"))[0]] == ["a.py", "b.py"]


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(GolfError, match=r"no such file or folder: .*absent"):
        find(tmp_path / "absent")
    with pytest.raises(GolfError, match="no such file or folder: ~nobody-of-that-name"):
        find("~nobody-of-that-name/a.txt")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GolfError, match="neither a file nor a folder"):
        find(tmp_path / "pipe")
    (tmp_path / "pipe").unlink()
    with pytest.raises(GolfError, match="no file matches"):
        find(str(tmp_path / "*.txt"))
    with pytest.raises(GolfError, match="it is empty"):
        find(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(GolfError, match=r"no \.txt, \.jsonl or \.parquet file \(it holds a\.png\)"):
        find(tmp_path)


def test_kinds_by_name() -> None:
    kinds = {"a.TXT": "text", "a.txt.gz": "text", "a.jsonl.zst": "jsonl", "a.ndjson": "jsonl", "a.parquet": "parquet"}
    assert {name: kind_of(Path(name)) for name in kinds} == kinds
    assert [kind_of(Path(name)) for name in ("a", "a.md", "a.tar.xz", ".gz")] == [None] * 4


def test_validation_is_a_word_in_a_name() -> None:
    yes = ["val.txt", "webtext_val.txt.gz", "fineweb-VAL-000.jsonl", "my.validation.txt", "valid2.txt"]
    no = ["interval.txt", "values.jsonl", "carnival.txt", "evaluation.txt", "trainval.txt", "a.txt", "éval.txt"]
    assert [name for name in yes + no if is_validation(Source(Path("val", name), "text"))] == yes


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(GolfError, match="cannot read"):
        list(Source(tmp_path / "gone.txt", "text").documents())


def test_builtin_corpus_is_real_text_without_tables() -> None:
    documents = {d.name: bytes(d.data) for d in builtin.documents()}
    assert {"argparse.py", "json/decoder.py", "pydoc/assert"} <= documents.keys()
    assert 3_000_000 < sum(map(len, documents.values())) < 30_000_000
    left_out = ("encodings/", "json/test", "tkinter/", "site-packages", "pydoc_data", "_sysconfigdata", "idlelib")
    assert not [name for name in documents if any(part in name for part in left_out)]
    assert len({split.digest(data) for data in documents.values()}) > 0.98 * len(documents)
    json.dumps([data.decode() for data in documents.values()])  # all UTF-8


def test_parquet_that_is_not_utf8(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    texts = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"fine", b"caf\xe9"]).buffers())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.raises(GolfError, match=r"a\.parquet: column 'text' is not UTF-8"):
        read(tmp_path / "a.parquet")


def spooled(monkeypatch: pytest.MonkeyPatch, folder: Path, content: bytes) -> Source:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    return spool_stdin(folder)


def test_standard_input_says_what_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long_line = json.dumps({"text": "many words " * 20_000}).encode()  # longer than any block that is looked at
    assert spooled(monkeypatch, tmp_path, long_line + b"\n").kind == "jsonl"
    assert spooled(monkeypatch, tmp_path, gzip.compress(long_line)).kind == "jsonl"
    assert spooled(monkeypatch, tmp_path, bz2.compress(long_line)).kind == "jsonl"
    assert spooled(monkeypatch, tmp_path, b"[" * 100_000).kind == "text"
    assert {path.suffix for path in tmp_path.iterdir()} == {".jsonl", ".text"}


def test_standard_input_that_cannot_be_read_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(GolfError, match="standard input: damaged compressed file"):
        spooled(monkeypatch, tmp_path, gzip.compress(b"hello " * 1000)[:-20])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(GolfError, match=r"cannot keep standard input in .*a file: (File exists|Not a directory)"):
        (tmp_path / "a file").touch()
        spooled(monkeypatch, tmp_path / "a file", b"hello")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(GolfError, match="standard input is closed"):
        spool_stdin(tmp_path)
