"""The two ways a command fails on purpose. Everything else is a bug and may show a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class GolfError(Exception):
    """Bad input: one line saying what, where and what to do. The CLI prints it and exits 2.

    >>> raise GolfError("no such recipe 'pokcet'; did you mean 'pocket'?")
    """

    exit_code = 2
    shared = False  # every rank of a distributed run raises it alike: only the first one says it

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class CheckFailed(GolfError):
    """The input was fine, but a check on it failed (a hash, a proof, a limit). The CLI exits 1."""

    exit_code = 1


@contextlib.contextmanager
def on_every_rank() -> Iterator[None]:
    """Marks what is raised in the block as raised by all ranks alike (`GolfError.shared`)."""
    try:
        yield
    except GolfError as error:
        error.shared = True
        raise
