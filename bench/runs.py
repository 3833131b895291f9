"""Running recipes as a user would, in a process of their own with a cold compile cache, and reading their records."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from paramgolf.data.cache import cache_root

Job = TypeVar("Job")


def shared(*parts: str) -> Path:
    """A file of the shared reference material; leaves with one line where it is absent."""
    root = os.environ.get("PARAMGOLF_SHARED", "")
    path = Path(root, *parts)
    if not root or not path.exists():
        sys.exit(f"bench: {'/'.join(parts)} is not there; set PARAMGOLF_SHARED to the shared reference material")
    return path


def golf_run(
    recipe: str, overrides: Sequence[str], *, train: str, val: str = "", out: Path | None = None
) -> dict[str, Any]:
    """`golf run RECIPE ...` from a cold compile cache; returns its record. Progress goes to stderr."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = out or Path(scratch, "run")
        command = [sys.executable, "-m", "paramgolf", "run", recipe, *overrides, "--out", str(folder), "--json"]
        command += [f"data.train={train}", *([f"data.val={val}"] if val else [])]
        cold = {"TORCHINDUCTOR_CACHE_DIR": str(Path(scratch, "inductor")), "XDG_CACHE_HOME": scratch}
        environment = os.environ | {"PARAMGOLF_CACHE": str(cache_root())} | cold
        answer = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=False, text=True)
        if answer.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with code {answer.returncode}")
        return json.loads(answer.stdout)


def on_cores(work: Callable[[Job], None], jobs: Iterable[Job], workers: int) -> None:
    """`work` on every job, in turn; with several `workers` so many at once, each with a core of its own, which the
    processes that it starts share. Ends with the first error."""
    if workers < 2:
        for job in jobs:
            work(job)
        return
    cores = sorted(os.sched_getaffinity(0))
    if workers > len(cores):
        sys.exit(f"bench: --workers {workers} on {len(cores)} cores; give each its own")
    turn = itertools.count()

    def settle() -> None:
        os.sched_setaffinity(0, {cores[next(turn)]})  # of this thread, and of what it starts

    with concurrent.futures.ThreadPoolExecutor(workers, initializer=settle) as pool:
        running = [pool.submit(work, job) for job in jobs]
        try:
            for one in concurrent.futures.as_completed(running):
                one.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
