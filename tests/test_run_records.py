"""A record's whole way at a tiny size: packed documents, loops, lanes, GPTQ, corrections, file, test-time training."""

from __future__ import annotations

from pathlib import Path

import pytest

from paramgolf.recipe.load import load_recipe, recipe_names
from paramgolf.runner.run import run

SMALL = [
    "model.dim=64", "model.num_heads=4", "model.num_kv_heads=2", "model.mlp_hidden=128", "model.rope_dims=8",
    "data.vocab_size=512", "data.tokenizer_text_bytes=200000", "data.val_max_bytes=6000",
    "train.batch_tokens=2048", "train.seq_len=128", "train.compile=off", "train.log_every=1", "score.seq_len=0",
    "schedule.warmup_steps=1", "budget.seconds=0", "budget.steps=6", "quant.calibration_tokens=2048",
    "stages=[]", "pack.fit=false",  # nothing this small is on a grid that the solver may move
    "ttt.chunk=64", "ttt.rank=4", "ttt.batch_docs=8",
]  # fmt: skip


@pytest.mark.parametrize("name", [n for n in recipe_names() if n.startswith(("record-", "frontier"))])
def test_a_record_in_small(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, SMALL)
    record = run(recipe, out=tmp_path / "run")
    assert record is not None and record["steps"] == 6
    assert abs(record["val_bpb"] - record["val_bpb_float"]) < 0.01 < record["val_bpb"] < 8
    assert ("val_bpb_ttt" in record) == (recipe.ttt.kind != "none")
    assert record["artifact_bytes"] == (tmp_path / "run" / "model.golf").stat().st_size
