"""`golf run --resume` from the outside: killed at any moment, the file that comes out is the same, byte for byte."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from paramgolf.cli import main
from paramgolf.train.checkpoint import Store
from tests.run_common import TINY, error_line, golf_here, one_thread, prose

CapFd = pytest.CaptureFixture[str]
# Everything that has state: an average chosen on held-out text, QAT that switches on, a phase after training.
BUSY = [
    "budget.steps=60", "train.checkpoint_every_steps=4", "train.threads=1", "score.stride=0", "pack.codec=rans",
    "quant.qat=export", "quant.qat_start=0.5", "quant.post_qat=export", "quant.post_qat_frac=0.1",
    "average.kind=ema", "average.decay=0.9", "average.select=train", "optim.matrix=normuon", "optim.grad_clip=0.5",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(prose())
    arguments = ["--vocab-size", "512", "--val-max-bytes", "4000", "--out", str(folder / "prepared")]
    assert main(["data", "prepare", str(folder / "text.txt"), *arguments]) == 0
    return folder / "prepared"


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without interruption."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert main(["run", "pocket", *TINY, *BUSY, "--data", str(data), "--out", str(out)]) == 0
    return out


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    return ["run", "pocket", *TINY, *BUSY, "--data", str(data), "--out", str(out), *more]


def start(data: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "paramgolf", *arguments(data, out, *more)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=one_thread())


def wait_for(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    while process.poll() is None and not happened():
        time.sleep(0.005)


def logged(out: Path) -> int:
    log = out / "train.jsonl"
    return log.read_text().count("\n") if log.is_file() else 0


def steps(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "train.jsonl").read_text().splitlines()]


def test_killed_at_random_moments_gives_the_same_file(data: Path, straight: Path, tmp_path: Path) -> None:
    out, moments = tmp_path / "run", random.Random(time.time_ns())
    kills = 0
    for attempt in range(3):
        process = start(data, out, *(["--resume"] if attempt else []))
        before = logged(out)
        wait_for(process, lambda seen=before: logged(out) > seen + 2)  # type: ignore[misc]
        time.sleep(moments.uniform(0.0, 0.3))
        if process.poll() is None:
            process.kill()
            kills += 1
        process.communicate()
    last = start(data, out, "--resume")
    _, err = last.communicate()
    assert last.returncode == 0, err
    assert kills >= 1
    assert (out / "model.golf").read_bytes() == (straight / "model.golf").read_bytes()
    assert steps(out) == list(range(1, 61)), "every step is logged once"
    assert not list(out.rglob("*.tmp"))


def test_sigterm_leaves_a_checkpoint_and_says_how_to_go_on(
    capfd: CapFd, data: Path, straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start(data, out, "train.checkpoint_every_steps=0")
    wait_for(process, lambda: logged(out) >= 5)
    process.send_signal(signal.SIGTERM)
    stdout, err = process.communicate()
    assert process.returncode == 143 and stdout == ""
    last = err.splitlines()[-1]
    assert last.startswith("golf: error: interrupted by SIGTERM") and "--resume" in last and str(out) in last
    kept = Store(out / "checkpoints").newest(pytest.fail)
    assert kept is not None and kept.step >= 5 and not (out / "model.golf").exists()
    answer = golf_here(capfd, *arguments(data, out, "train.checkpoint_every_steps=0", "--resume"))
    assert answer.code == 0 and f"resuming from step {kept.step}" in answer.err, answer.err
    assert (out / "model.golf").read_bytes() == (straight / "model.golf").read_bytes()


def test_a_damaged_newest_checkpoint_is_skipped_with_a_note(
    capfd: CapFd, data: Path, straight: Path, tmp_path: Path
) -> None:
    """As a kill after the 12th step leaves it, with the newest of its checkpoints cut short."""
    out = tmp_path / "run"
    process = start(data, out)
    wait_for(process, lambda: len(list(out.glob("checkpoints/step-*"))) >= 2)
    process.kill()
    process.communicate()
    newest, before = Store(out / "checkpoints").paths()
    newest.write_bytes(newest.read_bytes()[:-1000])
    answer = golf_here(capfd, *arguments(data, out, "--resume"))
    assert answer.code == 0, answer.err
    assert newest.name in answer.err and "trying the one before it" in answer.err
    assert f"resuming from step {int(before.stem[-9:])}" in answer.err
    assert (out / "model.golf").read_bytes() == (straight / "model.golf").read_bytes()


def test_resuming_a_finished_run_does_nothing(capfd: CapFd, data: Path, straight: Path) -> None:
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in straight.rglob("*")}
    answer = golf_here(capfd, *arguments(data, straight, "--resume", "--json"))
    assert answer.code == 0
    assert json.loads(answer.out) == json.loads((straight / "record.json").read_text())
    assert "nothing to do" in answer.err
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in straight.rglob("*")}
    page = (straight / "report.html").read_text()
    (straight / "report.html").unlink()  # as if the machine had stopped between record and page
    assert golf_here(capfd, *arguments(data, straight, "--resume")).code == 0
    assert (straight / "report.html").read_text() == page


def test_resuming_nothing_starts_afresh_and_says_so(
    capfd: CapFd, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ["run", "pocket", *TINY, "pack.codec=zlib", "score.stride=0", "--data", str(data)]
    answer = golf_here(capfd, *short, "--out", tmp_path / "new", "--resume")
    assert answer.code == 0 and "starting afresh" in answer.err
    monkeypatch.chdir(tmp_path)
    answer = golf_here(capfd, *short, "--resume")  # without a folder, and no earlier run
    assert answer.code == 0 and "starting afresh" in answer.err
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_resume_without_a_folder_takes_the_newest_unfinished_run(
    capfd: CapFd, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["run", "pocket", *TINY, "pack.codec=zlib", "score.stride=0", "--data", str(data)]
    assert golf_here(capfd, *short).code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    (folder / "record.json").unlink()  # as after a kill in the last phase
    artifact = (folder / "model.golf").read_bytes()
    answer = golf_here(capfd, *short, "train.seed=3", "--resume")  # another recipe: not this one
    assert answer.code == 0 and "starting afresh" in answer.err
    answer = golf_here(capfd, *short, "--resume")
    assert answer.code == 0 and f"going on with runs/{folder.name}" in answer.err
    assert (folder / "model.golf").read_bytes() == artifact and (folder / "record.json").is_file()


def test_other_data_and_a_second_process_are_refused(capfd: CapFd, data: Path, straight: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "run", tmp_path / "other.txt"
    process = start(data, out)
    wait_for(process, lambda: logged(out) >= 5)
    answer = golf_here(capfd, *arguments(data, out, "--resume"))
    assert process.poll() is not None or "another process is running in it" in error_line(answer)
    process.kill()
    process.communicate()
    other.write_text(prose()[::-1])
    answer = golf_here(capfd, *arguments(other, out, "--resume"))
    assert "train" in error_line(answer) and "data.json" in answer.err
    passport = (out / "data.json").read_text()
    for broken in ("[]", "[" * 5000):
        (out / "data.json").write_text(broken)
        assert "data.json" in error_line(golf_here(capfd, *arguments(data, out, "--resume")))
    (out / "data.json").write_text(passport)
    assert Store(out / "checkpoints").paths()
    without = [a for a in arguments(data, out, "--resume") if a not in ("--data", str(data))]
    assert golf_here(capfd, *without).code == 0  # the folder knows where its data is
    assert (out / "model.golf").read_bytes() == (straight / "model.golf").read_bytes()


def test_a_time_budget_counts_what_was_spent_before(capfd: CapFd, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    timed = [
        "budget.steps=0", "budget.seconds=8", "budget.clock=challenge", "budget.count_packing=false",
        "train.checkpoint_every_steps=2", "average.select=always", "quant.post_qat_frac=0.02",
    ]  # fmt: skip
    process = start(data, out, *timed)
    wait_for(process, lambda: logged(out) >= 8)
    process.kill()
    process.communicate()
    if process.returncode != -signal.SIGKILL:
        pytest.skip("the machine is so busy that the run ended before it could be killed")
    first = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    answer = golf_here(capfd, *arguments(data, out, *timed, "--resume", "--json"))
    assert answer.code == 0, answer.err
    record = json.loads(answer.out)
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    again = [row for row in rows if row["step"] > record["training"]["resumed_from"]]
    assert record["training"]["resumed_from"] >= 4 and again
    assert again[0]["elapsed"] > first[-1]["elapsed"], "the lost steps are counted too"
    assert record["training"]["stop_reason"] == "seconds"
    assert record["seconds"]["challenge"] > rows[-1]["elapsed"]
