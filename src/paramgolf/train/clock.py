"""Clocks of a run: the strict one a stopwatch would show, and the challenge's own beside it.

The strict clock starts with the process (interpreter start and imports included; under torchrun with the launcher).
The challenge clock starts when the first real training step starts, after compilation and warm-up. Phases entered
with `outside=True` (tokenising, scoring, proving) are measured and reported, but the budget does not count them.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any, Literal

import psutil

Kind = Literal["strict", "challenge"]


def process_age(pid: int | None = None) -> float:
    """Seconds since the process `pid` (default: this one) was started."""
    pid = os.getpid() if pid is None else pid
    try:  # the kernel's own tick count: exact to 10 ms, and no change of the wall clock can move it
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stream:
            ticks = int(stream.read().rsplit(")", 1)[1].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        age = age_without_proc(pid)
    return max(age, 0.0)


def age_without_proc(pid: int) -> float:
    """The age where there is no /proc, by the wall clock; 0 where that cannot be told either."""
    try:
        return time.time() - psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0


def launch_age() -> float:
    """Seconds since a stopwatch would have been started: this process, or its torchrun launcher."""
    age = process_age()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        age = max(age, process_age(os.getppid()))
    return age


class Clock:
    """Time spent, in seconds, by this process and the ones it resumes.

    `Clock()` starts with the process; `Clock(age=0.0)` starts now (a run inside a long-lived process).
    """

    def __init__(self, age: float | None = None) -> None:
        self._zero = time.monotonic() - (launch_age() if age is None else age)
        self._carried = 0.0  # spent by earlier processes of the same run
        self._challenge_zero: float | None = None  # the counted time at the first step
        self._challenge_carried = 0.0
        self._phases: dict[str, float] = {}
        self._outside = 0.0
        self._open: list[tuple[str, float, bool]] = []

    def strict(self) -> float:
        """Everything since the start of the first process, phases outside the budget included."""
        return self._carried + time.monotonic() - self._zero

    def spent(self, kind: Kind = "strict") -> float:
        """What the budget counts so far: the strict clock without outside phases, or the challenge clock."""
        return self._counted() if kind == "strict" else self.challenge()

    def challenge(self) -> float:
        """Seconds since the first training step, outside phases excluded; 0 before it.

        In a resumed run it stands still until `start_challenge`: restarting, compiling and warming up are not in it.
        """
        running = 0.0 if self._challenge_zero is None else self._counted() - self._challenge_zero
        return self._challenge_carried + running

    def start_challenge(self) -> None:
        """Start the challenge clock (or go on with it after a resume); later calls change nothing."""
        if self._challenge_zero is None:
            self._challenge_zero = self._counted()

    def _counted(self) -> float:
        now = time.monotonic()
        running = next((now - begun for _, begun, outside in self._open if outside), 0.0)
        return self._carried + now - self._zero - self._outside - running

    @contextlib.contextmanager
    def phase(self, name: str, *, outside: bool = False) -> Iterator[None]:
        """Time a block under `name` (repeated blocks add up); `outside` blocks do not count for the budget."""
        nested = any(entry[2] for entry in self._open)
        begun = time.monotonic()
        self._open.append((name, begun, outside))
        try:
            yield
        finally:
            self._open.pop()
            seconds = time.monotonic() - begun
            self._phases[name] = self._phases.get(name, 0.0) + seconds
            if outside and not nested:
                self._outside += seconds

    def phases(self) -> dict[str, float]:
        """Seconds by phase, blocks that are still open included."""
        phases = dict(self._phases)
        now = time.monotonic()
        for name, begun, _ in self._open:
            phases[name] = phases.get(name, 0.0) + now - begun
        return phases

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state for a checkpoint."""
        counted = self._counted()
        return {
            "strict": self.strict(),
            "outside": self.strict() - counted,
            "challenge": self.challenge(),
            "phases": self.phases(),
        }

    def load_state_dict(self, state: dict[str, Any], *, last_seen: float | None = None) -> None:
        """Add what earlier processes spent.

        Args:
            state: `state_dict()` of their last checkpoint.
            last_seen: their last known value of `strict()`; what was spent after the checkpoint and lost still counts.
        """
        lost = max(0.0, (last_seen or 0.0) - float(state["strict"]))
        self._carried += float(state["strict"]) + lost
        self._outside += float(state["outside"])
        self._challenge_carried += float(state["challenge"]) + (lost if state["challenge"] else 0.0)
        for name, seconds in state["phases"].items():
            self._phases[name] = self._phases.get(name, 0.0) + float(seconds)
