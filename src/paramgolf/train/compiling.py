"""Whether to compile, what it cost, and whether anything was compiled again later.

Compilation must pay for itself inside the budget: `train.compile = "auto"` estimates what it costs (less with a warm
compile cache) against what it saves. A failure is never fatal: the run goes on uncompiled and says why.
"""

from __future__ import annotations

import getpass
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from paramgolf.recipe.sections import Recipe

# Measured orders of magnitude: seconds to start the compiler and for one graph of a block, forward and backward, and
# the part of the time that compiled code saves.
_SECONDS_TO_START = {"cpu": 15.0, "cuda": 10.0}
_SECONDS_A_GRAPH = {"cpu": 25.0, "cuda": 15.0}
_WARM_FACTOR = 0.4
_SAVED = {"cpu": 0.10, "cuda": 0.40}
# Useful training speed used to guess how long a run bound by steps or tokens takes, in FLOP/s.
_SPEED = {"cpu": 5e10, "cuda": 1e14}


@dataclass(frozen=True)
class CompilePlan:
    """The decision, its reason, and the state of the compile cache ("cold", "warm", or "unused")."""

    enabled: bool
    reason: str
    cache: str = "unused"


def cache_folder() -> Path:
    """Where torch's compiler keeps its results. Asking torch itself would import the compiler, which takes seconds."""
    if chosen := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return Path(chosen)
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = f"uid_{os.getuid()}"
    return Path(tempfile.gettempdir()) / ("torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))


def cache_state() -> str:
    """ "warm" when the compiler's cache folder already holds something, else "cold"."""
    folder = cache_folder()
    kernels = (p for p in folder.iterdir() if p.is_dir() and p.name not in ("tmp", "locks")) if folder.is_dir() else ()
    return "warm" if any(any(p.iterdir()) for p in kernels) else "cold"


def missing_tool(device: str) -> str:
    """What compiling needs and this machine lacks, "" when nothing."""
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    if not any(name and shutil.which(name) for name in compilers):
        return "no C++ compiler was found"
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return ""


def expected_seconds(recipe: Recipe, parameters: int, device: str, spent: float) -> float:
    """How long training will take uncompiled: the time budget left, or a guess from the work to do; 0 = unbound."""
    budget = recipe.budget
    bounds = [max(0.0, budget.seconds - spent)] if budget.seconds else []
    tokens = [n for n in (budget.tokens, budget.steps * recipe.train.batch_tokens) if n]
    if tokens:
        bounds.append(6.0 * parameters * min(tokens) / _SPEED[device])
    return min(bounds, default=0.0)


def decide(recipe: Recipe, *, parameters: int, graphs: int, device: str, spent: float) -> CompilePlan:
    """The plan for this run.

    Args:
        graphs: how many graphs training will need (micro-batch shapes times QAT states).
        spent: seconds of the budget's clock used so far.
    """
    asked = recipe.train.compile
    if asked == "off":
        return CompilePlan(False, "train.compile = off")
    missing = missing_tool(device)
    if missing:
        return CompilePlan(False, f"not compiled: {missing}")
    cache = cache_state()
    if asked == "on":
        return CompilePlan(True, "train.compile = on", cache)
    seconds = expected_seconds(recipe, parameters, device, spent)
    counted = recipe.budget.clock == "strict"
    cost = cost_seconds(graphs, device, cache)
    if seconds and counted and cost > _SAVED[device] * seconds:
        reason = f"not compiled: about {cost:.0f} s of compiling ({cache} cache) would not pay in {seconds:.0f} s"
        return CompilePlan(False, reason, cache)
    return CompilePlan(True, "pays for itself within the budget", cache)


def cost_seconds(graphs: int, device: str, cache: str) -> float:
    """About how long compiling so many graphs takes."""
    return (_SECONDS_TO_START[device] + graphs * _SECONDS_A_GRAPH[device]) * (_WARM_FACTOR if cache == "warm" else 1.0)


def compiled_graphs() -> int:
    """Graphs that PyTorch has compiled in this process; it grows by one with every recompilation."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not imported just to count: that takes seconds
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo is not None else 0


def failure_reason(error: BaseException) -> str:
    """The telling start of an error: its first line, and the next where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    told = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {told[:200]}"
