"""`golf doctor --bench`: about 20 seconds of what training is made of, so that machines can be told apart."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from paramgolf.runner.machine import SLOWER, benches, remember_bench

# What each number is and whether more of it is better.
MEASURES: dict[str, tuple[str, bool]] = {
    "matmul_gflops": ("matrix product, float32, GFLOP/s", True),
    "matmul_bf16_gflops": ("matrix product, bfloat16, GFLOP/s", True),
    "memory_gbytes": ("memory, read and written, GB/s", True),
    "attention_gflops": ("attention forward and backward, GFLOP/s", True),
    "compile_seconds": ("compiling one small block, s", False),
}


def measure(seconds: float = 2.5, compiling: bool = True) -> dict[str, float | None]:
    """Every measure of `MEASURES`; None for what does not work here. `seconds`: of each measurement but the last."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "matmul_gflops": _guarded(lambda: _matmul(device, torch.float32, seconds)),
            "matmul_bf16_gflops": _guarded(lambda: _matmul(device, torch.bfloat16, seconds)),
            "memory_gbytes": _guarded(lambda: _memory(device, seconds)),
            "attention_gflops": _guarded(lambda: _attention(device, seconds)),
            "compile_seconds": _guarded(lambda: _compile(device)) if compiling else None,
        }


def _guarded(work: Callable[[], float]) -> float | None:
    """None where this machine cannot do it: a missing compiler, too little memory."""
    try:
        return work()
    except (RuntimeError, OSError, ImportError):
        return None


def _best(work: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds of one call: the median of the faster half of the calls, after a warm-up."""
    work()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return median(sorted(times)[: max(1, len(times) // 2)])


def _matmul(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / _best(lambda: a @ b, device, seconds) / 1e9


def _memory(device: torch.device, seconds: float) -> float:
    count = 2**28 if device.type == "cuda" else 2**25  # float32: 1 GiB or 128 MiB, beyond every cache
    a, b = torch.ones(count, device=device), torch.empty(count, device=device)
    return 2 * 4 * count / _best(lambda: b.copy_(a), device, seconds) / 1e9


def _attention(device: torch.device, seconds: float) -> float:
    rows, heads, length, width = (16, 8, 1024, 64) if device.type == "cuda" else (4, 4, 512, 64)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (
        torch.randn(rows, heads, length, width, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
    )

    def work() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True).sum(), (q, k, v))

    flops = 3.5 * 2 * 2 * rows * heads * length**2 * width / 2  # causal; backward counts two and a half forwards
    return flops / _best(work, device, seconds) / 1e9


def _compile(device: torch.device) -> float:
    """Seconds to compile one small block, forward and backward, from a cold cache."""
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise OSError("no compiler")
    weights = [torch.randn(128, 128, device=device, requires_grad=True) for _ in range(2)]

    def block(x: torch.Tensor) -> torch.Tensor:
        h = F.rms_norm(x, (128,)) @ weights[0]
        return (torch.relu(h).square() @ weights[1] + x).sum()

    with _cold_cache():
        begun = time.perf_counter()
        torch.compile(block, dynamic=False)(torch.randn(64, 128, device=device)).backward()
        return time.perf_counter() - begun


@contextlib.contextmanager
def _cold_cache() -> Iterator[None]:
    import os

    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder))
        try:
            yield
        finally:
            if before is None:
                os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
            else:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def bench(seconds: float = 2.5, compiling: bool = True) -> dict[str, Any]:
    """Measure, compare with what this machine measured before, and keep the result. JSON-able."""
    before = benches()
    now = measure(seconds, compiling)
    remember_bench(now)
    rows = {}
    for name, (_, more_is_better) in MEASURES.items():
        earlier = [value for old in before if isinstance(value := old.get(name), int | float) and value > 0]
        usual, value = (median(earlier) if earlier else None), now[name]
        ratio = None if usual is None or value is None else (usual / value if more_is_better else value / usual)
        rows[name] = {"now": value, "usual": usual, "slower_by": ratio, "slow": ratio is not None and ratio > SLOWER}
    return {"measured_before": len(before), "measures": rows, "slow": any(row["slow"] for row in rows.values())}


def bench_text(result: dict[str, Any]) -> str:
    """The measurements beside what is usual here."""
    from paramgolf.runner.summary import table_text

    rows = []
    for name, row in result["measures"].items():
        usual = "-" if row["usual"] is None else f"{row['usual']:,.1f}"
        value = "not possible here" if row["now"] is None else f"{row['now']:,.1f}"
        rows.append((MEASURES[name][0], value, usual, "slow" if row["slow"] else ""))
    known = result["measured_before"]
    title = f"measured now, and the median of {known} earlier times" if known else "measured for the first time"
    text = table_text(rows, header=("", "now", "usual", ""), title=title)
    return text + ("\nThis machine is more than 10 % slower than it was before." if result["slow"] else "")
