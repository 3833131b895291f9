"""Folders of token shards that were made elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from paramgolf.data.bpe import train_bpe
from paramgolf.data.dataset import open_text, prepare
from paramgolf.data.shards import write_shard
from paramgolf.errors import GolfError
from paramgolf.recipe.sections import DataSection
from tests.data_common import SMALL, topics, write


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """The layout of the official export: datasets/<name>/ and tokenizers/."""
    tokenizer = train_bpe(topics(), 300)
    folder = tmp_path / "datasets" / "fineweb10B_sp300"
    folder.mkdir(parents=True)
    write_shard(folder / "fineweb_train_000000.bin", tokenizer.encode_documents(topics()[:20]))
    write_shard(folder / "fineweb_train_000001.bin", tokenizer.encode_documents(topics()[20:30]))
    write_shard(folder / "fineweb_val_000000.bin", tokenizer.encode_documents(topics()[29:33]))
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers" / "fineweb_300_bpe.model").write_bytes(tokenizer.to_bytes())
    return folder


def test_official_shards(export: Path, tmp_path: Path) -> None:
    data = prepare(SMALL, export, cache=tmp_path / "cache")
    assert [p.name for p in data.train_shards] == ["fineweb_train_000000.bin", "fineweb_train_000001.bin"]
    assert (data.val_bytes, data.val_text) == (None, None)
    assert (data.val_tokens() == data.tokenizer.encode_documents(topics()[29:33])).all()
    tokens, size, sizes = open_text(export, data.tokenizer)
    assert (tokens == data.val_tokens()).all() and size is None and sizes == []


def test_a_tokenizer_of_another_vocabulary(export: Path, tmp_path: Path) -> None:
    with pytest.raises(GolfError, match=r"300 pieces, the recipe says data\.vocab_size = 1024"):
        prepare(DataSection(), export, cache=tmp_path / "cache")
    other = tmp_path / "other.model"
    other.write_bytes(train_bpe(topics(), 290).to_bytes())
    with pytest.raises(GolfError, match=r"shards of vocabulary 300, but .*other.model has 290"):
        prepare(DataSection(vocab_size=290, tokenizer=str(other)), export, cache=tmp_path / "cache")
    with pytest.raises(GolfError, match=r"290 pieces, the recipe says data\.vocab_size = 1024"):
        prepare(DataSection(tokenizer=str(other)), "", cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "fineweb_train_000001.bin").write_bytes(b"x" * 2000), "not a token shard"),
        (lambda f: _truncate(f / "fineweb_train_000001.bin"), "truncated"),
        (lambda f: write_shard(f / "fineweb_train_000001.bin", np.array([1, 300])), "token id 300 at position 1"),
        (lambda f: (f / "fineweb_val_000000.bin").unlink(), r"no validation shard \(\*val\*\.bin\)"),
        (lambda f: [p.unlink() for p in f.glob("*train*")], "no training shard"),
        (lambda f: [p.unlink() for p in f.parent.parent.rglob("*.model")], "name the tokenizer with data.tokenizer"),
    ],
)
def test_broken_shard_folders(export: Path, tmp_path: Path, break_it: object, message: str) -> None:
    break_it(export)  # type: ignore[operator]
    with pytest.raises(GolfError, match=message):
        prepare(SMALL, export, cache=tmp_path / "cache")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def test_another_bin_among_texts_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", topics()[:30])
    (tmp_path / "model.bin").write_bytes(bytes(2000))
    data = prepare(SMALL, tmp_path, cache=tmp_path / "cache")
    assert data.passport["skipped_files"] == ["model.bin"]
