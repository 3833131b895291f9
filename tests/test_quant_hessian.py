"""Second moments of layer inputs: the right inputs, all of them, whatever the batches; GPTQ through a whole run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from paramgolf.dist import Dist, init
from paramgolf.errors import GolfError
from paramgolf.model.gpt import GPT
from paramgolf.quant.hessian import collect, training_loss, training_rows
from paramgolf.recipe.load import load_recipe
from paramgolf.runner.run import run
from tests.run_common import TINY, prose
from tests.train_common import spawn_ranks

SMALL = [
    "model.dim=32", "model.num_layers=3", "model.num_heads=4", "model.num_kv_heads=2", "model.mlp_hidden=48",
]  # fmt: skip
VOCAB = 100


def model(*overrides: str) -> GPT:
    made = GPT(load_recipe("pocket", [*SMALL, *overrides]).model, VOCAB)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return made


def text(size: int = 3000) -> list[np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, VOCAB, size).astype(np.uint16)
    return [tokens[: size // 3], tokens[size // 3 :]]


def test_every_linear_weight_and_the_head_have_the_moments_of_what_they_read() -> None:
    made = model("model.parts={}")  # a gate's own weights are no layer of their own
    means = collect(made, text(), seq_len=50, tokens=600, dist=Dist())
    linear = {name for name in made.state_dict() if name.startswith("blocks.") and name.endswith(".weight")}
    assert set(means) == {*linear, "tok_emb.weight"}
    rows = torch.cat(list(training_rows(text(), seq_len=50, tokens=600)))[:, :-1]
    h = made.hidden(rows).flatten(0, 1).detach()
    assert torch.allclose(means["tok_emb.weight"], h.t() @ h / len(h), rtol=1e-4, atol=1e-5)
    q, k = (means[f"blocks.1.attn.{name}.weight"] for name in ("c_q", "c_k"))
    assert torch.equal(q, k)
    # the block input is normalised: the mean square of its channels is 1
    assert float(q.diagonal().mean()) == pytest.approx(1.0, abs=1e-3)
    assert not made.training and not any(m._forward_pre_hooks for m in made.modules())


def test_an_untied_head_and_parts_are_covered() -> None:
    made = model("model.tie_embeddings=false", "model.parts.bigram_hash={buckets=64, dim=16}")
    means = collect(made, text(), seq_len=50, tokens=600, dist=Dist())
    assert "lm_head.weight" in means and "tok_emb.weight" not in means
    assert means["bigram.proj.weight"].shape == (16, 16)


def rank(out: str) -> None:
    dist = init("cpu")
    means = collect(model(), text(), seq_len=50, tokens=650, dist=dist)
    save_file(means, f"{out}/{dist.rank}.safetensors")
    dist.close()


def test_ranks_share_the_rows_and_get_the_same_means(tmp_path: Path) -> None:
    whole = collect(model(), text(), seq_len=50, tokens=650, dist=Dist())
    assert spawn_ranks(2, rank, str(tmp_path)) == [0, 0]
    first, second = (load_file(tmp_path / f"{r}.safetensors") for r in range(2))
    assert set(first) == set(whole)
    assert all(torch.equal(first[name], second[name]) for name in whole)
    assert all(torch.allclose(first[name], whole[name], rtol=1e-4, atol=1e-6) for name in whole)


def test_batches_do_not_matter_and_another_phase_is_other_text() -> None:
    small = torch.cat(list(training_rows(text(), seq_len=50, tokens=600, batch_tokens=100)))
    assert torch.equal(small, torch.cat(list(training_rows(text(), seq_len=50, tokens=600))))
    other = torch.cat(list(training_rows(text(), seq_len=50, tokens=600, phase=0.5)))
    assert other.shape == small.shape and not torch.equal(other, small)


def test_the_loss_is_that_of_the_windows_between() -> None:
    made = model()
    rows = torch.cat(list(training_rows(text(), seq_len=50, tokens=600, phase=0.5)))
    expected = float(made(rows[:, :-1], rows[:, 1:]).detach())
    assert training_loss(made, text(), seq_len=50, tokens=600) == pytest.approx(expected, rel=1e-5)


def test_no_text_is_refused_and_a_short_one_wraps() -> None:
    with pytest.raises(GolfError, match="no training text"):
        next(training_rows([], seq_len=8, tokens=8))
    assert next(training_rows([np.arange(5, dtype=np.uint16)], seq_len=8, tokens=16)).shape == (2, 9)


def test_a_run_with_gptq_calibrates_inside_the_clock(tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text(prose())
    overrides = [*TINY, "quant.method=gptq", "quant.calibration_tokens=2048", "budget.bytes=0"]
    record = run(load_recipe("pocket", overrides), data=str(source), out=tmp_path / "run")
    assert record is not None and record["seconds"]["calibrate"] > 0
    assert abs(record["val_bpb"] - record["val_bpb_float"]) < 0.1
