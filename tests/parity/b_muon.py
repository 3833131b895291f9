"""Muon: parameters and momentum after each step, and the orthogonalisation alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from paramgolf.dist import Dist
from paramgolf.optim.muon import Muon
from paramgolf.optim.newton_schulz import orthogonalize
from paramgolf.recipe.sections import OptimSection
from tests.parity.harness import Check, worst


def replay(
    optimizer: type[Muon], section: OptimSection, dtype: torch.dtype, z: Any, lrs: np.ndarray, momenta: np.ndarray
) -> tuple[dict[str, list[np.ndarray]], list[dict[str, Tensor]]]:
    """Feed the stored gradients; parameters by name and the optimizer's state after each step."""
    names = sorted(key.removeprefix("p0/") for key in z.files if key.startswith("p0/"))
    params = {name: Parameter(torch.from_numpy(z[f"p0/{name}"].copy())) for name in names}
    optim = optimizer(params.items(), section, Dist(), dtype)
    seen: dict[str, list[np.ndarray]] = {name: [] for name in names}
    states = []
    for step in range(len(z[f"grads/{names[0]}"])):
        for name, param in params.items():
            param.grad = torch.from_numpy(z[f"grads/{name}"][step].copy())
        optim.step(float(lrs[step]), float(momenta[step]))
        states.append(optim.state_dict())
        for name, param in params.items():
            seen[name].append(param.detach().numpy().copy())
    return seen, states


def check(path: Path, z: Any) -> list[Check]:
    section = OptimSection(ns_steps=int(z["backend_steps"]))
    momenta = z["momentum_per_step"]
    lrs = np.full(len(momenta), float(z["lr"]))
    checks = []
    seen, states = replay(Muon, section, torch.float32, z, lrs, momenta)
    for name, params in seen.items():
        checks.append(worst(f"f32 {name}", params, z[f"f32/params/{name}"], 1e-5))
        buffers = [state[f"momentum.{name}"].numpy() for state in states]
        checks.append(worst(f"momentum {name}", buffers, z[f"f32/momentum_buffer/{name}"], 1e-5))
    # Without Nesterov the scripts orthogonalise the raw gradient: Muon without momentum.
    seen, _ = replay(Muon, section, torch.float32, z, lrs, np.zeros_like(momenta))
    checks += [worst(f"no momentum {n}", p, z[f"f32_no_nesterov/params/{n}"], 1e-5) for n, p in seen.items()]
    seen, _ = replay(Muon, section, torch.bfloat16, z, lrs, momenta)
    checks += [worst(f"bf16 {n}", p, z[f"bf16/params/{n}"], 2e-3) for n, p in seen.items()]
    for key in (key for key in z.files if key.startswith("ns/")):
        _, kind, name, step = key.split("/")
        exact = z[f"ns/f32/{name}/{step}"]
        # In bfloat16 small singular values are noise: ours may be as far from float32 as the script's, no further.
        noise = float(np.abs(z[key] - exact).max())
        dtype = torch.float32 if kind == "f32" else torch.bfloat16
        grad = torch.from_numpy(z[f"grads/{name}"][int(step)]).unsqueeze(0)
        ours = orthogonalize(grad, int(z["backend_steps"]), dtype=dtype)[0].float().numpy()
        checks.append(worst(key, ours, exact, 5e-4 if kind == "f32" else 1.25 * noise))
    return checks
