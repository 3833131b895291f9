"""The GPT: sizes, causality, losses, decoding with a cache, precision, fake quantisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from paramgolf.errors import GolfError
from paramgolf.model.cache import KVCache
from paramgolf.model.gpt import GPT
from paramgolf.model.loss import CHUNK_ELEMENTS, chunks
from paramgolf.quant.grid import Grid
from paramgolf.recipe.sections import GridSection, ModelSection
from tests.model_common import PARTS, VOCAB, section, small_gpt, tokens

VARIANTS: list[dict[str, Any]] = [
    {},
    {"parts": PARTS},
    {"num_layers": 1, "tie_embeddings": False},
    {"num_layers": 4, "num_kv_heads": 1, "skips": "none", "logit_softcap": 0.0, "activation": "leaky_relu2"},
    {"num_kv_heads": 4, "rope_ref_len": 8, "num_layers": 2},
]
NAMES = ["plain", "parts", "untied", "no-skips", "stretched"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 17_059_912),
        ({"mlp_hidden": 1536}, 21_778_504),
        ({"mlp_hidden": 1488}, 21_336_136),
        ({"mlp_hidden": 1536, "parts": {"bigram_hash": {}, "smear_gate": {}}}, 22_368_841),
        ({"tie_embeddings": False}, 17_059_912 + 1024 * 512),
    ],
)
def test_parameter_counts(changes: dict[str, Any], expected: int) -> None:
    with torch.device("meta"):
        model = GPT(ModelSection(**changes), 1024)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_state_names_are_the_references() -> None:
    names = set(small_gpt(parts=PARTS, tie_embeddings=False).state_dict())
    block = ("attn_scale", "mlp_scale", "resid_mix", "attn.q_gain", "mlp.fc.weight", "mlp.proj.weight")
    block += tuple(f"attn.{m}.weight" for m in ("c_q", "c_k", "c_v", "proj"))
    expected = {f"blocks.{i}.{name}" for i in range(3) for name in block}
    expected |= {"tok_emb.weight", "lm_head.weight", "skip_weights"}
    expected |= {"bigram.embed.weight", "bigram.proj.weight", "bigram.scale", "smear.gate"}
    assert names == expected


@pytest.mark.parametrize("changes", VARIANTS, ids=NAMES)
def test_a_later_token_changes_no_earlier_logit(changes: dict[str, Any]) -> None:
    model = small_gpt(**changes).eval()
    x = tokens(2, 23)
    before = model.logits(x)
    for position in (0, 7, 22):
        changed = x.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCAB
        after = model.logits(changed)
        assert torch.equal(before[:, :position], after[:, :position])
        assert not torch.allclose(before[:, position], after[:, position], atol=1e-4)


@pytest.mark.parametrize("changes", VARIANTS, ids=NAMES)
def test_decoding_with_a_cache_equals_the_full_forward(changes: dict[str, Any]) -> None:
    model = small_gpt(**changes).eval()
    x = tokens(3, 20)
    full = model.logits(x)
    cache = KVCache(max_len=20)
    for pieces in ((20,), (5, 1, 1, 8, 5), (1,) * 20):
        cache.reset()
        parts = [model.logits(piece, cache) for piece in x.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=2e-5)
        assert not parts[0].requires_grad
    with pytest.raises(GolfError, match="reset"):
        model.logits(x[:, :1], cache)


def test_last_only_gives_the_last_row() -> None:
    model = small_gpt().eval()
    x = tokens(2, 9)
    torch.testing.assert_close(model.logits(x, last_only=True), model.logits(x)[:, -1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", VARIANTS, ids=NAMES)
def test_fused_loss_and_gradients_equal_the_plain_graph(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 13 * VOCAB)  # several uneven pieces
    model = small_gpt(**changes)
    x, y = tokens(3, 15), tokens(3, 15, seed=1)
    y[0, :6] = -1
    y[2, 14] = -1
    logits = model(x)
    plain = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)
    expected = torch.autograd.grad(plain, list(model.parameters()))
    loss = model(x, y)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-6)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(model(x, y), plain, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model(x, y, "sum"), plain * 38, rtol=1e-6, atol=1e-5)


def test_ignored_targets_have_no_loss_and_no_gradient() -> None:
    model = small_gpt()
    x, y = tokens(2, 11), tokens(2, 11, seed=1)
    y[1] = -1
    nll = model(x, y, "none")
    assert nll.shape == y.shape and nll.dtype == torch.float32
    assert not nll[1].any() and (nll[0] > 0).all()
    torch.testing.assert_close(model(x, y), nll[0].mean())
    nothing = model(x, torch.full_like(y, -1))
    nothing.backward()
    assert nothing.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("count", [0, 1, 7, 64, 97, 1000])
@pytest.mark.parametrize("vocab", [3, 50, 10**7])
def test_chunks_cover_every_position_once(count: int, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 640)
    seen = [i for piece in chunks(count, vocab, torch.device("cpu")) for i in range(count)[piece]]
    assert seen == list(range(count))


def test_initial_loss_is_that_of_a_uniform_guess() -> None:
    model = GPT(section(), VOCAB)
    model.init_weights(3)
    loss = model(tokens(2, 16), tokens(2, 16, seed=1)).item()
    assert abs(loss - torch.log(torch.tensor(float(VOCAB))).item()) < 0.05


def test_bfloat16_stays_close_to_float32() -> None:
    model = small_gpt(parts=PARTS)
    x, y = tokens(4, 32), tokens(4, 32, seed=1)
    exact = model(x, y)
    model.compute_dtype = torch.bfloat16
    rough = model(x, y)
    rough.backward()
    assert rough.dtype == torch.float32 and abs(rough.item() - exact.item()) < 0.05
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_fake_quantisation_acts_in_training_only() -> None:
    model = small_gpt(parts=PARTS, tie_embeddings=False)
    x, y = tokens(2, 12), tokens(2, 12, seed=1)
    plain = model(x, y).item()
    grid = Grid(GridSection(bits=4))
    model.set_qat(grid)
    trained = model(x, y)
    trained.backward()
    assert abs(trained.item() - plain) > 1e-3
    assert model.eval()(x, y).item() == pytest.approx(plain, abs=1e-6)
    # The training forward is the evaluation of the weights as they would be decoded.
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim == 2 and "mix" not in name and "emb" not in name and "skip" not in name:
                param.copy_(grid.dequantize(*grid.quantize(param)))
    assert model(x, y).item() == pytest.approx(trained.item(), abs=1e-5)
    model.train().set_qat(None)
    assert all(getattr(m, "grid", None) is None for m in model.modules())


def test_a_grid_for_each_weight() -> None:
    model = small_gpt()
    coarse = Grid(GridSection(bits=3))
    model.set_qat({"blocks.1.mlp.fc.weight": coarse})
    with_grid = [name for name, m in model.named_modules() if getattr(m, "grid", None) is not None]
    assert with_grid == ["blocks.1.mlp.fc"]


def test_context_len_keeps_the_base_of_long_windows() -> None:
    model = small_gpt(rope_ref_len=8).eval()
    x = tokens(1, 24)
    with torch.no_grad():
        long = model.logits(x)
        short = model.logits(x[:, :10])
        model.context_len = 24
        as_long = model.logits(x[:, :10])
    torch.testing.assert_close(as_long, long[:, :10], rtol=0, atol=1e-5)
    assert not torch.allclose(short, as_long, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 25}, "model.num_heads"),
        ({"num_kv_heads": 3}, "model.num_kv_heads"),
        ({"dim": 20, "num_heads": 4}, "even"),
        ({"activation": "relu3"}, "relu2"),
        ({"parts": {"smear": {}}}, "smear_gate"),
        ({"parts": {"bigram_hash": {"bucket": 5}}}, "buckets"),
        ({"parts": {"bigram_hash": {"buckets": 1}}}, "greater than or equal to 2"),
        ({"parts": {"smear_gate": {"init": "x"}}}, "model.parts.smear_gate.init"),
    ],
)
def test_sizes_and_names_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GolfError, match=message):
        GPT(section(**changes), VOCAB)
