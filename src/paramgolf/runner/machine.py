"""What this machine usually does: the speed of its earlier runs and its measured fingerprint, kept in the user's cache.

One file a machine, `$PARAMGOLF_CACHE/machines/<fingerprint>.jsonl`, one line a finished run or a `golf doctor --bench`;
lines are only ever added, so that runs at a time do not disturb each other. A run that steps more than 10 % slower than
its own machine's history says so as soon as it has taken enough steps to know, and its record keeps it: rented machines
of one kind differ by more than the gains people publish.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from paramgolf.data.cache import cache_root
from paramgolf.files import sha256_bytes
from paramgolf.recipe.load import to_table
from paramgolf.recipe.sections import Recipe
from paramgolf.runner.environment import environment
from paramgolf.train.callbacks import Callback, StepInfo

SLOWER = 1.10  # than the median of the history, before a run is called slow
KEPT = 20  # newest runs of one kind that count
SKIP, STEPS, SECONDS = 3, 8, 3.0  # leave out so many steps, then look at as many, over at least so long
_TRAINING = ("model", "optim", "average", "stages")
_OF_TRAIN = ("batch_tokens", "seq_len", "micro_batch_tokens", "device", "dtype", "compile", "kernels", "attention",
             "threads")  # fmt: skip


@dataclass(frozen=True)
class Speed:
    """A finished run of this machine. `early_ms`: median step time of its first steps; `setup_seconds`: the strict
    clock at the first step; `at`: when it ended, seconds since 1970."""

    early_ms: float
    step_ms: float
    setup_seconds: float
    steps: int
    at: float


def machine_key(facts: dict[str, Any] | None = None) -> str:
    """12 hex digits for this kind of machine and number of processors, the same after a restart."""
    facts = facts or environment()
    names = [facts["cpu"], facts["cpu_count"], round(facts["memory_bytes"] / 2**30), facts["gpus"], facts["torch"]]
    return sha256_bytes(json.dumps(names).encode())[:12]


def workload(recipe: Recipe, threads: int, world: int = 1) -> str:
    """A hash of what decides how long a step takes: model, optimizers, shapes, QAT, threads, ranks."""
    table = to_table(recipe)
    parts = {name: table[name] for name in _TRAINING} | {key: table["train"][key] for key in _OF_TRAIN}
    parts |= {"vocab": table["data"]["vocab_size"], "qat": [table["quant"][k] for k in ("qat", "qat_start")]}
    return sha256_bytes(json.dumps([parts, threads, world], sort_keys=True, default=str).encode())[:16]


def _file(machine: str) -> Path:
    return cache_root() / "machines" / f"{machine}.jsonl"


def _lines(machine: str) -> list[dict[str, Any]]:
    """Whole lines of the file, oldest first; what cannot be read is left out."""
    rows = []
    with contextlib.suppress(OSError):
        for line in _file(machine).read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                rows += [row] if isinstance(row, dict) else []
    return rows


def _add(machine: str, row: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a cache that cannot be written must not end a run
        path = _file(machine)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


def history(recipe: Recipe, *, threads: int, world: int = 1, machine: str = "") -> list[Speed]:
    """The newest 20 finished runs of this kind on this machine, oldest first: what a plan can predict steps from."""
    kind, found = workload(recipe, threads, world), []
    for row in _lines(machine or machine_key()):
        if row.get("workload") == kind:
            with contextlib.suppress(KeyError, TypeError, ValueError):
                found.append(Speed(**{key: row[key] for key in Speed.__dataclass_fields__}))
    return found[-KEPT:]


def remember(recipe: Recipe, speed: Speed, *, threads: int, world: int = 1) -> None:
    """Add a finished run to the history of this machine."""
    _add(machine_key(), {"workload": workload(recipe, threads, world), "recipe": recipe.name, **asdict(speed)})


def remember_bench(result: dict[str, float | None]) -> None:
    """Keep a `golf doctor --bench`."""
    _add(machine_key(), {"bench": result, "at": time.time()})


def benches(machine: str = "") -> list[dict[str, float | None]]:
    """What `golf doctor --bench` measured here, oldest first."""
    return [row["bench"] for row in _lines(machine or machine_key()) if isinstance(row.get("bench"), dict)]


class SpeedWatch(Callback):
    """Measures the first steps of a run and says at once when they are slower than this machine's history.

    `say` gets the line, at most one a run.
    """

    def __init__(self, recipe: Recipe, world: int, say: Callable[[str], None]) -> None:
        self._recipe, self._world, self._say = recipe, world, say
        self._times: list[float] = []
        self._last: tuple[int, float] | None = None
        self._threads = 0
        self._seen = 0
        self._from_the_start = True
        self.early_ms = 0.0
        self.setup_seconds = 0.0
        self.before: list[Speed] = []

    def on_step(self, info: StepInfo, fraction: float, model: nn.Module) -> None:
        if self.early_ms:
            return
        self._seen += 1
        if self._last is None:
            self._threads = torch.get_num_threads()
            self._from_the_start = info.step == 1
            self.setup_seconds = info.strict - info.elapsed
        elif self._seen > SKIP:
            self._times.append(info.elapsed - self._last[1])
        self._last = (info.step, info.elapsed)
        if len(self._times) >= STEPS and (sum(self._times) >= SECONDS or len(self._times) >= 50 * STEPS):
            self.early_ms = 1e3 * median(self._times)
            self.before = history(self._recipe, threads=self._threads, world=self._world)
            if self.slow:
                self._say(self._words())

    @property
    def usual_ms(self) -> float:
        """The median of the history's first steps; 0 without one."""
        return median(speed.early_ms for speed in self.before) if self.before else 0.0

    @property
    def slow(self) -> bool:
        return bool(self.usual_ms) and self.early_ms > SLOWER * self.usual_ms

    def _words(self) -> str:
        more = 100 * (self.early_ms / self.usual_ms - 1)
        return (
            f"note: this machine is slow now: {self.early_ms:.1f} ms a step, {more:.0f} % more than the "
            f"{self.usual_ms:.1f} ms of its last {len(self.before)} runs of this kind"
        )

    def conclude(self, step_ms: float, steps: int) -> dict[str, Any]:
        """What the record says; the run joins the history. {} if it was too short to measure."""
        if not self.early_ms:
            return {}
        if self._from_the_start:  # of a resumed run the setup is not known
            speed = Speed(self.early_ms, step_ms, self.setup_seconds, steps, time.time())
            remember(self._recipe, speed, threads=self._threads, world=self._world)
        return {
            "machine": machine_key(), "early_ms": self.early_ms, "usual_ms": self.usual_ms or None,
            "runs_before": len(self.before), "slow": self.slow,
        }  # fmt: skip
