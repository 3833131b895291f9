"""Does sliding-window scoring cost what its windows cost? python -m bench.scoring [--json FILE] [--recipe NAME] ...

For each stride: seconds of the score against (number of windows) x (time of one window in a plain forward with loss on
the same batches). Random weights and tokens: neither changes the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paramgolf.dist import pick_device
from paramgolf.files import atomic_write
from paramgolf.model.gpt import GPT
from paramgolf.recipe.load import load_recipe
from paramgolf.score.scorer import score


class OneByteEach:
    def count(self, prev: np.ndarray, target: np.ndarray) -> np.ndarray:
        return np.ones(np.shape(target), np.int64)


def forward_seconds(model: GPT, rows: int, seq_len: int, repeats: int) -> float:
    """Median seconds a window of a plain forward over `rows` windows, loss included."""
    ids = torch.randint(model.vocab_size, (rows, seq_len + 1), device=model.tok_emb.weight.device)
    times = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            began = time.perf_counter()
            model(ids[:, :-1], ids[:, 1:], "none").sum().item()
            times.append((time.perf_counter() - began) / rows)
    return statistics.median(times[1:])


def measure(
    model: GPT, tokens: np.ndarray, seq_len: int, stride: int, batch_tokens: int, repeats: int
) -> dict[str, Any]:
    """One row: the score's seconds (best of two; the first also warms up) and what its windows cost in plain forwards,
    timed before and after it."""
    rows = max(1, batch_tokens // seq_len)
    before = forward_seconds(model, rows, seq_len, repeats)
    runs = [
        score(model, tokens, token_bytes=OneByteEach(), seq_len=seq_len, stride=stride, batch_tokens=batch_tokens)
        for _ in range(2)
    ]
    window = min(before, forward_seconds(model, rows, seq_len, repeats))
    seconds = min(run.seconds for run in runs)
    implied = window * runs[0].forwards
    return {
        "stride": stride, "windows": runs[0].forwards, "scored_tokens": runs[0].scored_tokens, "seconds": seconds,
        "implied_seconds": implied, "ratio": seconds / implied, "tokens_per_second": runs[0].scored_tokens / seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scoring", description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--recipe", default="pocket")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokens", type=int, default=0, help="length of the stream; 0 = 12 windows (CUDA: 400)")
    parser.add_argument("--batch-tokens", type=int, default=0, help="0 = 8 windows (CUDA: 64)")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = pick_device(options.device)
    recipe = load_recipe(options.recipe)
    seq_len = recipe.score.seq_len or recipe.train.seq_len
    model = GPT(recipe.model, recipe.data.vocab_size).to(device).eval()
    model.init_weights(0)
    if device.type == "cuda":
        model.compute_dtype = torch.bfloat16
    count = options.tokens or seq_len * (400 if device.type == "cuda" else 12) + 1
    batch_tokens = options.batch_tokens or seq_len * (64 if device.type == "cuda" else 8)
    tokens = np.random.default_rng(0).integers(2, recipe.data.vocab_size, count).astype(np.uint16)
    strides = sorted({seq_len, seq_len // 4, max(1, seq_len // 16)}, reverse=True)
    rows = [measure(model, tokens, seq_len, s, batch_tokens, options.repeats) for s in strides]
    print(f"{recipe.name}: windows of {seq_len}, {count - 1:,} targets, {device}, {torch.get_num_threads()} threads")
    print(f"{'stride':>7} {'windows':>8} {'seconds':>9} {'implied':>9} {'ratio':>6} {'targets/s':>10}")
    for r in rows:
        print(
            f"{r['stride']:7} {r['windows']:8} {r['seconds']:9.3f} {r['implied_seconds']:9.3f} {r['ratio']:6.3f} "
            f"{r['tokens_per_second']:10.0f}"
        )
    if options.json:
        facts = {"recipe": recipe.name, "device": str(device), "threads": torch.get_num_threads(), "seq_len": seq_len}
        atomic_write(options.json, json.dumps({**facts, "limit": 1.3, "rows": rows}, indent=1).encode())


if __name__ == "__main__":
    main()
