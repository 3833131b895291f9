"""What watches a run: live progress, plain lines, and train.jsonl. The loop knows only `Callback`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from torch import nn

from paramgolf.data.progress import say
from paramgolf.errors import GolfError
from paramgolf.files import atomic_write

Forecast = Callable[[nn.Module], str]


@dataclass(frozen=True)
class StepInfo:
    """One finished optimizer step. `elapsed`: seconds of the budget's clock since the first step."""

    step: int
    loss: float
    lr_mul: float
    momentum: float
    tokens: int
    elapsed: float
    grad_norm: float | None = None
    strict: float = 0.0  # the strict clock, so that a resumed run knows when its predecessor was last alive


class Callback:
    """Base class: every method may be left out. Called on the main rank only."""

    def note(self, text: str) -> None:
        """Something a person should know (a fallback, a phase, a resume)."""

    def on_step(self, info: StepInfo, fraction: float, model: nn.Module) -> None:
        """After every step; `fraction` is the used part of the training window."""

    def close(self) -> None:
        """Training is over, or failed."""


class Callbacks(Callback):
    """Several as one."""

    def __init__(self, members: Iterable[Callback] = ()) -> None:
        self.members = list(members)

    def note(self, text: str) -> None:
        for member in self.members:
            member.note(text)

    def on_step(self, info: StepInfo, fraction: float, model: nn.Module) -> None:
        for member in self.members:
            member.on_step(info, fraction, model)

    def close(self) -> None:
        for member in self.members:
            member.close()


class JsonLines(Callback):
    """train.jsonl: one object a logged step, flushed line by line, so that a killed run leaves whole lines."""

    def __init__(self, path: Path, every: int, resumed_step: int = 0) -> None:
        """Cut the file after `resumed_step` (0 = start afresh) and open it for appending.

        The last line left gets the strict clock of those cut off: what they took is lost, but spent, also when this
        run is killed before its first line. Raises GolfError when it cannot be written.
        """
        kept = [row for row in _rows(path) if row["step"] <= resumed_step]
        if kept:
            kept[-1]["strict"] = last_strict(path)
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._path = path
        self._stream: IO[str] = path.open("a", encoding="utf-8")
        self._every = every

    def on_step(self, info: StepInfo, fraction: float, model: nn.Module) -> None:
        if info.step == 1 or info.step % self._every == 0:
            try:
                self._stream.write(json.dumps(asdict(info)) + "\n")
                self._stream.flush()
            except OSError as error:
                raise GolfError(f"cannot write {self._path}: {error.strerror or error}; free space") from error

    def close(self) -> None:
        self._stream.close()


def _rows(path: Path) -> list[dict[str, Any]]:
    """The objects in the whole lines of a train.jsonl; a torn last line is dropped."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not line.endswith("\n") or not isinstance(row, dict) or "step" not in row:
            break
        rows.append(row)
    return rows


def last_strict(path: Path) -> float:
    """The strict clock at the last line of a train.jsonl; 0 without one."""
    return max((float(row.get("strict", 0.0)) for row in _rows(path)), default=0.0)


class _Speed:
    """Tokens per second and time left, from the last few seconds."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, int, float]] = []  # (elapsed, tokens, fraction)

    def update(self, info: StepInfo, fraction: float) -> None:
        self._marks.append((info.elapsed, info.tokens, fraction))
        while len(self._marks) > 2 and self._marks[-1][0] - self._marks[0][0] > 20.0:
            self._marks.pop(0)

    def text(self) -> str:
        (t0, n0, f0), (t1, n1, f1) = self._marks[0], self._marks[-1]
        if t1 <= t0:
            return ""
        left = (1.0 - f1) * (t1 - t0) / (f1 - f0) if f1 > f0 else 0.0
        return f"{(n1 - n0) / (t1 - t0):,.0f} tok/s" + (f"  {_duration(left)} left" if left else "")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Forecaster:
    """Asks for the artifact forecast half-way and now and then, and never lets it take more than 1 % of the time."""

    def __init__(self, forecast: Forecast | None) -> None:
        self._forecast = forecast
        self._next = time.monotonic() + 10.0
        self._half = False  # from there on the forecast is one to rely on
        self.text = ""

    def update(self, fraction: float, model: nn.Module) -> None:
        now, before = time.monotonic(), self._half
        self._half = fraction >= 0.5
        if self._forecast is None or (now < self._next and self._half == before):
            return
        self.text = self._forecast(model)
        cost = time.monotonic() - now
        self._next = time.monotonic() + max(15.0, 100 * cost)


class PlainProgress(Callback):
    """Plain lines on stderr: where there is no terminal, and in logs."""

    def __init__(self, every: int, forecast: Forecast | None = None) -> None:
        self._every = every
        self._speed = _Speed()
        self._forecaster = _Forecaster(forecast)

    def note(self, text: str) -> None:
        say(text)

    def on_step(self, info: StepInfo, fraction: float, model: nn.Module) -> None:
        self._speed.update(info, fraction)
        if info.step == 1 or info.step % self._every == 0:
            self._forecaster.update(fraction, model)
            parts = [f"step {info.step}", f"loss {info.loss:.4f}", f"{100 * fraction:.0f} %", self._speed.text()]
            self.note("  ".join(part for part in [*parts, self._forecaster.text] if part))


class LiveProgress(Callback):
    """One live line on a terminal (rich): bar, step, loss, tokens per second, time left, artifact forecast."""

    def __init__(self, forecast: Forecast | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("[bold]train"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[words]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("train", total=1.0, words="")
        self._speed = _Speed()
        self._forecaster = _Forecaster(forecast)
        self._last = ""

    def note(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def on_step(self, info: StepInfo, fraction: float, model: nn.Module) -> None:
        self._progress.start()
        self._speed.update(info, fraction)
        self._forecaster.update(fraction, model)
        parts = [f"step {info.step}", f"loss {info.loss:.4f}", self._speed.text(), self._forecaster.text]
        self._last = "  ".join(part for part in parts if part)
        self._progress.update(self._task, completed=fraction, words=self._last)

    def close(self) -> None:
        self._progress.stop()
        if self._last:
            self.note(f"trained  {self._last}")


def progress(every: int, forecast: Forecast | None = None) -> Callback:
    """Live progress on a terminal, plain lines elsewhere; both on stderr."""
    return LiveProgress(forecast) if sys.stderr.isatty() else PlainProgress(every, forecast)
