"""How far preparing or downloading has come: a live bar on a terminal, plain lines otherwise, both on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from types import TracebackType
from typing import Any

_EVERY = 5.0  # seconds between plain lines
_NAMES = {"hash": "checking files", "read": "reading", "tokenizer": "training the tokenizer", "tokenise": "tokenising"}


def say(text: str) -> None:
    """A line on stderr. Where nobody reads it any more, it is lost, and the work goes on."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class ProgressReport:
    """Callable (phase, bytes done, bytes in all or None); use with `with`."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live: Any = None
        self._tasks: dict[str, Any] = {}
        self._phase, self._last = "", time.monotonic()

    def __enter__(self) -> ProgressReport:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self._live = Progress(*columns, console=Console(stderr=True), transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        name = _NAMES.get(phase, phase)
        if self._live is not None:
            if name not in self._tasks:
                self._tasks[name] = self._live.add_task(name, total=total)
            self._live.update(self._tasks[name], completed=done, total=total)
        elif not self._quiet:
            self._plain(name, done, total)

    def _plain(self, name: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if name == self._phase and now - self._last < _EVERY:
            return
        if name != self._phase and now - self._last < _EVERY and not done:
            self._phase = name
            return
        self._phase, self._last = name, now
        share = f" of {total / 1e6:.1f} MB" if total else " MB"
        say(f"{name}: {done / 1e6:.1f}{share}")
