"""How fast the lab answers about many runs: `python -m bench.lab [--json FILE]`.

Synthetic run folders with records, recipes, logs and artifacts of the usual sizes; `golf runs` over 5,000 records (the
index new, and already there) and `golf report` over 200 runs, each in a process of its own as a user would start it.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from paramgolf.files import sha256_bytes
from paramgolf.recipe.load import load_recipe, to_toml
from paramgolf.runner.environment import cpu_name
from paramgolf.runner.record import FORMAT, seal

LIMITS = {"golf runs, index there": 1.0, "golf report": 10.0}  # seconds
PAGE_LIMIT = 3_000_000  # bytes


def write_run(folder: Path, index: int, *, lines: int, artifact_bytes: int) -> None:
    """A finished run as `golf run` leaves it: the numbers are made up, the sizes and the keys are not."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(index)
    hidden = 384 + 48 * (index % 9)
    recipe = to_toml(load_recipe("pocket", [f"train.seed={index // 9}", f"model.mlp_hidden={hidden}"])).encode()
    bpb = 2.05 + ((hidden - 560) / 900) ** 2 + 0.004 * float(random.standard_normal())
    rows = [
        {
            "step": step, "loss": 3.1 + 5 * math.exp(-step / 90) + 0.05 * float(random.standard_normal()),
            "lr_mul": 1.0, "momentum": 0.95, "tokens": 4096 * step, "elapsed": 0.11 * step, "grad_norm": 1.0,
            "strict": 4 + 0.11 * step,
        }
        for step in range(1, lines * 10 + 1, 10)
    ]  # fmt: skip
    log = "".join(json.dumps(row) + "\n" for row in rows).encode()
    artifact = random.bytes(artifact_bytes)
    (folder / "recipe.toml").write_bytes(recipe)
    (folder / "train.jsonl").write_bytes(log)
    (folder / "model.golf").write_bytes(artifact)
    size = 700_000 + 500 * hidden
    shard = {"name": "x.bin", "tokens": 1, "sha256": "0" * 64}
    record: dict[str, Any] = {
        "format": FORMAT, "paramgolf": "0.1.0", "recipe": "pocket", "seed": index // 9,
        "sha256": {
            "source": "0" * 64, "recipe": sha256_bytes(recipe), "artifact": sha256_bytes(artifact),
            "train_log": sha256_bytes(log),
        },
        "environment": {"cpu": "a processor", "cpu_count": 2, "gpus": [], "torch": "2", "packages": {"numpy": "2"}},
        "val_loss": 3.2, "val_bpb": bpb, "val_loss_sliding": 3.1, "val_bpb_sliding": bpb - 0.02, "stride": 64,
        "scored_tokens": 80_000, "scored_bytes": 300_000, "bytes_from": "documents", "val_bpb_float": bpb - 0.004,
        "artifact_bytes": size, "code_bytes": 0, "total_bytes": size, "cap_bytes": 1_000_000,
        "ledger": {"embedding": 500_000, "matrices": size - 560_000, "scales": 30_000, "tokenizer": 25_000,
                   "manifest": 5_000},
        "codec": "rans", "params": 2_000_000 + 1000 * hidden, "steps": 10 * lines, "train_tokens": 40_960 * lines,
        "step_ms": 110.0, "seconds": {"strict": 239.0, "challenge": 230.0, "process": 260.0, "train": 220.0},
        "peak_memory_bytes": 900_000_000,
        "training": {"train_seconds": 220.0, "stop_reason": "seconds", "world": 1},
        "data": {
            "source": [{"sha256": "1" * 64}], "tokenizer": {"sha256": "2" * 64}, "train": {"shards": [shard]},
            "val": {"shards": [shard], "sha256": "3" * 64},
        },
        "peers": {}, "paths": {"artifact": "model.golf", "report": "report.html"},
    }  # fmt: skip
    (folder / "record.json").write_text(json.dumps(seal(record), indent=1) + "\n")


def timed(*arguments: str | Path) -> float:
    """Seconds of a golf command, from the start of its process."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "paramgolf", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.lab", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--records", type=int, default=5000)
    parser.add_argument("--runs", type=int, default=200)
    options = parser.parse_args()
    rows: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for i in range(options.records):
            write_run(root / "many" / f"pocket-{i}", i, lines=2, artifact_bytes=100)
        for i in range(options.runs):
            write_run(root / "runs" / f"pocket-{i}", i, lines=400, artifact_bytes=900_000)
        rows["golf runs, index new"] = timed("runs", "--root", root / "many")
        rows["golf runs, index there"] = min(timed("runs", "--root", root / "many") for _ in range(3))
        page = root / "report.html"
        rows["golf report"] = min(timed("report", root / "runs", "-o", page) for _ in range(2))
        size = page.stat().st_size
    for name, seconds in rows.items():
        limit = f"  limit {LIMITS[name]:g}" if name in LIMITS else ""
        print(f"{name:26} {seconds:7.2f} s{limit}")
    print(f"{'size of the page':26} {size:9,} bytes  limit {PAGE_LIMIT:,}")
    if options.json:
        facts = {
            "records": options.records, "runs": options.runs, "seconds": rows, "page_bytes": size, "cpu": cpu_name(),
        }  # fmt: skip
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
