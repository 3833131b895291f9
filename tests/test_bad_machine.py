"""A machine that is short of something: a full disk, no compiler, a reader that has left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from paramgolf.train.checkpoint import Store
from tests.run_common import TINY, Answer, error_line, golf_here, prose, refused

CapFd = pytest.CaptureFixture[str]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(prose())
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if mount is None or os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.mark.parametrize("filled", [0, 100_000, 130_000])
def test_a_full_disk(capfd: CapFd, small_disk: Path, text: Path, filled: int) -> None:
    """Full at a checkpoint, at the artifact, or from the start: one line, and no file that is half one."""
    with (small_disk / "ballast").open("wb") as stream:
        try:
            stream.write(bytes(filled))
            stream.flush()
        except OSError:
            assert filled > 128 * 1024
    out = small_disk / "run"
    options = ["train.checkpoint_every_steps=2", "model.mlp_hidden=200", "--data", text, "--out", out]
    line = error_line(golf_here(capfd, "run", "pocket", *TINY, *options))
    assert "No space left" in line and str(small_disk) in line and "free space" in line
    assert not list(small_disk.rglob("*.tmp"))
    assert not (out / "model.golf").exists()
    assert all(Store(out / "checkpoints").newest(pytest.fail) for _ in Store(out / "checkpoints").paths()[:1])


def test_a_full_cache(
    capfd: CapFd, small_disk: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARAMGOLF_CACHE", str(small_disk / "cache"))
    text.write_text(prose() * 20)
    line = refused(capfd, tmp_path, "--data", text)
    assert "No space left" in line and "cache" in line
    assert not list(small_disk.rglob("*.bin"))


def test_no_compiler(capfd: CapFd, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    options = ["train.compile=on", "train.kernels=plain", "--data", text, "--out", tmp_path / "run", "--json"]
    answer = golf_here(capfd, "run", "pocket", *TINY, *options)
    assert answer.code == 0, answer.err
    assert "no C++ compiler was found" in answer.err
    assert '"enabled": false' in answer.out
    assert "none: training runs uncompiled" in golf_here(capfd, "doctor").out


def test_a_width_that_the_fused_kernels_cannot_run_is_told(capfd: CapFd, tmp_path: Path, text: Path) -> None:
    options = ["train.dtype=bfloat16", "train.compile=off", "model.mlp_hidden=60", "--data", text]
    answer = golf_here(capfd, "run", "pocket", *TINY, *options, "--out", tmp_path / "run")
    assert answer.code == 0, answer.err
    assert "without the fused CPU kernels: widths must be multiples of 16" in answer.err


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m paramgolf recipes pocket | head -1"
    answer = Answer(*_shell(command))
    assert answer.code == 0 and answer.err == "" and answer.out.count("\n") == 1


def _shell(command: str) -> tuple[int, str, str]:
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr
