"""Runs started by the lab: `golf run` in processes of their own, several at a time, watched while they train.

A run of its own process has its own clocks, memory and signals, and ends like any other: with a run folder and a
sealed record. What a trial is doing is read from its train.jsonl, so nothing in the training loop knows of trials.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paramgolf.errors import GolfError
from paramgolf.lab.records import identity, read_record, recipe_table
from paramgolf.processors import cpu_count
from paramgolf.recipe.load import resolve, to_table
from paramgolf.runner.folder import RunFolder

_POLL = 0.2  # seconds between looks at a running child
_PATIENCE = 60.0  # seconds a child may take to write its checkpoint and leave


GOLF = (sys.executable, "-m", "paramgolf")


@dataclass(frozen=True)
class Job:
    """One run: `recipe` is a name or a TOML file, `data` overrides where its text lies ("" = the recipe's).

    `program` is what is started: anything that understands `run RECIPE KEY=VALUE... --out FOLDER` as golf does.
    """

    recipe: str
    overrides: tuple[str, ...]
    folder: Path
    data: str = ""
    program: tuple[str, ...] = GOLF

    def command(self) -> list[str]:
        words = [*self.program, "run", self.recipe, *self.overrides, "--out", str(self.folder), "--json"]
        return [*words, "--data", self.data] if self.data else words


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its record, or in `why` what kept it from one. `stopped`: it was told to stop."""

    record: dict[str, Any] | None
    why: str = ""
    stopped: bool = False


Watch = Callable[[list[dict[str, Any]]], bool]  # new lines of train.jsonl -> whether to stop the run


class Stop:
    """Set when everything is to end: children are asked to, and no new one starts."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def __bool__(self) -> bool:
        return self._event.is_set()

    def sleep(self, seconds: float) -> None:
        self._event.wait(seconds)


def run_job(job: Job, *, stop: Stop, watch: Watch | None = None, threads: int = 0) -> Outcome:
    """Run a job to its end. A folder with a finished run of the same recipe is taken as it is; half a run is removed,
    unless another process is at work in it (GolfError).

    Args:
        watch: called about five times a second with the new log lines; True stops the run.
        threads: CPU threads for the child; 0 = its own choice.
    """
    folder = RunFolder(job.folder)
    if folder.record.is_file():
        _same_recipe(job, folder)
        return Outcome(read_record(folder))
    if (job.folder / "recipe.toml").is_file():
        with folder.locked():
            shutil.rmtree(job.folder, ignore_errors=True)  # of a sweep that was killed
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    log = job.folder.with_name(f"{job.folder.name}.log")
    with log.open("wb") as stream:
        child = subprocess.Popen(
            job.command(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stream, env=environment,
            start_new_session=True,
        )  # fmt: skip
        stopped = _attend(child, folder.log, stop, watch)
    if child.returncode == 0 and not stopped:
        log.unlink(missing_ok=True)
        shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)  # nobody resumes a finished trial
        return Outcome(read_record(folder))
    why = _last_line(log) or f"ended with code {child.returncode}"
    if stopped:
        shutil.rmtree(job.folder, ignore_errors=True)
        log.unlink(missing_ok=True)
    return Outcome(None, why, stopped)


def _same_recipe(job: Job, folder: RunFolder) -> None:
    """GolfError if the finished run in the folder is not the one that is asked for."""
    wanted, there = to_table(resolve(job.recipe, job.overrides).recipe), recipe_table(folder)
    if identity(wanted) != identity(there) or wanted["train"]["seed"] != there.get("train", {}).get("seed"):
        raise GolfError(f"{folder.root} holds a run of another recipe; remove it or choose another --out")


def _attend(child: subprocess.Popen[bytes], log: Path, stop: Stop, watch: Watch | None) -> bool:
    """Wait for the child; whether it was told to stop."""
    lines = _Tail(log)
    while child.poll() is None:
        if stop or (watch is not None and (new := lines.read()) and watch(new)):
            _end(child)
            return True
        stop.sleep(_POLL)
    return False


def _end(child: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and after a while SIGKILL, to the child and whatever it started."""
    for number, patience in ((signal.SIGTERM, _PATIENCE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(patience)
            return


class _Tail:
    """New whole lines of a JSON-lines file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0

    def read(self) -> list[dict[str, Any]]:
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._at)
                data = stream.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        return [json.loads(line) for line in whole.splitlines() if line.strip()]


def _last_line(log: Path) -> str:
    try:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return ""
    return next((line.removeprefix("golf: error: ") for line in reversed(lines) if line), "")


def share_of_cores(workers: int) -> int:
    """CPU threads for each of several runs at a time; 0 (the run's own choice) for one alone."""
    return max(1, cpu_count() // workers) if workers > 1 else 0


@contextlib.contextmanager
def interruptible(stop: Stop) -> Iterator[None]:
    """Ctrl-C and SIGTERM set `stop` and let the block wind down; afterwards KeyboardInterrupt is raised."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []

    def handle(number: int, frame: Any) -> None:
        caught.append(number)
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        raise KeyboardInterrupt


def in_turn(tasks: Iterable[Callable[[], None]], workers: int, stop: Stop) -> None:
    """Run tasks, `workers` at a time, taking the next from the iterator when one ends. The first error ends all."""
    pending: set[Future[None]] = set()
    source = iter(tasks)
    with ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                while len(pending) < workers and not stop and (task := next(source, None)) is not None:
                    pending.add(pool.submit(task))
                if not pending:
                    return
                done, pending = wait(pending, timeout=_POLL, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
        except BaseException:
            stop.set()
            raise


def run_all(jobs: list[Job], workers: int, note: Callable[[str], None]) -> list[Outcome]:
    """Every job's outcome, in order. Raises GolfError at the first that fails, KeyboardInterrupt after Ctrl-C."""
    stop, outcomes = Stop(), dict.fromkeys(range(len(jobs)), Outcome(None))
    threads = share_of_cores(workers)

    def task(index: int) -> Callable[[], None]:
        def work() -> None:
            begun = time.monotonic()
            outcome = run_job(jobs[index], stop=stop, threads=threads)
            outcomes[index] = outcome
            if outcome.record is None and not outcome.stopped:
                raise GolfError(f"{jobs[index].folder} failed: {outcome.why}")
            if outcome.record is not None:
                note(f"{jobs[index].folder}: {outcome.record['val_bpb']:.4f} BPB, {time.monotonic() - begun:.0f} s")

        return work

    with interruptible(stop):
        in_turn((task(i) for i in range(len(jobs))), workers, stop)
    return list(outcomes.values())
