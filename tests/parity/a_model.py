"""The whole model: losses, logits, gradients, rotary tables, bigram ids; float32, and bfloat16 as a size check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paramgolf.model.gpt import GPT
from paramgolf.model.parts.bigram_hash import BigramHash
from paramgolf.model.rope import rope_tables, stretched_base
from tests.parity.harness import Check, exact, worst
from tests.parity.systems import load_model

LOGITS, LOSS, GRADIENT, ROPE = 2e-4, 1e-5, 1e-4, 2e-4
BF16_MEAN, BF16_MAX, BF16_LOSS = 0.05, 0.5, 0.015


def ids(z: Any, name: str) -> Tensor:
    return torch.from_numpy(z[name].astype(np.int64))


def check(path: Path, z: Any) -> list[Check]:
    checks: list[Check] = []
    for head in ("tied", "untied"):
        if f"{head}/eval/nll" not in z.files:
            continue
        model = load_model(z, tied=head == "tied")
        for mode in ("eval", "train"):
            if f"{head}/{mode}/nll" in z.files:
                checks += check_pass(model.train(mode == "train"), z, f"{head}/{mode}")
    model = load_model(z).eval()
    with torch.no_grad():
        if "long/nll" in z.files:
            checks.append(worst("long nll", model(ids(z, "long/x"), ids(z, "long/y"), "none"), z["long/nll"], LOGITS))
        checks += check_bf16(model, z)
    return checks + check_rope(model, z) + check_bigram(model, z)


def check_pass(model: GPT, z: Any, prefix: str) -> list[Check]:
    """Loss, nll, logits and gradients of one head and mode."""
    x, y = ids(z, "x"), ids(z, "y")
    with torch.no_grad():
        nll, logits_NV = model(x, y, "none"), model.logits(x).flatten(0, 1)
    checks = [
        worst(f"{prefix} nll", nll, z[f"{prefix}/nll"], LOGITS),
        worst(f"{prefix} logits_sel_pos", logits_NV[z["sel_pos"]], z[f"{prefix}/logits_sel_pos"], LOGITS),
        worst(f"{prefix} logits_sel_vocab", logits_NV[:, z["sel_vocab"]], z[f"{prefix}/logits_sel_vocab"], LOGITS),
    ]
    if f"{prefix}/logits_seq0" in z.files:
        rows = logits_NV[: x.shape[1]][z[f"{prefix}/logits_seq0_pos"]]
        checks.append(worst(f"{prefix} logits_seq0", rows, z[f"{prefix}/logits_seq0"], LOGITS))
    model.zero_grad(set_to_none=True)
    loss = model(x, y)
    loss.backward()
    checks.append(worst(f"{prefix} loss", loss.detach(), z[f"{prefix}/loss"], LOSS))
    return checks + check_gradients(model, z, prefix)


def check_gradients(model: GPT, z: Any, prefix: str) -> list[Check]:
    grads = {name: param.grad for name, param in model.named_parameters()}
    key = f"{prefix}/grad_names" if f"{prefix}/grad_names" in z.files else "grad_names"
    names = [str(name) for name in z[key]]
    checks = [exact(f"{prefix} parameter names", sorted(grads), sorted(names))]
    norms = np.array([float(grads[n].double().norm()) for n in names])
    scale = np.maximum(np.abs(z[f"{prefix}/grad_l2"]), 1e-30)
    checks.append(worst(f"{prefix} gradient norms", norms / scale, z[f"{prefix}/grad_l2"] / scale, GRADIENT))
    # A sum of signed entries has no scale of its own: the array's norm times the root of its size bounds it.
    bound = scale * np.sqrt([grads[n].numel() for n in names])
    sums = np.array([float(grads[n].double().sum()) for n in names])
    checks.append(worst(f"{prefix} gradient sums", sums / bound, z[f"{prefix}/grad_sum"] / bound, GRADIENT))
    for field in (k for k in z.files if k.startswith(f"{prefix}/grad/")):
        name, stored = field.removeprefix(f"{prefix}/grad/"), z[field]
        grad = grads[name].numpy()
        if name in ("tok_emb.weight", "lm_head.weight"):
            grad = grad[z["grad_rows"]]
        elif name == "bigram.embed.weight":
            grad = grad[z[f"{prefix}/grad_bigram_embed_rows"]]
        elif grad.shape != stored.shape:
            grad = grad[: stored.shape[0]]
        checks.append(worst(f"{prefix} grad {name}", grad, stored, GRADIENT, relative=True))
    return checks


def check_bf16(model: GPT, z: Any) -> list[Check]:
    """bfloat16 compute against the float32 numbers: the spread rounding may cause, no more."""
    model.compute_dtype = torch.bfloat16
    difference = model(ids(z, "x"), ids(z, "y"), "none").numpy() - z["tied/eval/nll"]
    model.compute_dtype = torch.float32
    return [
        Check("bf16 nll mean", float(np.abs(difference).mean()), BF16_MEAN),
        Check("bf16 nll max", float(np.abs(difference).max()), BF16_MAX),
        Check("bf16 loss", abs(float(difference.mean())), BF16_LOSS),
    ]


def check_rope(model: GPT, z: Any) -> list[Check]:
    checks = []
    for key in (k for k in z.files if k.startswith("rope/") and k.endswith("/rows")):
        length = int(key.split("/")[1].removeprefix("T"))
        section = model.section
        base = stretched_base(section.rope_base, length, section.rope_ref_len, model.head_dim)
        rows = z[key]
        for name, table in zip(("cos", "sin"), rope_tables(length, model.head_dim, base), strict=True):
            checks.append(worst(f"rope T{length} {name}", table[rows], z[f"rope/T{length}/{name}"], ROPE))
    return checks


def check_bigram(model: GPT, z: Any) -> list[Check]:
    if "bigram_ids" not in z.files:
        return []
    bigram = model.get_submodule("bigram")
    assert isinstance(bigram, BigramHash)
    checks = []
    for tokens, expected in (("x", "bigram_ids"), ("bigram_edge_tokens", "bigram_edge_ids")):
        now = ids(z, tokens)
        before = torch.nn.functional.pad(now, (1, 0), value=-1)[:, :-1]
        checks.append(exact(expected, bigram.bucket(now, before), z[expected]))
    return checks
