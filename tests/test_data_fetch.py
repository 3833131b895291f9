"""Fetching the published shards, against a stand-in hub on loopback."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from paramgolf.data.bpe import train_bpe
from paramgolf.data.dataset import prepare
from paramgolf.data.fetch import REPOSITORY, fetch_fineweb
from paramgolf.data.shards import header
from paramgolf.data.tokenizer import Tokenizer
from paramgolf.errors import CheckFailed, GolfError
from paramgolf.recipe.sections import DataSection
from tests.hub_standin import COMMIT, Hub, serve

pytest.importorskip("huggingface_hub")


def shard(tokens: np.ndarray) -> bytes:
    return header(len(tokens)) + tokens.astype("<u2").tobytes()


def export(tokenizer: Tokenizer) -> dict[str, bytes]:
    """A published export in small: one data set, two training shards."""
    rng = np.random.default_rng(5)
    size = tokenizer.vocab_size
    manifest = {
        "datasets": [
            {
                "name": f"fineweb10B_sp{size}",
                "tokenizer_name": f"sp_bpe_{size}",
                "stats": {"files_train": 2, "files_val": 1},
            }
        ],
        "tokenizers": [{"name": f"sp_bpe_{size}", "model_path": f"tokenizers/fineweb_{size}_bpe.model"}],
    }
    files = {
        "datasets/manifest.json": json.dumps(manifest).encode(),
        f"datasets/tokenizers/fineweb_{size}_bpe.model": tokenizer.to_bytes(),
    }
    for name in ("val_000000", "train_000000", "train_000001"):
        tokens = rng.integers(4, size, 4000)
        tokens[::100] = 1
        files[f"datasets/datasets/fineweb10B_sp{size}/fineweb_{name}.bin"] = shard(tokens)
    return files


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with serve(REPOSITORY, export(train_bpe([b"the cat and the dog and the bird " * 50], 300))) as server:
        # no setdefault: the variable must be honoured when it is read, not when huggingface_hub was imported
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.fixture
def size(hub: Hub) -> str:
    return next(name for name in hub.files if "train_000000" in name).split("fineweb10B_")[1].split("/")[0]


def test_fetched_shards_are_ready_to_use(hub: Hub, size: str, tmp_path: Path) -> None:
    result = fetch_fineweb(size, 1, tmp_path / "fineweb")
    names = {Path(file["path"]).name for file in result["files"]}
    vocab = int(size[2:])
    assert names == {"fineweb_val_000000.bin", "fineweb_train_000000.bin", f"fineweb_{vocab}_bpe.model"}
    assert result["revision"] == COMMIT
    data = prepare(DataSection(vocab_size=vocab), result["folder"], cache=tmp_path / "cache")
    assert data.tokenizer.vocab_size == vocab
    assert [len(t) for t in data.train_tokens()] == [4000]
    assert data.val_bytes is None and data.val_text is None


def test_a_second_fetch_downloads_only_what_is_missing(hub: Hub, size: str, tmp_path: Path) -> None:
    fetch_fineweb(size, 1, tmp_path)
    hub.served.clear()
    result = fetch_fineweb(size, 2, tmp_path)
    assert result["kept"] == 3
    assert [name for name in hub.served if name.endswith(".bin")] == [
        name for name in hub.files if "train_000001" in name
    ]


def test_a_file_damaged_on_disk_is_fetched_again(hub: Hub, size: str, tmp_path: Path) -> None:
    result = fetch_fineweb(size, 1, tmp_path)
    victim = Path(result["folder"], "fineweb_train_000000.bin")
    good = victim.read_bytes()
    victim.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert fetch_fineweb(size, 1, tmp_path)["kept"] == 2
    assert victim.read_bytes() == good


def test_a_broken_connection_goes_on_where_it_broke(hub: Hub, size: str, tmp_path: Path) -> None:
    name = next(name for name in hub.files if "train_000000" in name)
    hub.cut[name] = 3000
    result = fetch_fineweb(size, 1, tmp_path)
    assert Path(result["folder"], "fineweb_train_000000.bin").read_bytes() == hub.files[name]


def test_wrong_content_is_refused(hub: Hub, size: str, tmp_path: Path) -> None:
    name = next(name for name in hub.files if "train_000000" in name)
    hub.corrupt.add(name)
    with pytest.raises(CheckFailed, match=r"train_000000.bin: the hash"):
        fetch_fineweb(size, 1, tmp_path)
    assert not list(tmp_path.rglob("fineweb_train_*.bin"))
    hub.corrupt.clear()
    fetch_fineweb(size, 1, tmp_path)


@pytest.mark.parametrize(
    ("variant", "shards", "message"),
    [("sp1", 1, "no data set for variant 'sp1'"), ("llama", 1, "unknown variant 'llama'"), ("", 99, "has 2 training")],
)
def test_bad_requests(hub: Hub, size: str, tmp_path: Path, variant: str, shards: int, message: str) -> None:
    with pytest.raises(GolfError, match=message):
        fetch_fineweb(variant or size, shards, tmp_path)


def test_an_unknown_repository_is_named(hub: Hub, size: str, tmp_path: Path) -> None:
    with pytest.raises(GolfError, match="no dataset repository 'someone/else'"):
        fetch_fineweb(size, 1, tmp_path, repository="someone/else")


def test_a_manifest_cannot_write_outside(hub: Hub, size: str, tmp_path: Path) -> None:
    manifest = json.loads(hub.files["datasets/manifest.json"])
    manifest["tokenizers"][0]["model_path"] = "../../evil.model"
    hub.files["datasets/manifest.json"] = json.dumps(manifest).encode()
    with pytest.raises(GolfError, match="outside the data folder"):
        fetch_fineweb(size, 1, tmp_path)


def test_no_server_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(GolfError, match=r"cannot fetch from http://127.0.0.1"):
        fetch_fineweb("sp1024", 1, tmp_path)
