"""How fast does a recipe train on this CPU? python -m bench.train_cpu [--json FILE] [--recipe pocket] [--only NAMES]

Each row is the recipe's real run (model, batch, row length, optimizer step, weight average) in a process of its own:
as the recipe has it, compiled (plain kernels), eager with the same types, and eager in float32. The rows take turns in
rounds, the first with empty caches; a row's best round counts (by its median step), so that a neighbour on the machine
does not decide. Between rows the float32 peak is measured, and the best of all counts. Weights and tokens are random:
neither changes the time.

FLOPs of a token, forward and backward: 6 N + 6 L T D, with N the weights of all matrix products (the output layer
once, lookup tables not at all), L layers, T row length and D width of the queries. Causal attention is counted as the
half it needs: 2 products x 2 FLOPs x T/2 x D forward, twice that backward.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paramgolf.dist import Dist
from paramgolf.errors import GolfError
from paramgolf.files import atomic_write
from paramgolf.model.gpt import GPT
from paramgolf.model.layers import Linear
from paramgolf.model.native import build
from paramgolf.recipe.load import load_recipe
from paramgolf.recipe.sections import ModelSection, Recipe
from paramgolf.runner.environment import environment
from paramgolf.train import compiling, runtime
from paramgolf.train.callbacks import Callback, Callbacks, StepInfo
from paramgolf.train.clock import Clock
from paramgolf.train.session import Session
from paramgolf.train.signals import Interrupts

# Overrides of each row; None = the type that the first row chose, so that the peers compute in the same one.
VARIANTS: dict[str, dict[str, str | None]] = {
    "recipe": {},
    "compiled": {"train.kernels": "plain", "train.compile": "on", "train.dtype": None},
    "eager": {"train.kernels": "plain", "train.compile": "off", "train.dtype": None},
    "eager-fp32": {"train.kernels": "plain", "train.compile": "off", "train.dtype": "float32"},
}
PEAK_SIZES = {1024: 10, 2048: 4, 4096: 1}  # side of the square product: how often it is timed
TARGET_SHARE, TARGET_RATIO = 0.45, 1.3
TOKENS = 1_000_000


@dataclass(frozen=True)
class _Vocabulary:
    vocab_size: int
    bos_id: int = 1


@dataclass(frozen=True)
class RandomTokens:
    """What a training session needs of a dataset."""

    tokenizer: _Vocabulary

    def train_tokens(self) -> list[np.ndarray]:
        return [np.random.default_rng(0).integers(2, self.tokenizer.vocab_size, TOKENS).astype(np.uint16)]


class StepTimes(Callback):
    """Seconds of every step of the main loop."""

    def __init__(self) -> None:
        self.ends = [0.0]

    def on_step(self, info: StepInfo, fraction: float, model: torch.nn.Module) -> None:
        self.ends.append(info.elapsed)

    def seconds(self) -> list[float]:
        return [end - begun for begun, end in zip(self.ends, self.ends[1:], strict=False)]


def peak_flops() -> float:
    """FLOP/s of the best float32 square matrix product, with the threads torch has."""
    best = 0.0
    for side, repeats in PEAK_SIZES.items():
        a, b, out = (torch.randn(side, side) for _ in range(3))
        for _ in range(repeats):
            began = time.perf_counter()
            torch.mm(a, b, out=out)
            best = max(best, 2 * side**3 / (time.perf_counter() - began))
    return best


def flops_a_token(section: ModelSection, vocab_size: int, seq_len: int) -> float:
    """See the formula at the top."""
    with torch.device("meta"):
        model = GPT(section, vocab_size)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))
    if model.lm_head is None:
        weights += model.tok_emb.weight.numel()
    return 6.0 * weights + 6.0 * section.num_layers * seq_len * section.dim


def bench_recipe(name: str, overrides: list[str], steps: int) -> Recipe:
    """The recipe as far as its speed goes: bound by steps, one shape, no phase after the main loop."""
    recipe = load_recipe(name, ["train.device=cpu", *overrides])
    quant = dataclasses.replace(recipe.quant, post_qat="", qat=recipe.quant.qat if recipe.quant.qat_start == 0 else "")
    return dataclasses.replace(
        recipe,
        stages=(),
        quant=quant,
        budget=dataclasses.replace(recipe.budget, seconds=0.0, tokens=0, steps=steps),
        schedule=dataclasses.replace(recipe.schedule, warmup_steps=2),
        train=dataclasses.replace(recipe.train, checkpoint_every=0.0, checkpoint_every_steps=0, log_every=10**9),
    )


def train(recipe: Recipe) -> dict[str, Any]:
    """Train in this process; what is worth knowing about the speed."""
    times, clock = StepTimes(), Clock(age=0.0)
    data = RandomTokens(_Vocabulary(recipe.data.vocab_size))
    with tempfile.TemporaryDirectory() as folder, Interrupts() as interrupts:
        session = Session(recipe, data, Path(folder), clock, Dist(), Callbacks([times]), interrupts)  # type: ignore[arg-type]
        result = session.run(False, 0.0).result
    seconds, phases = times.seconds(), clock.phases()
    return {
        "tokens_per_second": recipe.train.batch_tokens / statistics.median(seconds),
        "best_tokens_per_second": recipe.train.batch_tokens / min(seconds),  # what a quiet moment gave
        "step_seconds": seconds,
        "dtype": result.dtype,
        "kernels": result.kernels,
        "compiled": result.compiled["enabled"],
        "note": result.compiled["reason"],
        "cold_seconds": phases.get("kernels", 0.0) + phases.get("compile", 0.0),
        "peak_memory_bytes": result.peak_memory_bytes["cpu"],
        "threads": result.threads,
        "final_loss": result.final_loss,
    }


def measure(name: str, recipe: str, overrides: list[str], steps: int, scratch: Path) -> dict[str, Any]:
    """One row, in a process of its own; its caches are in `scratch` (empty: a cold start)."""
    out = scratch / "row.json"
    command = [sys.executable, "-m", "bench.train_cpu", "--recipe", recipe, "--steps", str(steps)]
    command += [part for o in overrides for part in ("--set", o)] + ["--worker", str(out)]
    caches = {"XDG_CACHE_HOME": str(scratch), "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")}
    if subprocess.run(command, env=os.environ | caches, check=False).returncode:
        raise GolfError(f"row '{name}' failed: its message is above")
    return {"name": name, **json.loads(out.read_text())}


def better(before: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
    """The faster of two rounds of a row, with the cold start of the first."""
    if before is None:
        return now
    fast = max(before, now, key=lambda r: r["tokens_per_second"])
    return fast | {"cold_seconds": before["cold_seconds"]}


def missing(name: str) -> str:
    """Why a row cannot be had on this machine, "" when it can."""
    return compiling.missing_tool("cpu") if VARIANTS[name].get("train.compile") == "on" else ""


def measure_all(
    names: list[str], recipe: str, overrides: list[str], steps: int, rounds: int
) -> tuple[list[dict[str, Any]], float]:
    """(rows, the peak in FLOP/s): each row's best round, and the best peak between them."""
    base = load_recipe(recipe, overrides)
    dtype = str(runtime.configure(base.train, torch.device("cpu")).dtype).removeprefix("torch.")
    peak = peak_flops()
    found: dict[str, dict[str, Any]] = {name: {"name": name, "skipped": missing(name)} for name in names}
    wanted = [name for name in names if not found[name]["skipped"]]
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(rounds):
            for name in wanted:
                own = [f"{key}={dtype if value is None else value}" for key, value in VARIANTS[name].items()]
                folder = Path(scratch, name)
                folder.mkdir(exist_ok=True)
                row = measure(name, recipe, [*overrides, *own], steps, folder)
                found[name] = better(found[name] if turn else None, row)
                peak = max(peak, peak_flops())
    rows = list(found.values())
    flops = flops_a_token(base.model, base.data.vocab_size, base.train.seq_len)
    eager = next((r["tokens_per_second"] for r in rows if r["name"] == "eager"), None)
    for row in rows:
        if "skipped" not in row:
            row["flops"] = row["tokens_per_second"] * flops
            row["share_of_float32_peak"] = row["flops"] / peak
            row["ratio_to_eager"] = row["tokens_per_second"] / eager if eager else None
    return rows, peak


def table(rows: list[dict[str, Any]]) -> str:
    """The printed rows."""
    head = f"{'':11} {'type':9} {'kernels':8} {'tokens/s':>9} {'GFLOP/s':>8} {'of peak':>8} {'x eager':>8}"
    lines = [f"{head} {'memory MiB':>11} {'cold s':>7}"]
    for r in rows:
        if "skipped" in r:
            lines.append(f"{r['name']:11} not measured: {r['skipped']}")
            continue
        ratio = f"{r['ratio_to_eager']:8.2f}" if r["ratio_to_eager"] else f"{'':8}"
        kernels = "compiled" if r["compiled"] else r["kernels"]
        lines.append(
            f"{r['name']:11} {r['dtype']:9} {kernels:8} {r['tokens_per_second']:9,.0f} {r['flops'] / 1e9:8.1f} "
            f"{100 * r['share_of_float32_peak']:7.1f}% {ratio} {r['peak_memory_bytes'] / 2**20:11,.0f} "
            f"{r['cold_seconds']:7.1f}"
        )
    return "\n".join(lines)


def verdict(rows: list[dict[str, Any]]) -> str:
    """The targets, and whether the recipe's own row meets them."""
    own = next((r for r in rows if r["name"] == "recipe" and "skipped" not in r), None)
    words = f"targets: at least {100 * TARGET_SHARE:.0f} % of the peak and {TARGET_RATIO} x eager"
    if own is None or own["ratio_to_eager"] is None:
        return f"{words}: not judged (rows recipe and eager are needed)"
    met = own["share_of_float32_peak"] >= TARGET_SHARE and own["ratio_to_eager"] >= TARGET_RATIO
    return f"{words}: {'met' if met else 'MISSED'}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.train_cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--recipe", default="pocket")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each row; the median counts")
    parser.add_argument("--rounds", type=int, default=2, help="how often each row is measured; the best round counts")
    parser.add_argument("--only", default=",".join(VARIANTS), help="rows to measure, separated by commas")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="recipe override")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        recipe = bench_recipe(options.recipe, options.set, options.steps)
        if options.worker:
            options.worker.write_text(json.dumps(train(recipe)))
            return
        names = options.only.split(",")
        if unknown := sorted(set(names) - set(VARIANTS)):
            raise GolfError(f"no row '{unknown[0]}'; known: {', '.join(VARIANTS)}")
        rows, peak = measure_all(names, options.recipe, options.set, options.steps, options.rounds)
    except GolfError as error:
        sys.exit(f"bench: {error}")
    flops = flops_a_token(recipe.model, recipe.data.vocab_size, recipe.train.seq_len)
    print(
        f"{recipe.name}: {recipe.train.batch_tokens:,} tokens a step in rows of {recipe.train.seq_len}, "
        f"{flops / 1e6:.1f} MFLOP a token (6 N + 6 L T D), {torch.get_num_threads()} threads; "
        f"float32 matrix products peak at {peak / 1e9:.0f} GFLOP/s"
    )
    print(table(rows))
    print(verdict(rows))
    if reason := build.why_not():
        print(f"no fused kernels here: {reason}")
    if options.json:
        facts = {
            "recipe": recipe.name, "overrides": options.set, "batch_tokens": recipe.train.batch_tokens,
            "seq_len": recipe.train.seq_len, "flops_a_token": flops, "flops_formula": "6 N + 6 L T D",
            "peak_flops": peak, "targets": {"share_of_float32_peak": TARGET_SHARE, "ratio_to_eager": TARGET_RATIO},
        }  # fmt: skip
        answer = {**facts, "rows": rows, "environment": environment()}
        atomic_write(options.json, json.dumps(answer, indent=1).encode())


if __name__ == "__main__":
    main()
