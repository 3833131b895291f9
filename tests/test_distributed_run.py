"""`torchrun -m paramgolf run`: the losses of one process, one result, one message when a rank fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from paramgolf.cli import main
from paramgolf.data.shards import open_shard, write_shard
from paramgolf.files import sha256_file
from tests.run_common import TINY, Answer, losses, one_thread, prose

STEPS = 10
EXACT = [
    "train.dtype=float32", "optim.ns_dtype=float32", "train.threads=1", f"budget.steps={STEPS}", "pack.codec=zlib",
    "score.stride=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder: no process tokenises anything."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(prose())
    arguments = ["--vocab-size", "512", "--val-max-bytes", "4000", "--out", str(folder / "prepared")]
    assert main(["data", "prepare", str(folder / "text.txt"), *arguments]) == 0
    return folder / "prepared"


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert main(["run", "pocket", *TINY, *EXACT, "--data", str(data), "--out", str(out)]) == 0
    return out


def torchrun(world: int, *arguments: str | Path, timeout: float = 300.0) -> Answer:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    command = [*launcher, "-m", "paramgolf", "run", "pocket", *TINY, *EXACT, *map(str, arguments)]
    environment = {k: v for k, v in one_thread().items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=timeout, env=environment, cwd=os.getcwd()
    )
    return Answer(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("world", [2, 3])  # 8 rows a step: even and uneven
def test_the_losses_of_one_process_and_one_result(alone: Path, data: Path, tmp_path: Path, world: int) -> None:
    out = tmp_path / "run"
    answer = torchrun(world, "--data", data, "--out", out, "--json")
    assert answer.code == 0, answer.err
    record = json.loads(answer.out)  # exactly one object
    assert record["training"]["world"] == world and record["steps"] == STEPS
    single, several = losses(alone), losses(out)
    assert len(single) == len(several) == STEPS
    assert max(abs(a - b) for a, b in zip(single, several, strict=True)) < 1e-4
    assert single[-1] < single[0] - 0.05, "it learns"
    assert len(list(tmp_path.rglob("model.golf"))) == 1
    reference = json.loads((alone / "record.json").read_text())
    assert record["val_bpb"] == pytest.approx(reference["val_bpb"], abs=2e-3)
    assert record["scored_tokens"] == reference["scored_tokens"] and record["scored_bytes"] == reference["scored_bytes"]
    assert "Traceback" not in answer.err and "warn" not in answer.err.lower(), answer.err


def error_lines(answer: Answer) -> list[str]:
    return [line for line in answer.err.splitlines() if "golf: error:" in line]


def test_a_failing_rank_ends_all_with_its_message(data: Path, tmp_path: Path) -> None:
    """The second row of the first step belongs to rank 1; it holds an id that the vocabulary does not have."""
    folder = tmp_path / "data"
    folder.mkdir()
    for path in data.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tokens = np.array(open_shard(folder / "train_000000.bin"))
    tokens[3000:3010] = 60_000
    write_shard(folder / "train_000000.bin", tokens)
    passport = json.loads((folder / "passport.json").read_text())
    passport["train"]["shards"][0]["sha256"] = sha256_file(folder / "train_000000.bin")
    (folder / "passport.json").write_text(json.dumps(passport))
    begun = time.monotonic()
    options = ["data.order=sequential", "budget.steps=100000", "--data", folder, "--out", tmp_path / "run"]
    answer = torchrun(2, *options, timeout=240.0)
    assert answer.code != 0 and answer.out == ""
    assert time.monotonic() - begun < 200
    lines = error_lines(answer)
    assert len(lines) == 1 and "rank " in lines[0] and "60000" in lines[0], answer.err
    assert not (tmp_path / "run" / "model.golf").exists()


def test_bad_input_is_said_once(tmp_path: Path) -> None:
    answer = torchrun(2, "--data", "/no/such/text.txt", "--out", tmp_path / "run")
    assert answer.code != 0 and answer.out == ""
    lines = error_lines(answer)
    assert len(lines) == 1 and "/no/such/text.txt" in lines[0], answer.err
    assert not (tmp_path / "run").exists()
