"""The pocket recipes against the baseline's own method at the same caps: `python -m bench.pocket --json FILE`.

All get 1,000,000 bytes by file and 240 s by the strict clock from a cold compile cache on this machine, train on one
piece of the shared web text and are scored on its validation set at the end. A ladder of steps from one to the other
shows where the difference comes from; one more pocket gets 600 s. Runs are appended to FILE as they end; a stopped
bench goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.runs import golf_run
from bench.webtext import train_text, val_text
from paramgolf.runner.environment import environment

BASELINE = str(Path(__file__).with_name("pocket_baseline.toml"))
# From the baseline's method to pocket, one idea a step: what each rung still lacks, as overrides of pocket-1. The first
# step, sliding windows, and the last, the n-gram cache, need no runs of their own: files are scored both ways.
BASELINE_OPTIMIZER = [
    "optim.matrix_lr=0.04", "optim.scalar_lr=0.04", "optim.embed_lr=0.05", "schedule.warmdown_frac=0",
    "schedule.warmdown_iters=1000", "schedule.momentum_warmup_steps=400", "average.kind=none",
]  # fmt: skip
LADDER = {
    "+ finer use of the bytes": [
        *BASELINE_OPTIMIZER, "data.vocab_size=1024", "model.dim=256", "model.num_heads=4", "model.num_kv_heads=2",
        "model.mlp_hidden=544",
    ],
    "+ vocabulary 4,096": BASELINE_OPTIMIZER,
}  # fmt: skip
KEYS = (
    "val_bpb", "val_bpb_sliding", "val_bpb_ngram", "val_bpb_float", "artifact_bytes", "params", "steps",
    "train_tokens", "step_ms", "peak_memory_bytes", "seconds", "peers", "seed",
)  # fmt: skip


class Bench:
    """Runs by name, each done once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": {}}
        self.data["machine"] = environment()

    def run(self, name: str, recipe: str, overrides: list[str]) -> dict[str, Any]:
        if name not in self.data["runs"]:
            record = golf_run(recipe, overrides, train=train_text(), val=val_text())
            self.data["runs"][name] = {"overrides": overrides, **{key: record.get(key) for key in KEYS}}
            self.path.write_text(json.dumps(self.data, indent=1) + "\n")
        return self.data["runs"][name]


def standard(run: dict[str, Any]) -> float:
    return run["val_bpb"]


def sliding(run: dict[str, Any]) -> float:
    return run["val_bpb_sliding"]


def cached(run: dict[str, Any]) -> float:
    return run["val_bpb_ngram"]


def line(name: str, runs: list[dict[str, Any]], score: Callable[[dict[str, Any]], float] = sliding) -> str:
    scores = [score(run) for run in runs]
    spread = f"± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
    size = max(run["artifact_bytes"] for run in runs)
    memory = max(run["peak_memory_bytes"] for run in runs) / 2**20
    tokens = statistics.mean(run["train_tokens"] for run in runs) / 1e6
    return f"{name:28} {statistics.mean(scores):8.4f} {spread:9} {size:10,} {tokens:8.2f} {memory:8,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.pocket", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("results/pocket.json"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--no-ladder", action="store_true", help="only the three recipes")
    options = parser.parse_args()
    bench = Bench(options.json)
    seeds = range(1, options.seeds + 1)
    pocket, first, baseline = [], [], []
    for seed in seeds:  # in turn, so that a machine that slows down slows all
        pocket.append(bench.run(f"pocket {seed}", "pocket", [f"train.seed={seed}"]))
        first.append(bench.run(f"pocket-1 {seed}", "pocket-1", [f"train.seed={seed}"]))
        baseline.append(bench.run(f"baseline {seed}", BASELINE, [f"train.seed={seed}", "score.stride=64"]))
    print(f"{'system':28} {'val_bpb':>8} {'sd':9} {'bytes':>10} {'M tokens':>8} {'MiB':>8}")
    print(line("baseline's method", baseline, standard))
    print(line("  + sliding score", baseline))
    for step, overrides in ({} if options.no_ladder else LADDER).items():
        print(line(f"  {step}", [bench.run(f"ladder {step}", "pocket-1", ["train.seed=1", *overrides])]))
    print(line("  + optimizer = pocket-1", first))
    print(line("  + parts, rates, quantiser", pocket))
    print(line("  + n-gram cache = pocket", pocket, cached))
    print(line("  in 600 s", [bench.run("pocket 600 s", "pocket", ["train.seed=1", "budget.seconds=600"])], cached))
    best = statistics.mean(map(cached, pocket))
    print(f"pocket / baseline's method: {best / statistics.mean(map(standard, baseline)):.4f}")
    print(f"pocket / pocket-1:          {best / statistics.mean(map(sliding, first)):.4f}")
    for name, peer in pocket[0]["peers"].items():
        print(f"{name:28} {peer['bpb']:8.4f}")


if __name__ == "__main__":
    main()
