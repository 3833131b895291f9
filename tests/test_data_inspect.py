"""`golf data inspect` and the other data commands, as a user calls them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paramgolf.data import builtin, split
from paramgolf.data.bpe import train_bpe
from paramgolf.data.dataset import prepare
from paramgolf.data.inspect import inspect, text_of
from paramgolf.data.shards import write_shard
from paramgolf.data.tokenizer import Tokenizer
from paramgolf.errors import GolfError
from paramgolf.recipe.sections import DataSection
from tests.shared import shared_path
from tests.test_data_byte_oracle import trained

DOCUMENTS = [f"Document {i}: {'word ' * (i % 13)}and 42 \u2581 é.\n".encode() for i in range(120)]


@lru_cache
def topics() -> list[bytes]:
    return list(dict.fromkeys(bytes(d.data) for d in builtin.documents() if d.name.startswith("pydoc/")))


def golf(*arguments: str, cwd: Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PARAMGOLF_CACHE": str(cwd / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "paramgolf", "data", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, input=stdin, capture_output=True, check=False)


def answer(*arguments: str, cwd: Path, stdin: bytes = b"") -> dict[str, Any]:
    done = golf(*arguments, "--json", cwd=cwd, stdin=stdin)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def test_prepared_data_is_described_exactly(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(split.join(DOCUMENTS))
    data = prepare(DataSection(vocab_size=300), tmp_path / "a.txt", cache=tmp_path / "cache")
    result = inspect(data.root, cache=tmp_path / "cache")
    total = sum(map(len, DOCUMENTS))
    assert result["train"]["documents"] + result["val"]["documents"] == len(DOCUMENTS)
    assert result["train"]["bytes"] + result["val"]["bytes"] == total
    assert result["val"]["bytes"] == data.val_bytes
    assert result["train"]["tokens"] == sum(len(t) for t in data.train_tokens())
    assert result["val"]["byte_table"] == {
        "true_bytes": data.val_bytes,
        "table_bytes": data.val_bytes,
        "documents": result["val"]["documents"],
        "documents_that_differ": 0,
        "largest_difference": 0,
        "documents_changed": 0,
        "first": [],
    }
    assert result["duplicates"]["val_documents_in_train"] == 0
    assert f"0 of {result['val']['documents']} documents differ" in text_of(result)


def test_copies_are_found_over_shard_ends(tmp_path: Path) -> None:
    tokenizer = train_bpe(topics()[:20], 300)
    stream = tokenizer.encode_documents([*DOCUMENTS[:10], DOCUMENTS[0]])
    middle = len(stream) // 2 + 3
    write_shard(tmp_path / "train_0.bin", stream[:middle])
    write_shard(tmp_path / "train_1.bin", stream[middle:])
    write_shard(
        tmp_path / "val_0.bin", tokenizer.encode_documents(DOCUMENTS[4:12])[1:]
    )  # no BOS, as in the official one
    result = inspect(tmp_path, cache=tmp_path / "cache")
    assert (result["train"]["documents"], result["val"]["documents"]) == (11, 8)
    assert result["duplicates"] == {
        "val_documents_in_train": 6,
        "repeated_train_documents": 1,
        "repeated_val_documents": 0,
    }
    assert result["tokenizer"] is None and "bytes" not in result["val"]


def test_a_lossy_tokenizer_is_found_out(tmp_path: Path) -> None:
    model = shared_path("tokenizers", "fineweb_1024_bpe.model")
    texts = [b"plain words only", b"two  blanks", "\ufb01ne".encode(), b"line\nline"]
    (tmp_path / "a.txt").write_bytes(split.join(texts))
    result = inspect(tmp_path / "a.txt", tokenizer=model, cache=tmp_path / "cache")
    check = result["text"]["byte_table"]
    assert check["true_bytes"] == sum(map(len, texts))
    assert check["documents_that_differ"] == 2  # squeezed blanks; the ligature is two bytes instead of three
    assert [row["document"] for row in check["first"]] == [1, 2] and check["documents_changed"] == 3  # and a newline
    assert "document 1: true 11, table 10, decoded 10: the tokenizer changes the text" in text_of(result)
    assert result["tokenizer"]["reversible"] is False


def test_shards_against_documents_that_lie_elsewhere(tmp_path: Path) -> None:
    tokenizer = Tokenizer(trained())
    texts = [b"plain words only", b"two  blanks", b"more words", b"and a last one"]
    folder, lines = tmp_path / "shards", tmp_path / "docs.jsonl"
    folder.mkdir()
    (folder / "some.model").write_bytes(tokenizer.to_bytes())
    write_shard(folder / "val_0.bin", tokenizer.encode_documents(texts[:3])[1:])
    lines.write_bytes(b"".join(json.dumps({"text": t.decode()}).encode() + b"\n" for t in texts))
    check = inspect(folder, documents=lines, cache=tmp_path)["val"]["byte_table"]
    assert (check["documents"], check["true_bytes"], check["table_bytes"]) == (3, 37, 36)
    assert [row["document"] for row in check["first"]] == [1]
    lines.write_bytes(b'{"text": "one"}\n')
    with pytest.raises(GolfError, match="1 documents, but the tokens hold 3"):
        inspect(folder, documents=lines, cache=tmp_path)
    with pytest.raises(GolfError, match="is the documents themselves"):
        inspect(lines, documents=lines, cache=tmp_path)
    (folder / "some.model").unlink()
    with pytest.raises(GolfError, match="name it with --tokenizer"):
        inspect(folder, documents=lines, cache=tmp_path)


def test_text_is_described_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_bytes(split.join([*DOCUMENTS[:9], DOCUMENTS[0]]))
    (tmp_path / "val.txt").write_bytes(split.join(DOCUMENTS[8:11]))
    (tmp_path / "notes.md").write_text("left out")
    result = answer("inspect", str(tmp_path), cwd=tmp_path)
    assert result["train"] == {"documents": 10, "bytes": sum(map(len, [*DOCUMENTS[:9], DOCUMENTS[0]]))}
    assert result["val"]["documents"] == 3
    assert result["duplicates"]["val_documents_in_train"] == 1
    assert result["duplicates"]["repeated_train_documents"] == 1
    assert result["skipped_files"] == ["notes.md"]


def test_prepare_and_inspect_as_commands(tmp_path: Path) -> None:
    rows = b"".join(json.dumps({"body": d.decode()}).encode() + b"\n" for d in DOCUMENTS)
    made = answer("prepare", "-", "--field", "body", "--vocab-size", "300", "--out", "out", cwd=tmp_path, stdin=rows)
    assert made["folder"] == "out"
    assert made["train"]["documents"] + made["val"]["documents"] == len(DOCUMENTS)
    text = golf("inspect", "out", cwd=tmp_path)
    assert text.returncode == 0
    assert f"{made['val']['bytes']:,} bytes" in text.stdout.decode()
    (tmp_path / "b.txt").write_bytes(split.join(DOCUMENTS))
    plain = golf("prepare", "b.txt", "--tokenizer", "out/tokenizer.model", cwd=tmp_path)
    assert plain.returncode == 0, plain.stderr
    assert (
        plain.stdout.decode().splitlines()[-1]
        == f"vocabulary {made['tokenizer']['vocab_size']}, validation by document hash"
    )
    assert b"tokenising" in plain.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "absent.txt"], "no such file or folder: absent.txt"),
        (["inspect", "binary.txt"], "not UTF-8 text: byte 0xff at offset 2"),
        (["fetch", "wikipedia"], "unknown data 'wikipedia'; known: fineweb"),
        (["fetch", "fineweb", "--variant", "bpe"], "unknown variant 'bpe'"),
        (["prepare", "--tokenizer", "binary.txt"], "not a SentencePiece model"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "binary.txt").write_bytes(b"ab\xff")
    done = golf(*arguments, cwd=tmp_path)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 2
    assert done.stdout == b""
    assert len(lines) == 1 and lines[0].startswith("golf: error: ") and message in lines[0]


def test_official_prefix_counts_like_the_reference() -> None:
    """D_prefix: the table over the start of the official validation stream, document by document."""
    tokenizer = Tokenizer.load(shared_path("tokenizers", "fineweb_1024_bpe.model"))
    with np.load(shared_path("parity", "D_prefix_bytes.npz")) as z:
        tokens, starts, ends = z["first_tokens"], z["doc_start"], z["doc_end"]
        inside = np.flatnonzero(ends <= len(tokens))
        assert len(inside) > 5
        for i in inside:
            stream = tokens[max(starts[i] - 1, 0) : ends[i]]  # from the token before the first, where there is one
            assert tokenizer.token_bytes.total(stream) == z["doc_lut_bytes"][i]
