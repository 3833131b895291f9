"""Initialisation: the distributions that the references have, the same numbers everywhere."""

from __future__ import annotations

import pytest
import torch

from paramgolf.model.gpt import GPT
from paramgolf.model.init import orthogonal
from paramgolf.recipe.sections import ModelSection


def drawn(seed: int = 0, **changes: object) -> GPT:
    sizes = {"dim": 128, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "mlp_hidden": 320}
    model = GPT(ModelSection(**(sizes | changes)), 500)  # type: ignore[arg-type]
    model.init_weights(seed)
    return model


def test_default_initialisation() -> None:
    state = drawn(tie_embeddings=False, qk_gain=1.7, parts={"bigram_hash": {}, "smear_gate": {}}).state_dict()
    assert state["tok_emb.weight"].std().item() == pytest.approx(0.005, rel=0.02)
    for name in ("attn.c_q", "attn.c_k", "attn.c_v", "mlp.fc"):
        w = state[f"blocks.1.{name}.weight"]
        assert w.abs().max().item() == pytest.approx(128**-0.5, rel=0.01) and w.abs().max() <= 128**-0.5
        assert w.std().item() == pytest.approx(128**-0.5 / 3**0.5, rel=0.03)
    for name in ("blocks.0.attn.proj.weight", "blocks.0.mlp.proj.weight", "lm_head.weight", "bigram.embed.weight"):
        assert not state[name].any(), name
    # A zero table with a zero projection would never learn.
    assert state["bigram.proj.weight"].any() and state["bigram.scale"] == pytest.approx(0.05)
    assert (state["blocks.0.attn.q_gain"] == 1.7).all() and (state["skip_weights"] == 1).all()
    assert (state["blocks.0.resid_mix"] == torch.tensor([[1.0], [0.0]])).all() and not state["smear.gate"].any()


def test_orthogonal_initialisation_of_the_pr137_script() -> None:
    state = drawn(init="orthogonal", parts={"bigram_hash": {}}).state_dict()
    for name, gain in (("attn.c_q", 1.0), ("attn.proj", 0.5), ("mlp.fc", 1.0), ("mlp.proj", 0.5)):
        w = state[f"blocks.1.{name}.weight"]
        short = w if w.shape[0] <= w.shape[1] else w.t()
        torch.testing.assert_close(short @ short.t(), gain**2 * torch.eye(short.shape[0]), rtol=0, atol=1e-5)
    columns = state["bigram.proj.weight"].t()
    torch.testing.assert_close(columns @ columns.t(), 0.25 * torch.eye(128), rtol=0, atol=1e-5)
    small = drawn(init="orthogonal", dim=32).state_dict()["blocks.0.attn.c_q.weight"]
    assert small.abs().max() <= 32**-0.5  # sides below 64 keep the default


def test_orthogonal_is_uniformly_distributed() -> None:
    """Without the sign correction of the QR factors, diagonal entries would all lean to one side."""
    draws = torch.stack([orthogonal((4, 4), torch.Generator().manual_seed(i)) for i in range(400)])
    assert draws.mean(0).abs().max() < 0.1
    assert (draws.square().mean(0) - 0.25).abs().max() < 0.06


def test_numbers_depend_on_the_seed_and_the_name_only() -> None:
    plain, again, other = drawn(1), drawn(1), drawn(2)
    more = drawn(1, num_layers=3, parts={"bigram_hash": {}}).state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        if value.ndim == 2 and "skip" not in name:
            assert torch.equal(value, more[name]), name
    assert not torch.equal(plain.tok_emb.weight, other.tok_emb.weight)
