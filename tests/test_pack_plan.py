"""Sizes, steps and time before training, and the live forecast: against files that are really made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from paramgolf.pack import forecast as forecasts
from paramgolf.pack.forecast import forecast, plan_bytes
from paramgolf.pack.ledger import group_of
from paramgolf.pack.packer import pack_model
from paramgolf.recipe.load import load_recipe
from paramgolf.runner.plan import make_plan, plan_text, predict_steps
from tests.run_common import golf_here
from tests.test_pack_packer import SMALL, VOCAB, small, weights

# Counted bytes of the published runs and the code in them, from their logs.
PUBLISHED = {
    "baseline": (15_863_489, 47_642),
    "pr107": (15_925_577, 64_517),
    "pr114": (15_977_717, 53_569),
    "pr128": (15_162_777, 50_000),
    "pr137": (15_216_221, 59_581),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_sizes_lie_in_their_intervals(name: str) -> None:
    total, code = PUBLISHED[name]
    sizes = plan_bytes(load_recipe(name), 1024, code_bytes=code)
    assert sizes.low_bytes <= total <= sizes.high_bytes and sizes.fits
    assert sizes.low_bytes < sizes.typical_bytes < sizes.high_bytes
    assert sum(part.typical for part in sizes.groups.values()) == pytest.approx(sizes.typical_bytes, abs=1)


@pytest.mark.parametrize("cap", [60_000, 90_000])
def test_a_solver_packed_recipe_is_planned_at_its_cap(tmp_path: Path, cap: int) -> None:
    recipe = load_recipe("pocket", [*SMALL, "pack.codec=rans", "pack.fit=true", f"budget.bytes={cap}", "model.dim=96"])
    sizes = plan_bytes(recipe, VOCAB, tokenizer_bytes=3)
    state = weights(recipe).state_dict()
    real = pack_model(state, recipe, b"tok", tmp_path / "m", VOCAB).counted_bytes
    assert sizes.typical_bytes == pytest.approx(real, rel=0.02)
    assert sizes.low_bytes <= real <= sizes.high_bytes
    assert forecast(state, recipe, tokenizer_bytes=3) == pytest.approx(real, rel=0.02)


def test_a_cap_that_no_plan_fits_is_refused_before_training() -> None:
    words = [*SMALL, "pack.codec=rans", "pack.fit=true", "model.dim=96"]
    assert not plan_bytes(load_recipe("pocket", [*words, "budget.bytes=9000"]), VOCAB).fits
    high = plan_bytes(load_recipe("pocket", [*words, "budget.bytes=10000000"]), VOCAB)
    assert high.fits and high.high_bytes < 10_000_000


@pytest.mark.parametrize("limit", [0, 300_000])
@pytest.mark.parametrize("codec", ["rans", "zlib", "zstd", "raw"])
@pytest.mark.parametrize("name", ["pocket", "pr107", "pr114"])
def test_the_forecast_is_within_two_percent(
    tmp_path: Path, name: str, codec: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a model too large to be coded whole (limit), whose sample stands for the rest."""
    words = [f"pack.codec={codec}", "pack.count=file", "model.dim=96", "model.num_layers=6"]
    words += [] if name == "pocket" else ['quant.rules=[{match="@control", store="float32"}, {store="int6"}]']
    recipe = small(*words, name=name)
    state = weights(recipe).state_dict()
    real = pack_model(state, recipe, b"tok", tmp_path / "m", VOCAB).counted_bytes
    if limit:
        monkeypatch.setattr(forecasts, "_CODED", dict.fromkeys(forecasts._CODED, limit))
        monkeypatch.setattr(forecasts, "_CODED_SLOWLY", limit)
    assert forecast(state, recipe, tokenizer_bytes=3) == pytest.approx(real, rel=0.02)


def test_a_forecast_survives_weights_that_are_not_numbers() -> None:
    recipe = small("pack.codec=rans")
    state = dict(weights(recipe).state_dict())
    state["tok_emb.weight"] = torch.full_like(state["tok_emb.weight"], torch.nan)
    assert forecast(state, recipe) > 0


def test_groups_are_those_of_the_ledger() -> None:
    sizes = plan_bytes(load_recipe("pocket"), 1024, tokenizer_bytes=7)
    known = {group_of(spec.name) for spec in sizes.specs} | {"scales", "tokenizer", "manifest"}
    assert set(sizes.groups) == known and sizes.groups["tokenizer"].typical == 7


STEP = {(256, 4096): 0.5, (512, 8192): 1.0}
BASE = ["train.batch_tokens=4096", "train.seq_len=256", "budget.clock=strict"]


def recipe_of(*words: str) -> Any:
    return load_recipe("pocket", [*BASE, *words])


def test_steps_by_seconds_steps_and_tokens() -> None:
    timed = predict_steps(recipe_of("budget.seconds=100"), STEP, 10.0, 15.0)
    assert timed["steps"] == 150 and timed["stop_reason"] == "seconds"
    assert timed["total_seconds"] == pytest.approx(100.0)
    assert predict_steps(recipe_of("budget.seconds=0", "budget.steps=40"), STEP, 1.0, 1.0)["steps"] == 40
    counted = predict_steps(recipe_of("budget.seconds=0", "budget.tokens=41000"), STEP, 1.0, 1.0)
    assert counted["steps"] == 10 and counted["train_tokens"] == 40_960 and counted["stop_reason"] == "tokens"
    both = predict_steps(recipe_of("budget.seconds=1000", "budget.steps=7"), STEP, 1.0, 1.0)
    assert both["steps"] == 7 and both["stop_reason"] == "steps"
    assert predict_steps(recipe_of("budget.seconds=3"), STEP, 10.0, 15.0)["steps"] == 1


def test_stages_change_the_step(tmp_path: Path) -> None:
    path = tmp_path / "staged.toml"
    path.write_text('extends = "pocket"\n[[stages]]\nat = 0.5\nseq_len = 512\nbatch_tokens = 8192\n')
    recipe = load_recipe(str(path), [*BASE, "budget.seconds=100"])
    plan = predict_steps(recipe, STEP, 0.0, 0.0)
    assert plan["steps"] == pytest.approx(150, abs=2) and plan["train_tokens"] == pytest.approx(100 * 8192, rel=0.02)


def test_the_plan_of_a_tiny_recipe_is_measured_here(tmp_path: Path, capfd: Any) -> None:
    words = [*SMALL, "data.vocab_size=300", "train.batch_tokens=512", "budget.seconds=20", "train.compile=off"]
    answer = golf_here(capfd, "plan", "pocket", *words, "--runs", tmp_path, "--json")
    plan = json.loads(answer.out)
    assert plan["params"] == plan_bytes(load_recipe("pocket", words), 300).params
    assert plan["steps"] > 1 and plan["step_ms"] > 0 and "made-up tokens" in plan["timing"]
    text = golf_here(capfd, "plan", "pocket", *words, "--runs", tmp_path, "--no-measure").out
    assert "embedding" in text and "steps" not in text


def test_a_plan_in_words() -> None:
    text = plan_text(make_plan(load_recipe("pr114"), runs=Path("nowhere"), measure=False))
    assert text.startswith("pr114: 21,778,504 parameters, 22,690,080 bytes unpacked") and "mlp.up" in text
