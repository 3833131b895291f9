"""Row-equalised Muon of two published records: parameters after each step, momentum, the orthogonalisation alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import Parameter

from paramgolf.dist import Dist
from paramgolf.optim import newton_schulz as ns
from paramgolf.optim.muon import Muon
from paramgolf.optim.muoneq_r import MuonEqRPR1394, MuonEqRPR1855
from paramgolf.recipe.sections import OptimSection
from tests.parity.harness import Check, exact, worst

PARAMS, BF16_PARAMS, ORTHOGONAL = 1e-5, 8e-3, 1e-4


class PolarMuon(Muon):
    """pr1855's update without the row norms."""

    coefficients = ns.POLAR_EXPRESS


SYSTEMS: dict[str, tuple[type[Muon], type[Muon]]] = {
    "pr1855": (MuonEqRPR1855, PolarMuon),
    "pr1394": (MuonEqRPR1394, Muon),
}


def steps_of(system: str, asked: int) -> int:
    """Iterations a script does: pr1855 stops at the end of its table, where ours would repeat the last entry."""
    table = SYSTEMS[system][0].coefficients
    return asked if isinstance(table[0], float) else min(asked, len(table))


def replay(
    kind: type[Muon], section: OptimSection, dtype: torch.dtype, grads: np.ndarray, p0: np.ndarray, z: Any, mu: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Parameters after every step and the last momentum of one matrix or bank, whose slices are matrices of ours."""
    slices = p0[None] if p0.ndim == 2 else p0
    params = {f"{i:03}": Parameter(torch.from_numpy(w.copy())) for i, w in enumerate(slices)}
    optim = kind(params.items(), section, Dist(), dtype)
    seen = []
    for step, lr in enumerate(z["lr_per_step"]):
        for param, g in zip(params.values(), grads[step].reshape(slices.shape), strict=True):
            param.grad = torch.from_numpy(g.copy())
        optim.step(float(lr), float(mu[step]))
        seen.append(np.stack([p.detach().numpy().copy() for p in params.values()]).reshape(p0.shape))
    state = optim.state_dict()
    momentum = np.stack([state[f"momentum.{name}"].numpy() for name in params]).reshape(p0.shape)
    return np.stack(seen), momentum


def check_steps(system: str, name: str, z: Any) -> list[Check]:
    kind, without_rows = SYSTEMS[system]
    grads, p0, mu = z[f"grads/{name}"], z[f"p0/{name}"], z["momentum_per_step"]
    steps = steps_of(system, int(z["backend_steps"]))
    full = OptimSection(ns_steps=steps, weight_decay=float(z["weight_decay"]))
    bare = OptimSection(ns_steps=steps)
    params, momentum = replay(kind, full, torch.float32, grads, p0, z, mu)
    half, _ = replay(kind, full, torch.bfloat16, grads, p0, z, mu)
    plain, _ = replay(without_rows, bare, torch.float32, grads, p0, z, mu)
    # Without Nesterov one script orthogonalises the buffer, the other the raw gradient: no momentum at all.
    no_nesterov = OptimSection(ns_steps=steps, nesterov=False)
    buffered = mu if system == "pr1855" else np.zeros_like(mu)
    straight, _ = replay(kind, no_nesterov, torch.float32, grads, p0, z, buffered)
    stored = f"{system}/f32_no_nesterov_nowd/params/{name}"
    return [
        worst(f"{system} {name}", params, z[f"{system}/f32/params/{name}"], PARAMS),
        worst(f"{system} {name} momentum", momentum, z[f"{system}/f32/momentum_buffer/{name}"], PARAMS),
        worst(f"{system} {name} bf16", half, z[f"{system}/f32/params/{name}"], BF16_PARAMS),
        worst(f"{system} {name} no rows", plain, z[f"{system}/f32_norow_nowd/params/{name}"], PARAMS),
        worst(f"{system} {name} no nesterov", straight[[0, -1]], z[stored], PARAMS),
    ]


def check_orthogonalised(z: Any) -> list[Check]:
    checks = []
    for key in (k for k in z.files if "/orthogonalised_f32" in k):
        system, how, name, *which = key.split("/")
        asked = how.removeprefix("orthogonalised_f32").removeprefix("_steps")
        table = SYSTEMS[system][0].coefficients
        steps = steps_of(system, int(asked or z["backend_steps"]))
        grad = torch.from_numpy(z[f"grads/{name}"][int(which[0]) if which else 0])
        stack = grad if grad.ndim == 3 else grad[None]
        ours = ns.orthogonalize(stack, steps, table).reshape(grad.shape)
        checks.append(worst(key, ours, z[key], ORTHOGONAL))
    return checks


def check(path: Path, z: Any) -> list[Check]:
    checks = [exact("Polar Express coefficients", np.array(ns.POLAR_EXPRESS), z["pr1855/coefficients"])]
    for key in (k for k in z.files if "/f32/params/" in k):
        checks += check_steps(key.split("/")[0], key.split("/")[-1], z)
    return checks + check_orthogonalised(z)
