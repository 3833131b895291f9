"""`golf audit --execute`: the four conditions on the script's own model, run in a confined process (see sandbox.py)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paramgolf
from paramgolf.submit.audit.catalog import Finding, finding
from paramgolf.submit.audit.folder import Submission
from paramgolf.submit.audit.script import Script, shown

SECONDS = 180.0
MAX_ANSWER = 1 << 16  # what a pipe holds
_CODES = {"causal": "exec-causal", "normalised": "exec-normalised"}


def check(submission: Submission, seconds: float = SECONDS) -> Iterator[Finding]:
    """What running the model of the submitted script shows. The script's `main` is not run."""
    entry = submission.entry
    if entry is None:
        return
    script = innermost(entry)
    if script.tree is None:
        yield finding("exec-unknown", "not determined: the script does not parse", entry.name)
        return
    answer = run(script.text, seconds)
    if "unknown" in answer:
        yield finding("exec-unknown", f"not determined: {shown(str(answer['unknown']), 300)}", script.name)
        return
    conditions = answer["conditions"]
    broken = [name for name in _CODES if conditions[name][0] == "violation"]
    for name in broken:
        yield finding(_CODES[name], f"with random weights: {shown(conditions[name][1], 300)}", script.name)
    undecided = [name for name in _CODES if conditions[name][0] == "not determined"]
    if undecided:
        yield finding("exec-unknown", f"not determined: {', '.join(undecided)}", script.name)
    if not broken and not undecided:
        words = f"a forward pass of {answer.get('parameters', 0):,} random weights is causal and normalised; "
        yield finding("exec-passed", words + "its evaluation loop was not run", script.name)


def innermost(script: Script) -> Script:
    """The code that does the work: of a packed script the largest layer inside."""
    layers = [layer for layer in script.with_layers() if layer.tree is not None]
    return max(layers, key=lambda layer: len(layer.text), default=script)


def run(source: str, seconds: float) -> dict[str, Any]:
    """The sandbox's answer for this source, or {"unknown": why} if there is none."""
    with tempfile.TemporaryDirectory(prefix="golf-audit-") as folder:
        (reading, writing), data = os.pipe(), b""
        environment = {
            "PATH": os.environ.get("PATH", ""), "HOME": folder, "TMPDIR": folder, "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(Path(paramgolf.__file__).parent.parent), "PYTHONDONTWRITEBYTECODE": "1",
            "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "RANK": "0", "WORLD_SIZE": "1",
        }  # fmt: skip
        child = subprocess.Popen(
            [sys.executable, "-m", "paramgolf.submit.audit.sandbox", str(writing)], stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder, env=environment, pass_fds=[writing],
            start_new_session=True,
        )  # fmt: skip
        os.close(writing)
        try:
            with contextlib.suppress(BrokenPipeError):
                child.communicate(source.encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"unknown": f"it took longer than {seconds:.0f} s"}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # and whatever it started
            child.wait()
            os.set_blocking(reading, False)  # a process that got away may still hold the other end
            with contextlib.suppress(BlockingIOError):
                data = os.read(reading, MAX_ANSWER)
            os.close(reading)
    return _parsed(data, child.returncode)


def _parsed(data: bytes, code: int) -> dict[str, Any]:
    """The answer, believed only in its form: it comes from a process that ran somebody's code."""
    try:
        answer = json.loads(data)
        if set(answer) == {"unknown"}:
            return {"unknown": str(answer["unknown"])}
        conditions = {name: [str(answer["conditions"][name][i]) for i in (0, 1)] for name in _CODES}
        return {"conditions": conditions, "parameters": int(answer["parameters"])}
    except (ValueError, TypeError, KeyError, IndexError):
        return {"unknown": f"its process ended with code {code} and no answer"}
