"""What a person sees of the work around training: one line a phase, a live one on a terminal; all on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from paramgolf.data.progress import say

_EVERY = 15.0  # seconds between plain lines of one phase


class Phases:
    """`with phases.of("packing") as progress:` shows the phase; `progress(done, total)` may be called in it."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet

    def note(self, text: str) -> None:
        if not self._quiet:
            say(text)

    @contextlib.contextmanager
    def of(self, what: str) -> Iterator[Callable[[int, int], None]]:
        if self._quiet:
            yield lambda done, total: None
        elif sys.stderr.isatty():
            with _live(what) as progress:
                yield progress
        else:
            self.note(what)
            yield self._plain(what)

    def _plain(self, what: str) -> Callable[[int, int], None]:
        last = time.monotonic()

        def progress(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= _EVERY and done < total:
                last = time.monotonic()
                self.note(f"{what}: {100 * done / total:.0f} %")

        return progress


@contextlib.contextmanager
def _live(what: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
