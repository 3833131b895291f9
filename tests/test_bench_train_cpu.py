"""The bench of training speed: what it counts, and that a row is the recipe's real run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bench.train_cpu import VARIANTS, bench_recipe, better, flops_a_token, peak_flops, table, train, verdict
from paramgolf.model.gpt import GPT
from paramgolf.recipe.load import load_recipe

SMALL = [
    "data.vocab_size=512", "model.dim=32", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1",
    "model.mlp_hidden=64", "train.seq_len=64", "train.batch_tokens=256", "train.threads=1",
]  # fmt: skip


def row(name: str, speed: float, share: float, ratio: float | None) -> dict[str, Any]:
    return {
        "name": name, "tokens_per_second": speed, "flops": speed * 1e6, "share_of_float32_peak": share,
        "ratio_to_eager": ratio, "dtype": "float32", "kernels": "plain", "compiled": False,
        "peak_memory_bytes": 2**28, "cold_seconds": 0.0,
    }  # fmt: skip


def test_flops_are_what_a_counter_sees() -> None:
    """Six FLOPs a weight for the products; PyTorch's own counter sees the forward third of them, attention unhalved."""
    from torch.utils.flop_counter import FlopCounterMode

    section, length, rows = load_recipe("pocket", SMALL).model, 64, 2
    model = GPT(section, 512)
    model.init_weights(0)
    ids = torch.zeros(rows, length, dtype=torch.int64)
    model.use_attention("math")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(ids)
    full_attention = 4 * section.num_layers * length * section.dim
    counted = counter.get_total_flops() / (rows * length)
    ours = flops_a_token(section, 512, length) / 3 + full_attention / 2
    assert math.isclose(counted, ours, rel_tol=0.01)


def test_a_row_is_a_run_of_the_recipe_bound_by_steps() -> None:
    recipe = bench_recipe("pocket", [*SMALL, "train.kernels=plain", "train.compile=off"], 3)
    assert recipe.budget.steps == 3
    assert not recipe.budget.seconds
    answer = train(recipe)
    assert len(answer["step_seconds"]) == 3
    assert min(answer["step_seconds"]) > 0
    assert answer["kernels"] == "plain"
    assert not answer["compiled"]
    assert 5.0 < answer["final_loss"] < 8.0
    assert answer["peak_memory_bytes"] > 2**20


def test_every_variant_is_a_recipe() -> None:
    for overrides in VARIANTS.values():
        bench_recipe("pocket", [f"{key}={value or 'float32'}" for key, value in overrides.items()], 2)


def test_the_peak_is_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.train_cpu.PEAK_SIZES", {128: 3})
    assert 1e7 < peak_flops() < 1e14


def test_the_table_says_what_is_missing_and_whether_targets_are_met() -> None:
    rows = [row("recipe", 1000, 0.5, 1.4), {"name": "compiled", "skipped": "no C++ compiler was found"}]
    lines = table(rows).splitlines()
    assert "1,000" in lines[1]
    assert "50.0%" in lines[1]
    assert "1.40" in lines[1]
    assert "no C++ compiler was found" in lines[2]
    assert verdict(rows).endswith("met")
    assert verdict([row("recipe", 1000, 0.44, 1.4)]).endswith("MISSED")
    assert verdict([row("recipe", 1000, 0.5, 1.2)]).endswith("MISSED")
    assert "not judged" in verdict([row("eager", 1000, 0.5, 1.0)])


def test_the_best_round_of_a_row_counts_with_its_first_cold_start() -> None:
    slow, fast = row("recipe", 1000, 0.5, 1.4) | {"cold_seconds": 4.0}, row("recipe", 2000, 0.5, 1.4)
    assert better(None, slow) == slow
    assert better(slow, fast) == fast | {"cold_seconds": 4.0}
    assert better(fast, slow) == fast
