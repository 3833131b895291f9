"""The shard format: exact bytes, and one clear error for everything that is not a shard."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paramgolf.data.shards import ShardWriter, header, open_shard, read_header, write_shard
from paramgolf.errors import GolfError


def test_bytes_on_disk_are_the_official_format(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, np.array([1, 500, 65535]))
    expected = struct.pack("<256i", 20240520, 1, 3, *[0] * 253) + struct.pack("<3H", 1, 500, 65535)
    assert path.read_bytes() == expected
    tokens = open_shard(path)
    assert isinstance(tokens, np.memmap)
    assert tokens.tolist() == [1, 500, 65535]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 65535), max_size=20), max_size=8), st.integers(1, 9))
def test_a_stream_is_cut_into_shards_and_comes_back(parts: list[list[int]], size: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        with ShardWriter(Path(folder), "train", size) as writer:
            for part in parts:
                writer.write(np.array(part, dtype=np.uint16))
        flat = [token for part in parts for token in part]
        assert writer.tokens == len(flat)
        assert [token for path in writer.paths for token in open_shard(path).tolist()] == flat
        assert all(read_header(path) == size for path in writer.paths[:-1])


def test_truncated_shard(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, np.arange(100))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(GolfError, match=r"a\.bin: truncated: 1223 bytes, 1224 expected for 100 tokens"):
        open_shard(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(GolfError, match="truncated: 500 bytes"):
        open_shard(path)


def test_longer_than_its_header(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(header(3) + b"\0" * 8)
    with pytest.raises(GolfError, match="longer than its header says"):
        read_header(path)


@pytest.mark.parametrize(("word", "value"), [(0, 20240521), (1, 2)])
def test_wrong_magic_or_version(tmp_path: Path, word: int, value: int) -> None:
    words = [20240520, 1, 0] + [0] * 253
    words[word] = value
    path = tmp_path / "a.bin"
    path.write_bytes(struct.pack("<256i", *words))
    with pytest.raises(GolfError, match=r"a\.bin: not a token shard"):
        read_header(path)


def test_token_outside_the_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, np.array([1, 2, 1024, 3]))
    assert len(open_shard(path, 1025)) == 4
    with pytest.raises(GolfError, match="token id 1024 at position 2 is outside the vocabulary of 1024"):
        open_shard(path, 1024)


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(GolfError, match="cannot read shard"):
        open_shard(tmp_path / "none.bin")
    write_shard(tmp_path / "empty.bin", np.zeros(0, np.uint16))
    with pytest.raises(GolfError, match="holds no tokens"):
        open_shard(tmp_path / "empty.bin")


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GolfError, match="between 0 and 65535"):
        write_shard(tmp_path / "a.bin", np.array([70000]))
    assert not list(tmp_path.iterdir())
