"""The later records' whole models: dense and packed rows, loop off and on; numbers, gradients, streams by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paramgolf.model.block import Block
from paramgolf.model.documents import bounds, segment_numbers
from paramgolf.model.gpt import GPT, run_block, run_lanes
from paramgolf.model.parts.base import Flow
from tests.parity.frontier_models import BANKS, build, config_of, their_arrays
from tests.parity.harness import Check, exact, worst

NLL, LOSS, TRACE, GRADIENT, SMALL = 1e-4, 1e-5, 1e-5, 1e-4, 1e-6
BF16_MEAN, BF16_MAX, BF16_LOSS = 0.06, 0.5, 0.015
LAYOUTS, LOOPS = ("dense", "packed"), ("loop_off", "loop_on")


def check(path: Path, z: Any) -> list[Check]:
    checks: list[Check] = []
    for layout in LAYOUTS:
        if not any(key.startswith(f"{layout}/") for key in z.files):
            continue
        model = build(z, packed=layout == "packed")
        if layout == "packed":
            ids, _ = rows(z, layout)
            ours = bounds(segment_numbers(ids, model.segment_len))
            checks.append(exact("cu_seqlens", ours, np.unique(z["cu_seqlens"])))
        for loop in LOOPS:
            if f"{layout}/{loop}/nll" in z.files:
                model.set_loops(model.section.loop_extra if loop == "loop_on" else 0)
                checks += check_pass(model, z, layout, loop)
    return checks


def rows(z: Any, layout: str) -> tuple[Tensor, Tensor]:
    """(ids, targets) of a layout: two rows, or everything in one."""
    stream = torch.from_numpy(z["stream"].astype(np.int64))
    shape = (2, -1) if layout == "dense" else (1, -1)
    return stream[:-1].view(shape), stream[1:].view(shape)


def check_pass(model: GPT, z: Any, layout: str, loop: str) -> list[Check]:
    prefix, (x, y) = f"{layout}/{loop}", rows(z, layout)
    with torch.no_grad():
        nll, logits_NV = model(x, y, "none"), model.logits(x).flatten(0, 1)
    checks = [worst(f"{prefix} nll", nll, z[f"{prefix}/nll"], NLL)]
    if f"{prefix}/nll_f64path" in z.files:
        checks.append(worst(f"{prefix} nll float64", nll, z[f"{prefix}/nll_f64path"], NLL))
    for key, ours in (("logits", logits_NV), ("logits_sel_vocab", logits_NV[:, ::16])):
        if f"{prefix}/{key}" in z.files:
            checks.append(worst(f"{prefix} {key}", ours, z[f"{prefix}/{key}"], NLL))
    model.zero_grad(set_to_none=True)
    loss = model(x, y)
    loss.backward()
    for key in ("loss", "train_loss"):
        checks.append(worst(f"{prefix} {key}", loss.detach(), z[f"{prefix}/{key}"], LOSS))
    checks += check_gradients(model, z, prefix)
    if f"{prefix}/trace/pos" in z.files:
        checks += check_trace(model, z, prefix, x)
    if f"{prefix}/bf16_nll" in z.files:
        checks += check_bf16(model, z, prefix, x, y)
    return checks


def gradients(model: GPT, names: list[str], config: dict[str, Any]) -> dict[str, np.ndarray]:
    grads = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    return their_arrays(grads, names, config)


def selected(name: str, grad: np.ndarray, stored: np.ndarray, z: Any) -> np.ndarray:
    """The part of a gradient that is stored."""
    if grad.size == stored.size:
        return grad.reshape(stored.shape)
    if name in BANKS:
        return grad[:, 1]
    return grad[z["grad_rows"]] if grad[z["grad_rows"]].shape == stored.shape else grad[: stored.shape[0]]


def check_gradients(model: GPT, z: Any, prefix: str) -> list[Check]:
    names = [str(name) for name in z[f"{prefix}/grad_names"]]
    grads = gradients(model, names, config_of(z))
    expected = z[f"{prefix}/grad_l2"].astype(np.float64)
    reached = ~np.isnan(expected)
    norms = np.array([np.linalg.norm(grads[n].astype(np.float64)) for n in names])
    error = np.abs(norms - expected)[reached] / (GRADIENT * np.abs(expected[reached]) + SMALL)
    checks = [Check(f"{prefix} gradient norms", float(error.max(initial=0.0)), 1.0)]
    checks.append(worst(f"{prefix} unreached", norms[~reached], np.zeros((~reached).sum()), 0.0))
    for key in (k for k in z.files if k.startswith(f"{prefix}/grad/")):
        name, stored = key.removeprefix(f"{prefix}/grad/"), z[key]
        allowed = GRADIENT * float(np.abs(stored).max(initial=0.0)) + SMALL
        checks.append(worst(f"{prefix} grad {name}", selected(name, grads[name], stored, z), stored, allowed))
    return checks


@torch.no_grad()
def check_trace(model: GPT, z: Any, prefix: str, x: Tensor) -> list[Check]:
    """The streams after every executed layer, taken where the layers run."""
    seen: list[tuple[Tensor, ...]] = []

    def one(block: Block, *inputs: Any) -> Tensor:
        out = run_block(block, *inputs)
        seen.append((out,))
        return out

    def two(block: Block, *inputs: Any) -> tuple[Tensor, Tensor]:
        out = run_lanes(block, *inputs)
        seen.append(out)
        return out

    model._compiled = {"block": one, "lanes": two}
    model(x)
    model._compiled = {}
    pos, trace = z[f"{prefix}/trace/pos"], f"{prefix}/trace"
    x0 = model.embed(Flow(x, documents=model.section.document_mask))
    checks = [
        exact(f"{trace}/layers", model.order.layers, z[f"{trace}/layers"]),
        exact(f"{trace}/lane_count", [len(lanes) for lanes in seen], z[f"{trace}/lane_count"]),
        worst(f"{trace}/x0", x0[:, pos], z[f"{trace}/x0"], TRACE, relative=True),
    ]
    for lane in (0, 1):
        if f"{trace}/lane{lane}" in z.files:
            ours = torch.stack([lanes[min(lane, len(lanes) - 1)][:, pos] for lanes in seen])
            checks.append(worst(f"{trace}/lane{lane}", ours, z[f"{trace}/lane{lane}"], TRACE, relative=True))
    return checks


@torch.no_grad()
def check_bf16(model: GPT, z: Any, prefix: str, x: Tensor, y: Tensor) -> list[Check]:
    """bfloat16 compute against the float32 numbers: the spread rounding may cause, no more."""
    model.compute_dtype = torch.bfloat16
    difference = model(x, y, "none").numpy() - z[f"{prefix}/nll"]
    model.compute_dtype = torch.float32
    return [
        Check(f"{prefix} bf16 nll mean", float(np.abs(difference).mean()), BF16_MEAN),
        Check(f"{prefix} bf16 nll max", float(np.abs(difference).max()), BF16_MAX),
        Check(f"{prefix} bf16 loss", abs(float(difference.mean())), BF16_LOSS),
    ]
