"""The fused CPU kernels compute the same model: against float32, no worse than plain bfloat16 does."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from paramgolf.errors import GolfError
from paramgolf.model.documents import BOS_ID
from paramgolf.model.gpt import GPT
from paramgolf.model.native import build
from paramgolf.model.native.runner import why_not
from paramgolf.quant.grid import Grid
from paramgolf.recipe.sections import GridSection, ModelSection

SECTION = ModelSection(dim=64, num_layers=4, num_heads=4, num_kv_heads=2, mlp_hidden=96)
VOCAB = 272
LENGTH = 96
CASES = {
    "plain": SECTION,
    "odd layers": dataclasses.replace(SECTION, num_layers=5, activation="leaky_relu2"),
    "no skips, one kv head each": dataclasses.replace(SECTION, skips="none", num_kv_heads=4),
    "untied": dataclasses.replace(SECTION, tie_embeddings=False),
    "looped": dataclasses.replace(SECTION, loop_layers=(1, 2), loop_extra=1),
    "parts at the input": dataclasses.replace(
        SECTION, parts={"bigram_hash": {"buckets": 128, "dim": 16}, "smear_gate": {}}
    ),
    "part of the channels rotates": dataclasses.replace(SECTION, rope_dims=6),
    "scaled by depth, gated skips": dataclasses.replace(SECTION, ln_scale=True, skip_gates=True),
    "both branches at once": dataclasses.replace(SECTION, parallel_from=1),
    "two lanes": dataclasses.replace(SECTION, lanes_from=2, num_layers=5),
    "two lanes in a loop": dataclasses.replace(SECTION, num_layers=5, lanes_from=1, loop_layers=(1, 2), loop_extra=1),
    "two lanes all the way, one kept": dataclasses.replace(SECTION, skips="none", lanes_from=0, lane_merge="mlp"),
    "lanes after loops": dataclasses.replace(
        SECTION, num_layers=5, lanes_from=3, lane_merge="attn", loop_layers=(1, 2), loop_extra=2
    ),
    "parts in the layers": dataclasses.replace(
        SECTION,
        parts={
            "xsa": {"last_layers": 2},
            "attn_gate": {"source": "query"},
            "value_embed": {"dim": 16, "layers": [0, 3]},
        },
    ),
    "documents": dataclasses.replace(SECTION, document_mask=True, parts={"smear_gate2": {}}),
    "factored embedding": dataclasses.replace(SECTION, embed_dim=24),
}

needs_kernels = pytest.mark.skipif(build.why_not() != "", reason=f"fused kernels: {build.why_not()}")


def model_of(section: ModelSection, dtype: torch.dtype) -> GPT:
    """A model in which every parameter matters: nothing is zero or one."""
    model = GPT(section, VOCAB)
    model.init_weights(1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 2 and not p.any():
                p.copy_(noise * p.shape[1] ** -0.5)
            elif "tok_emb" in name:
                p.mul_(20)
            elif p.ndim < 2 or "mix" in name or "skip" in name:
                p.add_(0.2 * noise)
    model.compute_dtype = dtype
    model.use_attention("math" if dtype == torch.float32 else "sdpa")
    return model


def results(model: GPT) -> dict[str, Tensor]:
    """Loss, per-token losses and all gradients on a fixed batch with some ignored targets."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCAB, (3, LENGTH), generator=generator)
    targets = torch.randint(0, VOCAB, (3, LENGTH), generator=generator)
    targets[0, :7] = -1
    ids[ids == BOS_ID] = 0
    ids[1, 40], ids[2, [5, 6, 95]] = BOS_ID, BOS_ID
    model.zero_grad()
    loss = model(ids, targets)
    loss.backward()
    with torch.no_grad():
        nll = model(ids, targets, reduction="none")
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "nll": nll, **grads}


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


@needs_kernels
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("qat", [False, True])
def test_kernels_equal_the_plain_model(case: str, qat: bool) -> None:
    found = {}
    for kind in ("exact", "plain", "fused"):
        model = model_of(CASES[case], torch.float32 if kind == "exact" else torch.bfloat16)
        if qat:
            model.set_qat(Grid(GridSection(bits=6)))
        if kind == "fused":
            assert model.use_native(32) == ""
        found[kind] = results(model)
    assert found["fused"].keys() == found["exact"].keys()
    for name, exact in found["exact"].items():
        # bfloat16 rounds either way at about this size; a single number is a sum of thousands that nearly cancel.
        allowed = max(3.0 * distance(found["plain"][name], exact), 0.03 if exact.numel() > 1 else 0.25)
        assert distance(found["fused"][name], exact) <= allowed, name


@needs_kernels
def test_kernels_are_deterministic_and_causal() -> None:
    model = model_of(SECTION, torch.bfloat16)
    assert model.use_native(32) == ""
    first, second = results(model), results(model)
    assert all(torch.equal(first[name], second[name]) for name in first)
    ids = torch.randint(0, VOCAB, (1, LENGTH))
    changed = ids.clone()
    changed[0, 50:] = (changed[0, 50:] + 1) % VOCAB
    with torch.no_grad():
        a, b = model.hidden(ids), model.hidden(changed)
    assert torch.equal(a[:, :50], b[:, :50])
    assert not torch.equal(a[:, 50:], b[:, 50:])


@needs_kernels
def test_odd_lengths_take_the_plain_way() -> None:
    model = model_of(SECTION, torch.bfloat16)
    ids = torch.randint(0, VOCAB, (2, 45))
    with torch.no_grad():
        plain = model.logits(ids)
        assert model.use_native(32) == ""
        assert torch.equal(model.logits(ids), plain)


def test_what_the_kernels_cannot_do_is_said() -> None:
    model = model_of(SECTION, torch.float32)
    assert "bfloat16" in model.use_native(32)
    model = model_of(dataclasses.replace(SECTION, logit_softcap=0.0), torch.bfloat16)
    assert "softcapped" in model.use_native(32)
    model = model_of(SECTION, torch.bfloat16)
    assert "seq_len" in why_not(model, 40)


def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build, "cpu_flags", lambda: set(build.NEEDED_CPU))
    assert "compiler" in build.why_not()
    with pytest.raises((AssertionError, GolfError)):
        build.load.__wrapped__()
