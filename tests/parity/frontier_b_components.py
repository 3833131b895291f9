"""The parts of the later records one by one: rotation, XSA, attention, smear and skip gates, embeddings, lanes.

Variable-length attention is our attention on each segment with the rotary tables of its place in the packed row.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paramgolf.model.attention import Attention
from paramgolf.model.gpt import GPT
from paramgolf.model.mlp import MLP, leaky_relu2
from paramgolf.model.parts.base import Flow
from paramgolf.model.parts.bigram_hash import BigramHash, BigramHashConfig
from paramgolf.model.rope import apply_rope, rope_tables, stretched_base
from paramgolf.recipe.sections import ModelSection
from tests.parity.harness import Check, exact, worst

VALUE, GRADIENT, ROPE = 1e-5, 1e-4, 2e-4
ROPE_REFERENCE = {"pr374": 1024, "pr1394": 2048, "pr1855": 0, "pr1855_yarn_flag": 2048}


def tensor(z: Any, name: str) -> Tensor:
    return torch.from_numpy(z[name].copy())


def leaf(z: Any, name: str) -> Tensor:
    return tensor(z, name).requires_grad_()


def ids(z: Any, name: str) -> Tensor:
    return torch.from_numpy(z[name].astype(np.int64))


def gradient(name: str, value: Tensor | None, reference: np.ndarray) -> Check:
    assert value is not None
    return worst(name, value.detach().reshape(reference.shape), reference, GRADIENT, relative=True)


def output(name: str, value: Tensor, reference: np.ndarray) -> Check:
    return worst(name, value.detach(), reference, VALUE)


def fill(module: torch.nn.Module, z: Any, names: dict[str, str]) -> None:
    """Copy stored arrays into parameters: parameter name -> array name."""
    with torch.no_grad():
        for ours, theirs in names.items():
            param = module.get_parameter(ours)
            param.copy_(tensor(z, theirs).reshape(param.shape))


def shape_of(z: Any) -> dict[str, Any]:
    return json.loads(str(z["config_json"]))


def model_of(z: Any, vocab: int = 8, **changes: Any) -> GPT:
    """A model with the fixture's attention shape."""
    config = shape_of(z)
    sizes: dict[str, Any] = {
        "dim": config["H"] * config["head_dim"],
        "num_heads": config["H"],
        "num_kv_heads": config["K"],
        "mlp_hidden": config["hidden"],
        "num_layers": 1,
        "rope_dims": config["rope_dims"],
        "rope_base": config["rope_base"],
        "activation": "leaky_relu2",
    }
    model = GPT(ModelSection(**(sizes | changes)), vocab)
    model.use_attention("auto", "cpu")
    return model


def segments(z: Any, layout: str, length: int) -> list[tuple[int, int]]:
    if layout == "dense":
        return [(0, length)]
    return [(a, b) for a, b in pairwise(z["attn/cu_seqlens"].tolist()) if b > a]


# -- rotation, XSA, feed-forward -----------------------------------------------------------------------------------


def check_rope(z: Any) -> list[Check]:
    checks = []
    for key in (k for k in z.files if k.startswith("rope/") and k.endswith("/rows")):
        variant, length = key.split("/")[1], int(key.split("/")[2].removeprefix("T"))
        system, _, rotated, *flag = variant.split("_", 3)
        reference = ROPE_REFERENCE["_".join([system, *flag])]
        dims = int(rotated.removeprefix("rd"))
        base = stretched_base(shape_of(z)["rope_base"], length, reference, dims)
        for name, table in zip(("cos", "sin"), rope_tables(length, dims, base), strict=True):
            stored = key.removesuffix("rows") + name
            checks.append(worst(stored, table[ids(z, key)], z[stored], ROPE))
    for key in (k for k in z.files if k.startswith("rope_apply/") and k.endswith("/x")):
        x = tensor(z, key)
        dims = int(key.split("/")[1].removeprefix("rd")) or x.shape[-1]
        out = apply_rope(x, *rope_tables(x.shape[1], dims, shape_of(z)["rope_base"]))
        checks.append(output(key, out, z[key.removesuffix("x") + "out"]))
    return checks


def check_xsa(z: Any) -> list[Check]:
    y, v = leaf(z, "xsa/y"), leaf(z, "xsa/v")
    layer: Any = model_of(z, parts={"xsa": {}}).layers[0].attn.get_submodule("xsa")
    out = layer.output(y, v, y, y.flatten(2), {})
    out.backward(tensor(z, "xsa/upstream"))
    return [
        output("xsa", out, z["xsa/out"]),
        gradient("xsa grad y", y.grad, z["xsa/grad_y"]),
        gradient("xsa grad v", v.grad, z["xsa/grad_v"]),
    ]


def check_mlp(z: Any) -> list[Check]:
    u = leaf(z, "leaky_sq/u")
    value = leaky_relu2(u)
    value.sum().backward()
    hidden, dim = z["mlp/up"].shape
    mlp, x = MLP(dim, hidden, leaky_relu2), leaf(z, "mlp/x")
    fill(mlp, z, {"fc.weight": "mlp/up", "proj.weight": "mlp/down"})
    out = mlp(x)
    out.backward(tensor(z, "mlp/upstream"))
    return [
        output("leaky_sq", value, z["leaky_sq/value"]),
        gradient("leaky_sq derivative", u.grad, z["leaky_sq/derivative"]),
        output("mlp", out, z["mlp/out"]),
        gradient("mlp grad x", x.grad, z["mlp/grad_x"]),
        gradient("mlp grad up", mlp.fc.weight.grad, z["mlp/grad_up"]),
        gradient("mlp grad down", mlp.proj.weight.grad, z["mlp/grad_down"]),
    ]


# -- attention and its gates -----------------------------------------------------------------------------------------


def gate_parts(z: Any, kind: str) -> dict[str, dict[str, Any]]:
    """The recipe's parts for one stored kind of attention."""
    window = shape_of(z)["gate_window"]
    gates: dict[str, dict[str, Any]] = {
        "out_gate_proj": {"factor": 2.0, "window": window},
        "out_gate_q": {"factor": 2.0, "window": window, "source": "query"},
        "gated": {"factor": 1.0, "window": 0},
        "sparse": {"factor": 1.0, "window": window, "scale": shape_of(z)["sparse_gate_scale"]},
    }
    parts: dict[str, dict[str, Any]] = {} if kind == "plain" else {"xsa": {}}
    return parts | ({"attn_gate": gates[kind]} if kind in gates else {})


ATTENTION_WEIGHTS = {
    "c_q.weight": "attn/q_w",
    "c_k.weight": "attn/k_w",
    "c_v.weight": "attn/v_w",
    "proj.weight": "attn/out_w",
    "q_gain": "attn/q_gain",
}


def run_attention(attn: Attention, x: Tensor, cuts: list[tuple[int, int]], rope: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat([attn(x[:, a:b], (rope[0][a:b], rope[1][a:b]), {}) for a, b in cuts], dim=1)


def check_attention(kind: str, layout: str, z: Any) -> list[Check]:
    at, model = f"attn/{kind}/{layout}", model_of(z, parts=gate_parts(z, kind))
    attn, x = model.layers[0].attn, leaf(z, "attn/x")
    gate = f"attn/{kind}/gate_w"
    fill(attn, z, ATTENTION_WEIGHTS | ({"attn_gate.weight": gate} if gate in z.files else {}))
    attend, seen = attn.attend, []
    assert attend is not None

    def spy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = attend(q, k, v)
        seen.append((q, k, v, y))
        return y

    attn.attend = spy
    length = x.shape[1]
    rope = rope_tables(length, model.rope_dims, model.section.rope_base)
    out = run_attention(attn, x, segments(z, layout, length), rope)
    out.backward(tensor(z, "attn/upstream"))
    checks = [
        output(at, out, z[f"{at}/out"]),
        gradient(f"{at} grad x", x.grad, z[f"{at}/grad_x"]),
        gradient(f"{at} grad v", attn.c_v.weight.grad, z[f"{at}/grad_v_w"]),
        gradient(f"{at} grad q_gain", attn.q_gain.grad, z[f"{at}/grad_q_gain"]),
    ]
    if gate in z.files:
        checks.append(gradient(f"{at} grad gate", attn.get_parameter("attn_gate.weight").grad, z[f"{at}/grad_gate_w"]))
    if kind == "plain":
        inner = [torch.cat(pieces, dim=1) for pieces in zip(*seen, strict=True)]
        names = ("q_after_rope_gain", "k_after_rope", "v", "attn_y")
        checks += [output(f"{at} {n}", t, z[f"{at}/{n}"]) for n, t in zip(names, inner, strict=True)]
    return checks


# -- embeddings ------------------------------------------------------------------------------------------------------


def check_smear_v1(z: Any) -> list[Check]:
    x = leaf(z, "smear_v1/x")
    part: Any = model_of(z, parts={"smear_gate": {}}).get_submodule("smear")
    fill(part, z, {"gate": "smear_v1/gate"})
    out = part.on_stream(x, Flow(torch.zeros(x.shape[:2], dtype=torch.int64)))
    out.backward(tensor(z, "smear_v1/upstream"))
    return [
        output("smear_v1", out, z["smear_v1/out"]),
        gradient("smear_v1 grad x", x.grad, z["smear_v1/grad_x"]),
        gradient("smear_v1 grad gate", part.gate.grad, z["smear_v1/grad_gate"]),
    ]


def check_smear_v2(z: Any) -> list[Check]:
    checks = []
    vocab, window = len(z["smear_v2/tok_emb"]), z["smear_v2/gate_w"].size
    for variant, bos in (("bos_mask", 1), ("no_mask", -1)):
        model = model_of(z, vocab, parts={"smear_gate2": {"window": window, "bos_id": bos}})
        names = {"tok_emb.weight": "tok_emb", "smear2.gate": "gate_w", "smear2.strength": "lambda"}
        fill(model, z, {ours: f"smear_v2/{theirs}" for ours, theirs in names.items()})
        x0 = model.embed(Flow(ids(z, "smear_v2/tokens")))
        checks.append(output(f"smear_v2 {variant}", x0, z[f"smear_v2/{variant}/x0_after_rms"]))
    return checks


def check_bigram(z: Any) -> list[Check]:
    checks = []
    for key in (k for k in z.files if k.startswith("bigram/") and k.endswith("tokens") and "module" not in k):
        part = BigramHash(BigramHashConfig(buckets=int(key.split("/")[1]), dim=1), ModelSection(dim=8), 8)
        now = ids(z, key)
        rows = part.bucket(now, Flow(now).previous("bigram", now, -1))
        checks.append(exact(key, rows, z[key.removesuffix("tokens") + "ids"]))
    buckets, width = z["bigram/module/embed"].shape
    model = model_of(z, parts={"bigram_hash": {"buckets": buckets, "dim": width}})
    module: Any = model.get_submodule("bigram")
    names = {"embed.weight": "embed", "proj.weight": "proj", "scale": "scale"}
    fill(module, z, {ours: f"bigram/module/{theirs}" for ours, theirs in names.items()})
    now = ids(z, "bigram/module/tokens")
    out = module.on_embedding(torch.zeros(*now.shape, model.section.dim), Flow(now))
    return [*checks, output("bigram module", out, z["bigram/module/out"])]


def check_value_embed(z: Any) -> list[Check]:
    vocab, width = z["value_embed/embed"].shape
    parts = {"value_embed": {"dim": width, "layers": [0]}, "xsa": {}}
    model = model_of(z, vocab, parts=parts)
    attn, x = model.layers[0].attn, tensor(z, "attn/x")
    part: Any = model.get_submodule("value_embed")
    names = {"embed.weight": "embed", "proj.weight": "proj", "scale": "scale"}
    fill(part, z, {ours: f"value_embed/{theirs}" for ours, theirs in names.items()})
    fill(attn, z, ATTENTION_WEIGHTS | {"value_embed.scale": "value_embed/layer_scale"})
    flow = Flow(ids(z, "value_embed/tokens"))
    part.on_embedding(x, flow)
    rope = rope_tables(x.shape[1], model.rope_dims, model.section.rope_base)
    return [
        output("value_embed", flow.extras["value_embed"], z["value_embed/out"]),
        output("value_embed attention", attn(x, rope, flow.extras), z["value_embed/attn_out"]),
    ]


def check_skips(z: Any) -> list[Check]:
    count, dim = z["skip/weights"].shape
    model = model_of(z, num_layers=2 * count, skip_gates=True)
    assert model.section.dim == dim
    fill(model, z, {"skip_weights": "skip/weights", "skip_gates": "skip/gates"})
    checks = []
    for join in range(count):
        x, skip = tensor(z, f"skip/{join}/x_before"), tensor(z, f"skip/{join}/skip")
        checks.append(output(f"skip {join}", model.join_skip(x, skip, join), z[f"skip/{join}/x_after"]))
    return checks


def check_lanes(z: Any) -> list[Check]:
    bank = {key.removeprefix("two_lane/w/"): tensor(z, key) for key in z.files if key.startswith("two_lane/w/")}
    layers, index = len(bank["parallel_resid_lambdas"]), 1
    hidden = bank["mlp_up_bank"].shape[1]
    parts = gate_parts(z, "sparse")
    model = model_of(z, num_layers=layers, mlp_hidden=hidden, ln_scale=True, lanes_from=index, parts=parts)
    block, lanes = model.layers[index], model.lanes
    assert lanes is not None
    own = {name.removeprefix(f"blocks.{index}."): t for name, t in bank.items() if name.startswith(f"blocks.{index}.")}
    own["attn.attn_gate.weight"] = own.pop("attn.attn_gate_w")
    qo, kv = bank["qo_bank"], bank["kv_bank"]
    own |= {"attn.c_q.weight": qo[index], "attn.proj.weight": qo[layers + index]}
    own |= {"attn.c_k.weight": kv[index], "attn.c_v.weight": kv[layers + index]}
    own |= {"mlp.fc.weight": bank["mlp_up_bank"][index], "mlp.proj.weight": bank["mlp_down_bank"][index]}
    block.load_state_dict(own)
    weights = {"resid": bank["parallel_resid_lambdas"], "post": bank["parallel_post_lambdas"].flatten(1)}
    lanes.load_state_dict(weights)
    lane0, lane1, x0 = (leaf(z, f"two_lane/{name}") for name in ("lane0", "lane1", "x0"))
    rope = rope_tables(x0.shape[1], model.rope_dims, model.section.rope_base)
    pieces = [
        block.lanes(
            lane0[:, a:b],
            lane1[:, a:b],
            x0[:, a:b],
            (rope[0][a:b], rope[1][a:b]),
            {},
            lanes.resid[index],
            lanes.post[index],
        )
        for a, b in segments(z, "packed", x0.shape[1])
    ]
    outs = [torch.cat(lane, dim=1) for lane in zip(*pieces, strict=True)]
    torch.autograd.backward(outs, [tensor(z, f"two_lane/up{i}") for i in range(2)])
    checks = [output(f"two_lane out{i}", out, z[f"two_lane/out{i}"]) for i, out in enumerate(outs)]
    grads = [t.grad for t in (lane0, lane1, x0, lanes.post, lanes.resid)]
    names = ("lane0", "lane1", "x0", "post", "resid")
    return checks + [gradient(n, g, z[f"two_lane/grad_{n}"]) for n, g in zip(names, grads, strict=True)]


# -- the whole file --------------------------------------------------------------------------------------------------


def check(path: Path, z: Any) -> list[Check]:
    checks = check_rope(z) + check_xsa(z) + check_mlp(z)
    for key in (k for k in z.files if k.startswith("attn/") and k.endswith("/out")):
        _, kind, layout, _ = key.split("/")
        checks += check_attention(kind, layout, z)
    checks += check_skips(z) + check_lanes(z)
    return checks + check_smear_v1(z) + check_smear_v2(z) + check_bigram(z) + check_value_embed(z)
