"""The command line around the commands: streams, signals, and failures that are nobody's bug."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.run_common import error_line, golf, golf_here, one_thread, prose
from tests.test_text_files import make_artifact

GOLF = f"{sys.executable} -m paramgolf"


def test_what_the_system_refuses_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    unreadable = Path("/proc/self/mem")  # for root, too
    if not unreadable.is_file():
        pytest.skip("no /proc here")
    line = error_line(golf_here(capfd, "inspect", unreadable))
    assert "Input/output error" in line and "check the path" in line


def test_a_reader_that_left_before_the_first_line_is_no_error() -> None:
    command = ["bash", "-o", "pipefail", "-c", f"{GOLF} recipes pocket | true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"])
def test_bad_input_exits_with_2_where_stderr_takes_nothing(stderr: str) -> None:
    assert subprocess.run(["bash", "-c", f"{GOLF} nosuch {stderr}"], check=False).returncode == 2


def test_closed_standard_streams_are_one_line(tmp_path: Path) -> None:
    make_artifact(tmp_path / "model.golf")
    (tmp_path / "t").write_text(prose(300))
    for command, said in [
        ("compress -m model.golf -o z.gtx <&-", "standard input is closed"),
        ("decompress -m model.golf -o z <&-", "standard input is closed"),
        ("compress t -m model.golf -o - >&-", "standard output is closed"),
        ("sample model.golf x >&-", "standard output is closed"),
    ]:
        line = ["bash", "-c", f"{GOLF} {command}"]
        done = subprocess.run(line, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=one_thread(), check=False)
        assert done.returncode == 2 and done.stderr.startswith("golf: error: ") and said in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.golf", "t"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prove", "--set", "anything"], "--set anything: only ttt.* can be set for a proof"),
        (["prove", "--set", "ttt.lr=0.003"], "--set ttt.lr has no effect without --ttt; add it"),
        (["prove", "--ttt", "--set", "tilt.orders=[8]"], "--set tilt.orders=[8]: only ttt.* can be set for a proof"),
        (["score", "--set", "tilt.orders=[8]", "--set", "ttt.lr=0.003"], "--set ttt.lr has no effect without --ttt"),
    ],
)
def test_settings_that_would_change_nothing_are_refused_by_name(
    arguments: list[str], said: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    artifact = make_artifact(tmp_path / "model.golf")
    (tmp_path / "t").write_text(prose(300))
    command, *rest = arguments
    assert said in error_line(golf_here(capfd, command, artifact, "--data", tmp_path / "t", *rest))


def test_no_character_is_beyond_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('extends = "pocket"\ntitle = "Žluť"\n', encoding="utf-8")
    answer = golf("recipes", tmp_path / "mine.toml", env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert (answer.code, answer.err) == (0, "") and "\\u017dlu\\u0165" in answer.out


@pytest.mark.parametrize(
    "option", [["sample", "m", "--seed", "-1"], ["score", "m", "--data", "t", "--seq-len", "9" * 21]]
)
def test_numbers_beyond_any_use_are_refused_by_name(capfd: pytest.CaptureFixture[str], option: list[str]) -> None:
    assert option[-2] in error_line(golf_here(capfd, *option))


def test_too_little_memory_is_one_line(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "model.golf")
    (tmp_path / "text").write_text(prose(3000))
    arguments = ["score", artifact, "--data", tmp_path / "text", "--ttt", "--set", "ttt.rank=100000000000"]
    assert "not enough memory" in error_line(golf_here(capfd, *arguments))
