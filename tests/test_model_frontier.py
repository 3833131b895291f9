"""Components of the later records: each alone and several together: neutral start, causality, cache, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from paramgolf.errors import GolfError
from paramgolf.model.cache import KVCache
from paramgolf.model.gpt import GPT
from paramgolf.model.order import Order, order_of
from paramgolf.model.parts.base import Flow
from paramgolf.optim.groups import group_of
from paramgolf.train.compiling import compiled_graphs
from tests.model_common import VOCAB, section, small_gpt, tokens

SPARSE = {"factor": 1.0, "window": 5, "scale": 0.5}
COMPONENTS: dict[str, dict[str, Any]] = {
    "xsa": {"parts": {"xsa": {}}},
    "xsa-last": {"parts": {"xsa": {"last_layers": 1}}},
    "out-gate": {"parts": {"attn_gate": {}}},
    "out-gate-query": {"parts": {"attn_gate": {"source": "query"}}},
    "gated": {"parts": {"attn_gate": {"factor": 1.0, "window": 0}}},
    "sparse": {"parts": {"attn_gate": SPARSE}},
    "smear2": {"parts": {"smear_gate2": {"window": 5}}},
    "value-embed": {"parts": {"value_embed": {"dim": 5}}},
    "rope-dims": {"rope_dims": 2},
    "ln-scale": {"ln_scale": True},
    "skip-gates": {"skip_gates": True},
    "lanes": {"lanes_from": 1},
    "lanes-in-the-loop": {"num_layers": 5, "lanes_from": 1, "loop_layers": (1, 2), "loop_extra": 1},
    "lanes-mlp": {"lanes_from": 1, "lane_merge": "mlp"},
    "loop": {"loop_layers": (1, 1), "loop_extra": 2},
    "loop-no-skips": {"loop_layers": (0, 2), "loop_extra": 1, "skips": "none"},
    "parallel": {"parallel_from": 1},
    "factored": {"embed_dim": 10},
    "documents": {"document_mask": True},
    "lanes-no-skips": {"lanes_from": 0, "skips": "none", "lane_merge": "attn"},
}
COMPONENTS["all"] = {
    "parts": {
        "bigram_hash": {"buckets": 31, "dim": 4},
        "smear_gate2": {"window": 6},
        "value_embed": {"dim": 5, "layers": [0, -1]},
        "xsa": {},
        "attn_gate": SPARSE,
    },
    "rope_dims": 4,
    "ln_scale": True,
    "skip_gates": True,
    "lanes_from": 1,
}
COMPONENTS["everything"] = COMPONENTS["all"] | {
    "num_layers": 4,
    "loop_layers": (1, 2),
    "loop_extra": 2,
    "lanes_from": 3,
    "document_mask": True,
    "embed_dim": 14,
}
COMPONENTS["everything-parallel"] = COMPONENTS["everything"] | {"lanes_from": -1, "parallel_from": 2}
CASES = pytest.mark.parametrize("changes", COMPONENTS.values(), ids=COMPONENTS)


@CASES
def test_causal_and_equal_with_a_cache(changes: dict[str, Any]) -> None:
    model = small_gpt(**changes).eval()
    x = tokens(2, 14)
    x[:, 6] = 1  # a document begins
    full = model.logits(x)
    cache = KVCache(14)
    pieces = [model.logits(piece, cache) for piece in x.split((5, 1, 1, 7), dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=0, atol=3e-5)
    changed = x.clone()
    changed[:, 8] = (changed[:, 8] + 1) % VOCAB
    assert torch.equal(model.logits(changed)[:, :8], full[:, :8])
    assert not torch.equal(model.logits(changed)[:, 9:], full[:, 9:])


@CASES
def test_it_does_something_and_every_parameter_learns(changes: dict[str, Any]) -> None:
    model, plain = small_gpt(**changes), small_gpt()
    own = plain.state_dict()
    shared = {k: v for k, v in model.state_dict().items() if k in own and v.shape == own[k].shape}
    plain.load_state_dict(shared, strict=False)
    x, y = tokens(2, 12), tokens(2, 12, seed=1)
    x[:, 7] = 1
    assert not torch.allclose(model(x, y), plain(x, y), atol=1e-6)
    model(x, y).backward()
    for name, param in model.named_parameters():
        assert param.grad is not None and param.grad.abs().max() > 0, name


@pytest.mark.parametrize("name", ["out-gate", "out-gate-query", "smear2", "value-embed"])
def test_no_change_at_the_start(name: str) -> None:
    model, plain = GPT(section(**COMPONENTS[name]), VOCAB), small_gpt()
    model.init_weights(0)
    model.load_state_dict(plain.state_dict(), strict=False)
    x = tokens(2, 12)
    torch.testing.assert_close(model.logits(x), plain.logits(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["all", "everything", "everything-parallel"])
def test_layers_compile_without_a_break(name: str) -> None:
    model = small_gpt(**COMPONENTS[name])
    x, y = tokens(2, 12), tokens(2, 12, seed=1)
    plain = model(x, y)
    model.compile_regions(backend="eager")
    torch.testing.assert_close(model(x, y), plain)


def test_the_loop_switch_compiles_nothing() -> None:
    model = small_gpt(**COMPONENTS["everything"])
    x, y = tokens(2, 12), tokens(2, 12, seed=1)
    model.compile_regions(backend="aot_eager")
    losses = []
    for extra in (2, 0, 1, 2, 0):
        model.set_loops(extra)
        loss = model(x, y)
        loss.backward()
        losses.append(loss.item())
        if extra == 0 and len(losses) == 2:
            built = compiled_graphs()
    assert compiled_graphs() == built
    assert losses[0] == losses[3] and losses[1] == losses[4] and len(set(losses)) == 3


def test_xsa_takes_the_own_value_away() -> None:
    model = small_gpt(parts={"xsa": {"last_layers": 2}})
    y, v, q = torch.randn(2, 5, 4, 6), torch.randn(2, 5, 2, 6), torch.randn(2, 5, 4, 6)
    v[0, 3] = 0
    attn = model.layers[1].attn
    layer: Any = attn.get_submodule("xsa")
    out = layer.output(y, v, q, q.flatten(2), {})
    shared = v.repeat_interleave(2, dim=2)
    assert (out * shared).sum(-1).abs().max() < 1e-5
    assert torch.equal(out[0, 3], y[0, 3])
    assert model.layers[0].attn.layer_parts == () and attn.layer_parts == ("xsa",)


def test_smear_gate2_stops_where_a_document_begins() -> None:
    model = small_gpt(parts={"smear_gate2": {"window": 5}})
    part: Any = model.get_submodule("smear2")
    x = tokens(1, 9)
    x[0, 4] = 1
    raw = model.tok_emb.weight[x]
    before = F.pad(raw, (0, 0, 1, 0))[:, :-1]
    share = part.strength * torch.sigmoid(raw[..., :5] @ part.gate)
    share[0, 4] = 0
    expected = F.rms_norm(raw + share[..., None] * before, (24,), eps=model.section.norm_eps)
    torch.testing.assert_close(model.embed(Flow(x)), expected)


def test_two_lanes_begin_behind_the_layers_that_feed_skips() -> None:
    assert [order_of(section(num_layers=6), 0).lanes_at(first) for first in range(6)] == [3, 3, 3, 3, 4, 5]
    looped = section(num_layers=6, loop_layers=(0, 1), loop_extra=1, lanes_from=2)
    assert order_of(looped, 1) == Order((0, 1, 0, 1, 2, 3, 4, 5), 4)
    assert [order_of(looped, extra).lanes_at(2) for extra in (0, 1)] == [3, 4]
    assert order_of(section(skips="none"), 0).lanes_at(0) == 0


def test_looped_layers_run_again_in_order() -> None:
    base = {"num_layers": 6, "loop_layers": (2, 3), "loop_extra": 2}
    assert order_of(section(**base), 2) == Order((0, 1, 2, 3, 2, 3, 2, 3, 4, 5), 5)
    assert order_of(section(**base), 0) == Order((0, 1, 2, 3, 4, 5), 3)
    record = section(num_layers=11, loop_layers=(3, 5), loop_extra=2)
    order = order_of(record, 2)
    assert order.layers[: order.encoder] == (0, 1, 2, 3, 4, 5, 3, 4)
    assert order.layers[order.encoder :] == (5, 3, 4, 5, 6, 7, 8, 9, 10)
    assert order.skips == 8
    model = small_gpt(**base)
    assert model.skip_weights is not None and len(model.skip_weights) == 5
    x = tokens(2, 9)
    looped = model.logits(x)
    model.set_loops(0)
    plain = small_gpt(num_layers=6)
    state = model.state_dict()
    state["skip_weights"] = state["skip_weights"][:3]  # the first rows are used
    plain.load_state_dict(state)
    torch.testing.assert_close(model.logits(x), plain.logits(x))
    model.set_loops(9)
    assert torch.equal(model.logits(x), looped), "never more often than the recipe says"


def test_parallel_branches_read_the_same_input() -> None:
    model = small_gpt(num_layers=1, parallel_from=0)
    block, x = model.layers[0], torch.randn(1, 4, 24)
    model.use_attention("math")
    rope = model._rope_for(0, torch.zeros(1, 4, dtype=torch.int64), None)
    mixed = block.resid_mix[0] * x + block.resid_mix[1] * x
    n = block.normed(mixed)
    expected = mixed + block.attn_scale * block.attn(n, rope, {}) + block.mlp_scale * block.mlp(n)
    torch.testing.assert_close(block(x, x, rope, {}), expected)


def test_a_factored_embedding_is_mapped_up_and_down() -> None:
    model = small_gpt(embed_dim=10)
    assert model.embed_proj is not None and model.head_proj is not None
    assert model.tok_emb.weight.shape == (VOCAB, 10) and model.head_weight().shape == (VOCAB, 10)
    assert model.hidden(tokens(1, 5)).shape == (1, 5, 10)
    groups = {name: group_of(name, param) for name, param in model.named_parameters()}
    assert groups["embed_proj.weight"] == groups["head_proj.weight"] == "matrix"
    untied = small_gpt(embed_dim=10, tie_embeddings=False)
    assert untied.head_weight().shape == (VOCAB, 10)


def test_orthogonal_zero_starts_output_maps_at_zero() -> None:
    model = GPT(section(dim=64, num_heads=4, mlp_hidden=128, init="orthogonal_zero"), VOCAB)
    model.init_weights(3)
    block = model.layers[0]
    q, up = block.attn.c_q.weight, block.mlp.fc.weight
    torch.testing.assert_close(q @ q.t(), torch.eye(64), atol=1e-5, rtol=0)
    torch.testing.assert_close(up.t() @ up, torch.eye(64), atol=1e-5, rtol=0)
    assert not block.attn.proj.weight.any() and not block.mlp.proj.weight.any()


def test_channels_beyond_rope_dims_know_no_position() -> None:
    model = small_gpt(num_layers=1, rope_dims=2)
    attn = model.layers[0].attn
    seen = []
    model.use_attention("math")
    attend = attn.attend
    assert attend is not None

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.append(k)
        return attend(q, k, v)

    attn.attend = spy
    model.logits(torch.full((1, 8), 5))
    k = seen[0][0]
    torch.testing.assert_close(k[:, :, 2:], k[:1, :, 2:].expand_as(k[:, :, 2:]))
    assert (k[1:, :, :2] - k[:1, :, :2]).abs().max() > 1e-3


def test_ln_scale_divides_by_the_root_of_the_depth() -> None:
    model = small_gpt(ln_scale=True)
    x = torch.randn(1, 3, 24)
    for index, block in enumerate(model.layers):
        torch.testing.assert_close(block.normed(x) * (index + 1) ** 0.5, F.rms_norm(x, (24,), eps=1.1920929e-07))
        assert block.normed(x.bfloat16()).dtype == torch.bfloat16
    assert not any("depth_scale" in name for name in model.state_dict())


def test_gates_are_optimised_as_control_tensors() -> None:
    model = small_gpt(**COMPONENTS["all"])
    groups = {name: group_of(name, param) for name, param in model.named_parameters()}
    assert groups["blocks.0.attn.attn_gate.weight"] == "scalar" and groups["smear2.gate"] == "scalar"
    assert groups["value_embed.embed.weight"] == "embed" and groups["value_embed.proj.weight"] == "matrix"
    assert groups["lanes.post"] == groups["lanes.resid"] == "scalar"
    assert groups["blocks.0.attn.value_embed.scale"] == groups["skip_gates"] == "scalar"


def test_skip_gates_share_between_stream_and_skip() -> None:
    model = small_gpt(skip_gates=True)
    assert model.skip_gates is not None and model.skip_weights is not None
    x, skip = torch.randn(1, 3, 24), torch.randn(1, 3, 24)
    with torch.no_grad():
        model.skip_gates.fill_(20.0)
        torch.testing.assert_close(model.join_skip(x, skip, 0), x)
        model.skip_gates.fill_(0.0)
        torch.testing.assert_close(model.join_skip(x, skip, 0), 0.5 * x + 0.5 * model.skip_weights[0] * skip)


def test_lanes_that_share_everything_are_parallel_branches() -> None:
    model = small_gpt(num_layers=1, lanes_from=0)
    block, lanes = model.layers[0], model.lanes
    assert lanes is not None
    with torch.no_grad():
        lanes.resid.fill_(1.0)
        lanes.post.fill_(1.0)
        block.resid_mix.copy_(torch.tensor([[1.0], [0.0]]).expand(2, 24))
    model.use_attention("math")
    x = torch.randn(1, 4, 24)
    rope = model._rope_for(0, torch.zeros(1, 4, dtype=torch.int64), None)
    a, b = block.lanes(x, x, x, rope, {}, lanes.resid[0], lanes.post[0])
    n = block.normed(x)
    expected = x + block.attn_scale * block.attn(n, rope, {}) + block.mlp_scale * block.mlp(n)
    torch.testing.assert_close(a, expected)
    torch.testing.assert_close(b, expected)
    torch.testing.assert_close(lanes.merge(a, b), expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parts": {"xsa": {"last_layers": 4}}}, "last_layers=4"),
        ({"parts": {"attn_gate": {"window": 25}}}, "window=25"),
        ({"parts": {"smear_gate2": {"window": 25}}}, "window=25"),
        ({"parts": {"smear_gate": {}, "smear_gate2": {}}}, "exclude each other"),
        ({"parts": {"value_embed": {"layers": [3]}}}, "names layer 3"),
        ({"parts": {"value_embed": {"layers": []}}}, "names no layer"),
        ({"skip_gates": True, "skips": "none"}, "skip_gates=true"),
        ({"skip_gates": True, "num_layers": 1}, "skip_gates=true"),
        ({"lanes_from": 3}, "lanes_from=3"),
        ({"rope_dims": 3}, "rope_dims=3"),
        ({"loop_layers": (1, 3), "loop_extra": 1}, r"loop_layers=\[1, 3\]"),
        ({"loop_layers": (2, 1), "loop_extra": 1}, r"loop_layers=\[2, 1\]"),
        ({"loop_layers": (1,), "loop_extra": 1}, r"loop_layers=\[1\]"),
        ({"loop_layers": (1, 1)}, "need each other"),
        ({"loop_extra": 1}, "need each other"),
        ({"loop_layers": (0, 1), "loop_extra": 2, "lanes_from": 1}, "lanes_from=1: in the loop .*one stream"),
        ({"parallel_from": 3}, "parallel_from=3"),
        ({"parallel_from": 1, "lanes_from": 1}, "two kinds of one thing"),
        ({"rope_dims": 8}, "rope_dims=8"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(GolfError, match=words):
        GPT(section(**changes), VOCAB)
