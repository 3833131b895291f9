"""NorMuon as PR 137's script has it: parameters, momentum and row statistic after each step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from paramgolf.optim.normuon_pr137 import NorMuonPR137
from paramgolf.recipe.sections import OptimSection
from tests.parity.b_muon import replay
from tests.parity.harness import Check, worst


def check(path: Path, z: Any) -> list[Check]:
    lrs, momenta = z["lr_per_step"], z["momentum_per_step"]
    checks = []
    variants = sorted({tuple(key.split("/")[:2]) for key in z.files if key.startswith(("f32/wd", "bf16/wd"))})
    for kind, decay in variants:
        section = OptimSection(ns_steps=int(z["backend_steps"]), weight_decay=float(decay.removeprefix("wd")))
        dtype, tolerance = (torch.float32, 1e-4) if kind == "f32" else (torch.bfloat16, 3e-2)
        seen, states = replay(NorMuonPR137, section, dtype, z, lrs, momenta)
        for name, params in seen.items():
            checks.append(worst(f"{kind} {decay} {name}", params, z[f"{kind}/{decay}/params/{name}"], tolerance))
            for ours, theirs in (("momentum", "momentum_buffer"), ("second", "normuon_v")):
                key = f"{kind}/{decay}/{theirs}/{name}"
                if key in z.files:
                    values = [state[f"{ours}.{name}"].numpy() for state in states]
                    checks.append(worst(key, values, z[key], 1e-5))
    return checks
