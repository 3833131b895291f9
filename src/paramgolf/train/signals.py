"""SIGTERM and SIGINT end a run in order: finish the step, write a checkpoint, leave with the usual exit code."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from paramgolf.errors import GolfError


class Interrupted(GolfError):
    """The run was asked to stop. `exit_code` is 128 + the signal's number (130 for Ctrl-C, 143 for SIGTERM)."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class Interrupts:
    """While entered, the first SIGTERM or SIGINT only sets `pending`; a second one acts as usual.

    In a thread that is not the main one Python cannot catch signals, and nothing is changed.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.pending = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._caught) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _release(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _caught(self, number: int, frame: FrameType | None) -> None:
        self.pending = number
        self._release()

    def check(self, what: str) -> None:
        """Raise Interrupted when a signal has come during `what`, where there is nothing to save."""
        if self.pending:
            raise Interrupted(
                f"interrupted by {name(self.pending)} during {what}; nothing was trained yet", self.pending
            )


def name(number: int) -> str:
    """SIGTERM for 15 and so on; a rank that got no signal itself stops with the others."""
    return signal.Signals(number).name if number else "another rank"
