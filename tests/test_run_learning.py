"""The main job with CaseOps and a score that learns, seen from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import paramgolf
from paramgolf.recipe.load import load_recipe
from paramgolf.runner.run import run
from paramgolf.runner.summary import summary_text
from paramgolf.train.clock import Clock
from tests.run_common import TINY, error_line, golf_here

WORDS = [
    "data.caseops=true", "data.order=coprime", "score.stride=0", "ttt.kind=lora", "ttt.rank=2", "ttt.chunk=32",
    "ttt.lr=0.003", "tilt.orders=[6]",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("learning") / "run"
    record = run(load_recipe("pocket", [*TINY, "data.val_max_bytes=6000", *WORDS]), out=folder, clock=Clock(age=0.0))
    assert record is not None
    return folder, record


def test_the_record_holds_every_score(finished: tuple[Path, dict[str, Any]]) -> None:
    _, record = finished
    assert record["ttt"] == "lora" and record["data"]["val"]["sizes"]
    assert record["val_bpb_ttt"] < record["val_bpb"] + 0.05
    assert 1.0 < record["val_bpb_ttt_tilt"] < 9.0
    assert record["bytes_from"] == "documents" and record["scored_bytes"] == record["data"]["val"]["bytes"]
    assert record["table_bytes"] == record["scored_bytes"]
    assert "test-time training (lora)" in summary_text(record)


def test_the_artifact_says_how_it_learns(
    finished: tuple[Path, dict[str, Any]], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, _ = finished
    artifact = folder / "model.golf"
    manifest = paramgolf.load(artifact).config
    assert manifest["ttt"]["rank"] == 2 and manifest["tilt"] == {"orders": [6]}
    text = tmp_path / "text.txt"
    text.write_text("It SAID: Every Good Boy, the END. " * 12)
    answer = golf_here(capfd, "score", artifact, "--data", text, "--ttt", "--set", "ttt.chunk=16", "--json")
    result = json.loads(answer.out)
    assert answer.code == 0 and result["ttt"] == "lora" and result["val_bpb_ttt"] < result["val_bpb"]
    assert "val_bpb_ttt_tilt" in result
    plain = golf_here(capfd, "score", artifact, "--data", text, "--set", "tilt.orders=[]")
    assert plain.code == 0 and "tilt" not in plain.out and "standard" in plain.out
    line = error_line(golf_here(capfd, "score", artifact, "--data", text, "--ttt", "--set", "ttt.rank=0"))
    assert "ttt.rank = 0" in line
    assert "only ttt" in error_line(golf_here(capfd, "score", artifact, "--data", text, "--set", "model.dim=1"))


def test_files_and_samples_with_case_operators(
    finished: tuple[Path, dict[str, Any]], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    artifact = finished[0] / "model.golf"
    text = tmp_path / "text.txt"
    text.write_bytes(("NASA's iPhone \ue001 and McDonald, ÉA\n" * 40).encode() + b"\xff\x00Abc")
    assert golf_here(capfd, "compress", text, "-m", artifact, "-o", tmp_path / "small").code == 0
    assert golf_here(capfd, "decompress", tmp_path / "small", "-m", artifact, "-o", tmp_path / "back").code == 0
    assert (tmp_path / "back").read_bytes() == text.read_bytes()
    model = paramgolf.load(artifact)
    said = model.sample("The Quick", max_tokens=20, seed=1)
    assert isinstance(said, str) and not set(said) & set("\ue001\ue002\ue003")
