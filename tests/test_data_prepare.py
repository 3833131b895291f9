"""Preparing a dataset: splits, passport, cache, processes, and what the shards say about the text."""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from paramgolf.data import builtin, encode_pool, split
from paramgolf.data.bpe import train_bpe
from paramgolf.data.dataset import Dataset, open_text, prepare
from paramgolf.data.encode_pool import encode_stream
from paramgolf.data.sources import Document
from paramgolf.errors import GolfError
from paramgolf.recipe.sections import DataSection
from tests.data_common import SMALL, topics, write


def documents_of(data: Dataset, side: str) -> list[bytes]:
    """The documents the shards of one side hold."""
    stream = data.val_tokens() if side == "val" else np.concatenate(data.train_tokens())
    parts = np.split(stream, np.flatnonzero(stream == data.tokenizer.bos_id))[1:]
    return [data.tokenizer.decode(part) for part in parts]


def test_built_in_corpus(tmp_path: Path) -> None:
    data = prepare(DataSection(vocab_size=512), cache=tmp_path)
    assert data.val_bytes is not None and 100_000 < data.val_bytes <= 300_000
    assert data.val_text is not None
    found = documents_of(data, "val")
    assert sum(map(len, found)) == data.val_bytes
    assert data.tokenizer.token_bytes.total(data.val_tokens()) == data.val_bytes
    everything = {bytes(d.data) for d in builtin.documents()}
    assert set(found) <= everything
    assert set(documents_of(data, "train")) == everything - set(found)
    assert data.passport["val_documents_in_train"] == 0


def test_documents_are_split_by_hash(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", topics())
    data = prepare(SMALL, path, cache=tmp_path / "cache")
    train, val = documents_of(data, "train"), documents_of(data, "val")
    total = sum(map(len, topics()))
    assert sorted(train + val) == sorted(topics())
    assert 0.8 * total / 10 < sum(map(len, val)) <= total / 10
    assert train == [d for d in topics() if d not in val]  # order is kept
    assert data.passport["split"] == "document hash"
    again = write(tmp_path / "b.txt", list(reversed(topics())))
    assert sorted(documents_of(prepare(SMALL, again, cache=tmp_path / "cache"), "val")) == sorted(val)


def test_the_size_limit_of_a_split_holds(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", topics())
    data = prepare(DataSection(vocab_size=300, val_max_bytes=9000), path, cache=tmp_path / "cache")
    assert data.val_bytes is not None and 8100 <= data.val_bytes <= 9000


def test_copies_of_validation_leave_the_training_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", topics() * 3)
    data = prepare(SMALL, path, cache=tmp_path / "cache")
    val = documents_of(data, "val")
    assert len(set(val)) == len(val)
    assert not set(val) & set(documents_of(data, "train"))
    assert data.passport["removed_from_train"] == 2 * len(val)
    assert data.passport["val_documents_in_train"] == 0


def test_one_document_is_split_by_paragraphs(tmp_path: Path) -> None:
    text = b"\n\n".join(topics())
    (tmp_path / "a.txt").write_bytes(text)
    data = prepare(SMALL, tmp_path / "a.txt", cache=tmp_path / "cache")
    train, val = documents_of(data, "train"), documents_of(data, "val")
    assert data.passport["split"] == "paragraphs"
    assert 2 <= len(val) <= 10
    assert sum(map(len, val)) <= len(text) // 10
    assert sum(map(len, train + val)) == len(text)
    assert all(part in text for part in train + val)
    assert all(part.endswith(b"\n\n") or text.endswith(part) for part in val)


def test_a_few_huge_documents_are_split_by_paragraphs_too(tmp_path: Path) -> None:
    half = len(topics()) // 2
    documents = [b"\n".join(topics()[:half]), b"\n".join(topics()[half:])]
    data = prepare(SMALL, write(tmp_path / "a.txt", documents), cache=tmp_path / "cache")
    train, val = documents_of(data, "train"), documents_of(data, "val")
    assert sum(map(len, train + val)) == sum(map(len, documents))
    assert not set(train) & set(val)
    assert val


def test_copies_of_the_document_that_is_cut_leave_the_training_text(tmp_path: Path) -> None:
    one, other = b"\n\n".join(topics()[:30]), b"\n\n".join(topics()[30:60])
    data = prepare(SMALL, write(tmp_path / "a.txt", [one, other, one, other]), cache=tmp_path / "cache")
    train, val = documents_of(data, "train"), documents_of(data, "val")
    assert (data.passport["split"], data.passport["removed_from_train"]) == ("paragraphs", 1)
    assert val and not [part for part in val for document in train if part in document]
    assert sum(map(len, train + val)) in (len(one + one + other), len(one + other + other))


def test_copies_do_not_enlarge_validation(tmp_path: Path) -> None:
    whole = b"\n\n".join(topics())
    one, three = (prepare(SMALL, write(tmp_path / f"{n}.txt", [whole] * n), cache=tmp_path / "cache") for n in (1, 3))
    assert three.passport["removed_from_train"] == 2
    for side in ("train", "val"):
        assert documents_of(three, side) == documents_of(one, side)


def test_files_named_val_are_validation(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    write(folder / "train.txt", topics()[:40])
    write(folder / "my_VAL.txt", topics()[38:50])
    (folder / "notes.md").write_text("left out")
    data = prepare(SMALL, folder, cache=tmp_path / "cache")
    assert documents_of(data, "val") == topics()[38:50]
    assert documents_of(data, "train") == topics()[:38]
    assert (data.passport["split"], data.passport["removed_from_train"]) == ("files named val", 2)
    assert data.passport["skipped_files"] == ["notes.md"]


def test_a_folder_gives_the_same_with_its_own_dataset_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    write(folder / "a.txt", topics())
    made = [prepare(SMALL, folder, cache=tmp_path / "cache", out=folder / "prepared").passport for _ in range(2)]
    assert made[0] == made[1] and made[0]["split"] == "document hash"


def test_data_val_comes_first(tmp_path: Path) -> None:
    write(tmp_path / "train.txt", topics()[:40])
    write(tmp_path / "held.txt", topics()[40:50])
    section = DataSection(vocab_size=300, train=str(tmp_path / "*.txt"), val=str(tmp_path / "held.txt"))
    data = prepare(section, cache=tmp_path / "cache")
    assert documents_of(data, "val") == topics()[40:50]
    assert documents_of(data, "train") == topics()[:40]


def test_jsonl_and_parquet_give_the_same_tokens(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    texts = [d.decode() for d in topics()]
    plain = prepare(SMALL, write(tmp_path / "a.txt", topics()), cache=tmp_path / "cache")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": t}) + "\n" for t in texts))
    parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        section = DataSection(vocab_size=300, text_field="body")
        data = prepare(section, tmp_path / name, cache=tmp_path / "cache")
        for key in ("train", "val", "tokenizer"):
            assert data.passport[key] == plain.passport[key]


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = split.join(topics())
    plain = prepare(SMALL, write(tmp_path / "a.txt", topics()), cache=tmp_path / "cache")
    lines = "".join(json.dumps({"text": d.decode()}) + "\n" for d in topics()).encode()
    for content in (text, lines):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        data = prepare(SMALL, "-", cache=tmp_path / "cache")
        assert data.passport["train"] == plain.passport["train"]
    assert not list((tmp_path / "cache").glob("stdin.*"))


def test_a_given_tokenizer_is_used_unchanged(tmp_path: Path) -> None:
    model = tmp_path / "own.model"
    model.write_bytes(train_bpe(topics()[:9], 290).to_bytes())
    section = DataSection(vocab_size=290, tokenizer=str(model))
    data = prepare(section, write(tmp_path / "a.txt", topics()), cache=tmp_path / "cache")
    assert data.tokenizer.to_bytes() == model.read_bytes()
    assert data.passport["tokenizer"]["origin"] == "given"


def test_the_tokenizer_never_sees_validation_text(tmp_path: Path) -> None:
    marks = [b"quizzical jabberwocky " * 800]
    (tmp_path / "t").mkdir()
    write(tmp_path / "t/train.txt", topics()[:30] + marks)
    write(tmp_path / "t/val.txt", marks)
    data = prepare(DataSection(vocab_size=600), tmp_path / "t", cache=tmp_path / "cache")
    assert "jabberwocky" not in "".join(data.tokenizer.pieces)
    write(tmp_path / "t/val.txt", topics()[40:42])
    data = prepare(DataSection(vocab_size=600), tmp_path / "t", cache=tmp_path / "cache")
    assert [p for p in data.tokenizer.pieces if "jabb" in p]


def test_a_sample_of_the_text_trains_the_tokenizer(tmp_path: Path) -> None:
    section = DataSection(vocab_size=400, tokenizer_text_bytes=20_000)
    data = prepare(section, write(tmp_path / "a.txt", topics()), cache=tmp_path / "cache")
    whole = prepare(DataSection(vocab_size=400), tmp_path / "a.txt", cache=tmp_path / "cache")
    assert data.tokenizer.sha256 != whole.tokenizer.sha256
    assert len(data.val_tokens()) < 1.25 * len(whole.val_tokens())


@pytest.mark.parametrize("workers", [2, 3])
def test_processes_change_nothing(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(encode_pool, "PARALLEL_FROM", 0)
    monkeypatch.setattr(encode_pool, "BATCH_BYTES", 50_000)
    tokenizer = train_bpe(topics()[:20], 400)
    documents = [Document(d) for d in [*topics(), b"\n".join(topics()), b"\xff\x00", "\u2581".encode()]]
    parts = list(encode_stream(documents, tokenizer, total_bytes=1 << 30, workers=workers))
    assert sum(size for _, size in parts) == sum(len(d.data) for d in documents)
    got = np.concatenate([tokens for tokens, _ in parts])
    assert (got == tokenizer.encode_documents(d.data for d in documents)).all()


def test_processes_hear_no_ctrl_c_and_find_the_package_from_anywhere(tmp_path: Path) -> None:
    worker = encode_pool._Worker(train_bpe([], 260))
    try:
        assert os.getpgid(worker._process.pid) != os.getpgrp()
    finally:
        worker.close()
    command = [sys.executable, "-S", "-c", "import paramgolf.errors"]  # -S: nothing that is installed
    environment = encode_pool.child_environment()
    assert subprocess.run(command, cwd=tmp_path, env=environment, check=False).returncode == 0


def test_an_error_while_processes_run_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_pool, "PARALLEL_FROM", 0)
    monkeypatch.setattr(encode_pool, "BATCH_BYTES", 1000)

    def documents() -> object:
        for text in topics()[:20]:
            yield Document(text)
        raise GolfError("bad line")

    with pytest.raises(GolfError, match="bad line"):
        list(encode_stream(documents(), train_bpe([], 260), total_bytes=1 << 30, workers=2))  # type: ignore[arg-type]


# -- what a score reads ---------------------------------------------------------------------------------------------


def test_open_text_reads_all_of_a_file_and_the_validation_part_of_a_folder(tmp_path: Path) -> None:
    tokenizer = train_bpe(topics()[:20], 400)
    path = write(tmp_path / "train.txt", topics()[:5])
    tokens, size, sizes = open_text(path, tokenizer)
    assert (tokens == tokenizer.encode_documents(topics()[:5])).all()
    assert (size, sizes) == (sum(sizes), [len(d) for d in topics()[:5]])
    write(tmp_path / "val.txt", topics()[7:9])
    assert open_text(tmp_path, tokenizer)[2] == [len(d) for d in topics()[7:9]]
    data = prepare(SMALL, path, cache=tmp_path / "cache")
    tokens, size, _ = open_text(data.root, data.tokenizer)
    assert (tokens == data.val_tokens()).all() and size == data.val_bytes
    with pytest.raises(GolfError, match="empty; nothing to score"):
        open_text(write(tmp_path / "none.txt", []), tokenizer)
    with pytest.raises(GolfError, match="no text is named"):
        open_text("", tokenizer)


# -- text that cannot be used ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the training text is empty"),
        (b"\x1e\n\x1e\n", "the training text is empty"),
        (b"x", "cannot be split"),
        (b"abc\xff", "not UTF-8 text: byte 0xff at offset 3"),
    ],
)
def test_unusable_text(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(GolfError, match=message):
        prepare(SMALL, tmp_path / "a.txt", cache=tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").glob("*") if p.is_dir()]


def test_unusable_arguments(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", topics()[:9])
    with pytest.raises(GolfError, match="no such file or folder"):
        prepare(SMALL, tmp_path / "absent.txt", cache=tmp_path / "cache")
    with pytest.raises(GolfError, match="is all of the training text"):
        prepare(DataSection(vocab_size=300, val=str(path)), path, cache=tmp_path / "cache")
    with pytest.raises(GolfError, match="cannot read tokenizer"):
        prepare(DataSection(vocab_size=300, tokenizer="absent.model"), path, cache=tmp_path / "cache")
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(GolfError, match="validation text is empty"):
        prepare(DataSection(vocab_size=300, val=str(tmp_path / "empty.txt")), path, cache=tmp_path / "cache")
    same = write(tmp_path / "copy.txt", topics()[:9])
    with pytest.raises(GolfError, match="nothing is left to train on"):
        prepare(DataSection(vocab_size=300, val=str(same)), path, cache=tmp_path / "cache")
    with pytest.raises(GolfError, match="give the folder of the shards"):
        prepare(SMALL, tmp_path / "a.bin", cache=tmp_path / "cache")


@pytest.mark.parametrize("size", [2, 3, 11, 40, 200, 3000])
def test_short_texts_work(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.txt").write_bytes((b"The quick brown fox jumps.\n" * 200)[:size])
    data = prepare(SMALL, tmp_path / "a.txt", cache=tmp_path / "cache")
    assert len(data.val_tokens()) >= 2
    assert sum(len(t) for t in data.train_tokens()) >= 2


def test_paragraph_blocks_tile_the_document() -> None:
    text = "\n\n".join(f"Absatz {i} " + "wörter " * (i % 17) for i in range(300)).encode()
    for size in (1, 7, 100, 5000, 10**6):
        spans = list(split.blocks(text, size))
        assert spans[0][0] == 0 and spans[-1][1] == len(text)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
        for start, end in spans:
            text[start:end].decode()  # never inside a character


def test_a_score_can_read_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_bpe(topics()[:20], 400)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\x1e\ntwo\n")))
    tokens, size, sizes = open_text("-", tokenizer)
    assert (tokens == tokenizer.encode_documents([b"one", b"two"])).all()
    assert (size, sizes) == (6, [3, 3])
