"""What the tests of the main job share: a tiny recipe by overrides only, and the command line in and out of process."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from paramgolf.cli import main

TINY = [
    "data.vocab_size=512", "data.tokenizer_text_bytes=200000", "data.val_max_bytes=20000",
    "model.dim=32", "model.num_layers=4", "model.num_heads=4", "model.num_kv_heads=2", "model.mlp_hidden=48",
    "train.seq_len=64", "train.batch_tokens=512", "train.compile=off", "train.log_every=1",
    "schedule.warmup_steps=1", "budget.seconds=0", "budget.steps=6",
]  # fmt: skip


class Answer(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


def golf(*arguments: str | Path, **kwargs: Any) -> Answer:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "paramgolf", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)
    return Answer(done.returncode, done.stdout, done.stderr)


def golf_here(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> Answer:
    """The same in this process: seconds faster, for tests that do not end it."""
    capfd.readouterr()
    code = main([str(a) for a in arguments])
    out, err = capfd.readouterr()
    return Answer(code, out, err)


def error_line(answer: Answer) -> str:
    """The one error line of a refused command: exit code 2, nothing on stdout, nothing after it on stderr."""
    assert answer.code == 2, answer
    assert answer.out == ""
    *before, last = answer.err.splitlines()
    assert last.startswith("golf: error: "), answer.err
    assert not any("error" in line.lower() or "Traceback" in line for line in before), answer.err
    return last


def losses(run: Path) -> list[float]:
    """The training loss of each logged step."""
    return [json.loads(line)["loss"] for line in (run / "train.jsonl").read_text().splitlines()]


def prose(size: int = 60_000) -> str:
    """Text with a large enough vocabulary of its own: the source of a module that every Python has."""
    return inspect.getsource(argparse)[:size]


def one_thread() -> dict[str, str]:
    """The environment of a child process that shares the machine with other tests."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def refused(capfd: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str | Path) -> str:
    """The error line of a run that must not leave a folder."""
    out = tmp_path / "run"
    line = error_line(golf_here(capfd, "run", "pocket", *TINY, *arguments, "--out", out))
    assert not out.exists(), list(out.rglob("*"))
    return line
