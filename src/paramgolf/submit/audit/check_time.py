"""Training and evaluation time, and the number of processes, from the logs."""

from __future__ import annotations

from collections.abc import Iterator

from paramgolf.submit.audit.catalog import Finding, finding
from paramgolf.submit.audit.folder import Submission
from paramgolf.submit.audit.log import Log

LIMIT_MS = 600_000.0
EDGE = 1.01


def check(submission: Submission) -> Iterator[Finding]:
    for log in submission.logs:
        yield from _one(log)


def _one(log: Log) -> Iterator[Finding]:
    if log.train_ms is None:
        yield finding("time-unknown", "no training time in the log", log.name)
    elif log.train_ms[0] > LIMIT_MS:
        code = "time-train" if log.train_ms[0] > EDGE * LIMIT_MS else "time-train-edge"
        yield finding(code, f"training took {log.train_ms[0] / 1000:.3f} s", f"{log.name}:{log.train_ms[1]}")
    if log.eval_ms is None:
        yield finding("time-unknown", "no evaluation time in the log", log.name)
    elif log.eval_ms[0] > LIMIT_MS:
        yield finding("time-eval", f"evaluation took {log.eval_ms[0] / 1000:.1f} s", f"{log.name}:{log.eval_ms[1]}")
    cap, line = log.hparams.get("max_wallclock_seconds", ("", 0))
    if _number(cap) > LIMIT_MS / 1000:
        yield finding("time-cap", f"max_wallclock_seconds is {cap}", f"{log.name}:{line}")
    world, line = log.hparams.get("world_size", ("", 0))
    if world.isdigit() and int(world) != 8:
        yield finding("time-hardware", f"world_size is {world}: the log is not of 8 GPUs", f"{log.name}:{line}")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
