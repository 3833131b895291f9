"""Integer grids: codes, scales and decoded values of every class, and fake quantisation while training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from paramgolf.pack.packing import pack6
from paramgolf.quant.grid import Grid
from tests.parity.harness import Check, exact, worst
from tests.parity.systems import EXPORT_GRIDS, POST_QAT_GRIDS, QAT_GRIDS, VECTOR_GRIDS, system_of

PERCENTILE_SCALE = 1e-3  # relative: one float16 step
FAKE, FAKE_STEPS = 1e-5, 1e-3  # of the row maximum; share of entries that may be one step away
BF16 = 2.0**-7  # of the row maximum: a rounding to bfloat16 on either side
GROUPED = "_group"


def check(path: Path, z: Any) -> list[Check]:
    system = system_of(path, z)
    checks: list[Check] = []
    for name in (key.removeprefix("in/") for key in z.files if key.startswith("in/")):
        w = array(z, f"in/{name}")
        for kind, section in (EXPORT_GRIDS if w.ndim == 2 else VECTOR_GRIDS)[system].items():
            if f"{kind}/q/{name}" in z.files:
                checks += check_class(Grid(section), w, z, kind, name)
        if f"int6/packed/{name}" in z.files:
            checks.append(check_packed(z, name))
        if f"fp16/deq/{name}" in z.files:
            checks.append(exact(f"fp16 {name}", w.half().float(), z[f"fp16/deq/{name}"]))
        if f"qat/weight_f32/{name}" in z.files:
            checks += check_training(Grid(QAT_GRIDS[system]), w, z, name)
        if f"postqat/weight_f32/{name}" in z.files:
            checks += check_fake(Grid(POST_QAT_GRIDS[system]), w, z, f"postqat/weight_{{}}/{name}")
    return checks


def array(z: Any, key: str) -> Tensor:
    return torch.from_numpy(z[key].copy())


def check_class(grid: Grid, w: Tensor, z: Any, kind: str, name: str) -> list[Check]:
    """One tensor as one class. Where the stored scale is zero everything decodes to zero; the scripts divided by it
    and stored what the platform made of that, ours are zeros: there only the decoded values are compared."""

    def shaped(rows: Tensor) -> Tensor:
        """Rows in groups, the last filled up with zeros."""
        if GROUPED not in kind:
            return rows
        group = int(kind.partition(GROUPED)[2])
        return F.pad(rows, (0, -rows.shape[-1] % group)).reshape(rows.shape[0], -1, group)

    codes, scale = grid.quantize(shaped(w))
    their_codes, their_scale = shaped(array(z, f"{kind}/q/{name}")), array(z, f"{kind}/scale/{name}")
    deq = shaped(array(z, f"{kind}/deq/{name}"))
    alive = (their_scale != 0).reshape(their_scale.shape + (1,) * (codes.ndim - their_scale.ndim))
    checks = [exact(f"{kind} scale type {name}", str(scale.dtype), str(their_scale.dtype))]
    if grid.section.clip == "quantile":
        safe = np.maximum(np.abs(their_scale.double().numpy()), 1e-30)
        checks.append(worst(f"{kind} scale {name}", scale / safe, their_scale / safe, PERCENTILE_SCALE))
    else:
        checks.append(exact(f"{kind} scale {name}", scale, their_scale))
    checks.append(exact(f"{kind} codes {name}", torch.where(alive, codes, 0), torch.where(alive, their_codes, 0)))
    checks.append(exact(f"{kind} decoding {name}", grid.dequantize(their_codes, their_scale), deq))
    ours = grid.dequantize(codes, scale)
    if torch.equal(scale, their_scale):
        checks.append(exact(f"{kind} decoded {name}", ours, deq))
    else:
        checks.append(worst(f"{kind} decoded {name}", ours, deq, PERCENTILE_SCALE, relative=True))
    return checks


def check_packed(z: Any, name: str) -> Check:
    """PR 107's layout of the codes: four 6-bit fields in three bytes."""
    return exact(f"int6 packed {name}", pack6(z[f"int6/q/{name}"]), z[f"int6/packed/{name}"])


def check_training(grid: Grid, w: Tensor, z: Any, name: str) -> list[Check]:
    """Effective weight, output and straight-through gradient of a fake-quantised linear map."""
    weight = w.clone().requires_grad_()
    effective = grid.fake_quantize(weight)
    out = F.linear(array(z, "qat/x"), effective)
    out.square().sum().backward()
    checks = check_fake(grid, w, z, f"qat/weight_{{}}/{name}")
    their_weight = array(z, f"qat/weight_f32/{name}")
    if torch.allclose(effective, their_weight, rtol=FAKE, atol=0):  # no entry is a step away
        checks.append(worst(f"qat out {name}", out.detach(), z[f"qat/out_f32/{name}"], 1e-4, relative=True))
        checks.append(worst(f"qat grad {name}", weight.grad, z[f"qat/grad_f32/{name}"], 1e-4, relative=True))
    return checks


def check_fake(grid: Grid, w: Tensor, z: Any, key: str) -> list[Check]:
    """The fake-quantised weight in float32, and cast to bfloat16 against what the script made of a bfloat16 input."""
    ours = grid.fake_quantize(w)
    checks = [steps_apart(key.format("f32"), ours, array(z, key.format("f32")), w, FAKE)]
    theirs = array(z, key.format("bf16"))
    # The scripts may round the weight itself to bfloat16 first: entries near a tie land on the neighbouring code.
    step = w.abs().amax(-1, keepdim=True).double() / grid.qmax + grid.section.floor
    error = (ours.bfloat16().double() - theirs.double()).abs()
    bound = step + BF16 * w.abs().amax(-1, keepdim=True).double()
    checks.append(Check(f"{key.format('bf16')} in steps", float((error / bound.clamp_min(1e-30)).max()), 1.0))
    return checks


def steps_apart(name: str, ours: Tensor, theirs: Tensor, w: Tensor, tolerance: float) -> Check:
    """Share of entries further than `tolerance` of their row's maximum from the reference; a few may be a step away."""
    error = (ours.double() - theirs.double()).abs()
    peak = w.abs().amax(-1, keepdim=True).double()
    return Check(name, float((error > tolerance * peak).double().mean()), FAKE_STEPS)
