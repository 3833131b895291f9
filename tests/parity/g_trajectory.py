"""Six optimizer steps of the whole system: model, fake quantisation, clipping, momentum ramp, optimizers together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paramgolf.dist import Dist
from paramgolf.model.gpt import GPT
from paramgolf.optim import schedule
from paramgolf.optim.groups import OptimizerSet, build_optimizers
from paramgolf.recipe.sections import OptimSection, ScheduleSection
from tests.parity.harness import Check, exact, worst
from tests.parity.systems import load_model, recipe_of, system_of

LOSS, RELATIVE = 1e-3, 1e-3


def sections(system: str, hyper: dict[str, Any]) -> tuple[OptimSection, ScheduleSection]:
    """The recipe's optimizers with the settings of the trajectory."""
    recipe = recipe_of(system)
    optim = replace(
        recipe.optim,
        matrix_lr=hyper["matrix_lr"],
        scalar_lr=hyper["scalar_lr"],
        embed_lr=hyper["tied_embed_lr"],
        beta1=hyper["beta1"],
        beta2=hyper["beta2"],
        adam_eps=hyper["adam_eps"],
        grad_clip=hyper["grad_clip_norm"],
        ns_steps=hyper["muon_backend_steps"],
        ns_dtype="float32",
        momentum=hyper["muon_momentum"],
        weight_decay=hyper.get("muon_weight_decay", 0.0),
    )
    ramp = replace(
        recipe.schedule,
        momentum_warmup_start=hyper["muon_momentum_warmup_start"],
        momentum_warmup_steps=hyper["muon_momentum_warmup_steps"],
        momentum_warmup_frac=hyper.get("muon_warmup_frac", 0.0),
    )
    return optim, ramp


def momenta(system: str, section: OptimSection, ramp: ScheduleSection, z: Any) -> list[float]:
    cap = recipe_of(system).budget.seconds
    when = zip(z["step_for_momentum"], z["elapsed_ms_for_momentum"], strict=True)
    return [
        schedule.momentum(ramp, section.momentum, step=int(step), elapsed=float(ms) / 1000, budget_seconds=cap)
        for step, ms in when
    ]


def train(model: GPT, optimizers: OptimizerSet, z: Any, momentum: list[float]) -> list[Check]:
    losses, norms = [], []
    for t, (x, y) in enumerate(zip(batches(z, "x"), batches(z, "y"), strict=True)):
        optimizers.zero_grad()
        loss = model(x, y)
        loss.backward()
        losses.append(loss.item())
        norms.append(float(optimizers.clip(optimizers.section.grad_clip)))
        optimizers.step(float(z["lr_scale"][t]), momentum[t])
    theirs = z["grad_norm_before_clip"]
    return [
        worst("train loss", losses, z["train_loss"], LOSS),
        worst("gradient norm", np.array(norms) / theirs, np.ones_like(theirs), RELATIVE),
    ]


def batches(z: Any, name: str) -> Tensor:
    return torch.from_numpy(z[name].astype(np.int64))


def check(path: Path, z: Any) -> list[Check]:
    system = system_of(path, z)
    with np.load(path.parent / str(z["weights_file"]), allow_pickle=False) as weights:
        model = load_model(weights).train()
    start = {name: param.detach().double().clone() for name, param in model.named_parameters()}
    section, ramp = sections(system, json.loads(str(z["hyper_json"])))
    momentum = momenta(system, section, ramp, z)
    checks = [worst("momentum", momentum, z["momentum"], 1e-9)]
    checks += train(model, build_optimizers(model, section, Dist()), z, momentum)
    model.eval()
    with torch.no_grad():
        final = [model(x, y).item() for x, y in zip(batches(z, "x"), batches(z, "y"), strict=True)]
    checks.append(worst("final loss", final, z["final_eval_loss_per_batch"], LOSS))
    params = {name: param.detach().double() for name, param in model.named_parameters()}
    names = [str(name) for name in z["param_names"]]
    checks.append(exact("parameter names", sorted(params), sorted(names)))
    for key, ours in (
        ("final_param_l2", [float(params[n].norm()) for n in names]),
        ("final_param_delta_l2", [float((params[n] - start[n]).norm()) for n in names]),
    ):
        checks.append(worst(key, np.array(ours) / z[key], np.ones_like(z[key]), RELATIVE))
    for key in (k for k in z.files if k.startswith("final/")):
        checks.append(worst(key, params[key.removeprefix("final/")], z[key], RELATIVE, relative=True))
    return checks
