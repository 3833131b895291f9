"""The proof: documents decoded by another process, and what must not pass as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paramgolf.data.shards import write_shard
from paramgolf.errors import CheckFailed, GolfError
from paramgolf.runner.folder import RunFolder
from paramgolf.runner.record import SEAL, seal, write_record
from paramgolf.text.blocks import TextModel
from paramgolf.text.prove import _compare, _decode_elsewhere, _prefix, prove
from tests.run_common import error_line, golf_here, prose
from tests.test_text_files import make_artifact


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("model") / "model.golf")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "val.txt"
    path.write_text("\x1e\n".join(prose()[at : at + 900] for at in range(0, 18_000, 900)))
    return path


def proved(artifact: Path, source: Path, **settings: Any) -> dict[str, Any]:
    return prove(artifact, str(source), say=lambda line: None, **settings)


def test_documents(artifact: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paramgolf.text.prove.LANE_TOKENS", 500)
    monkeypatch.setattr("paramgolf.text.prove.MAX_LANES", 4)
    proof = proved(artifact, text)
    assert proof["documents"] == 20 and proof["lanes"] > 8 and proof["text_bytes"] == 18_000
    assert proof["proved_bpb"] == 8 * proof["file_bytes"] / 18_000
    assert 0 < proof["overhead"] < 0.04  # of so short a text


def test_a_prefix_with_a_stride_recorded_in_the_run(
    artifact: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path)
    folder.artifact.write_bytes(artifact.read_bytes())
    record = write_record(folder, {"sha256": {"artifact": TextModel(artifact).sha256}, "val_bpb": 3.0})
    shown = golf_here(capfd, "prove", tmp_path, "--data", text, "--limit", "2000", "--stride", "32", "--json")
    assert shown.code == 0, shown.err
    proof = json.loads(shown.out)
    assert proof["text_bytes"] == 2000 and proof["documents"] == 3 and proof["stride"] == 32
    after = folder.read_record()
    assert after is not None and after["proof"] == proof and after["val_bpb"] == record["val_bpb"]
    assert seal(after)[SEAL] == after[SEAL]
    folder.record.write_text(json.dumps(after | {"val_bpb": 1.0}))
    assert "seal" in error_line(golf_here(capfd, "prove", tmp_path, "--data", text, "--limit", "300"))


def test_shards_are_proved_as_tokens(artifact: Path, text: Path, tmp_path: Path) -> None:
    tokens = TextModel(artifact).tokenizer.encode_documents([d.encode() for d in text.read_text().split("\x1e\n")[:4]])
    write_shard(tmp_path / "fineweb_val_000000.bin", tokens)
    proof = proved(artifact, tmp_path / "fineweb_val_000000.bin")
    assert proof["content"] == "tokens" and proof["bytes_from"] == "table" and proof["documents"] is None


def test_what_is_no_proof(artifact: Path) -> None:
    with pytest.raises(CheckFailed, match="could not be decoded"):
        _decode_elsewhere(artifact, b"\x89GTX nothing of the kind")
    with pytest.raises(CheckFailed, match="number 1"):
        _compare(["a", "b"], ["a", "c"])
    with pytest.raises(CheckFailed, match="2 documents went in, 1 came"):
        _compare(["a", "b"], ["a"])
    with pytest.raises(GolfError, match="twice"):
        prove(artifact, "-", say=lambda line: None)


def test_a_prefix_does_not_cut_characters() -> None:
    assert _prefix(["aé".encode(), b"bb"], 2) == [b"a"]
    assert _prefix([b"aa", b"bbbb"], 4) == [b"aa", b"bb"]
