"""The later records at their trained size: tensors, how each is stored, optimizers, initial distributions, totals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paramgolf.dist import Dist
from paramgolf.model.gpt import GPT
from paramgolf.optim.groups import OptimizerSet, build_optimizers
from paramgolf.pack.stored import payload_bytes
from paramgolf.quant import lqer
from paramgolf.quant.plan import plan, tensor_table
from paramgolf.recipe.sections import OptimSection
from tests.parity.c_fullsize import ABSMAX, BF16, shape_of
from tests.parity.frontier_models import add_lanes, our_arrays, section_of, their_arrays
from tests.parity.frontier_quant import class_of, quant_of
from tests.parity.harness import Check, exact, worst

THEIR_GROUPS = {"matrix": "muon", "embed": "tok", "head": "head", "scalar": "scalar"}


def check(path: Path, z: Any) -> list[Check]:
    systems = dict.fromkeys(key.partition("/")[0] for key in z.files if key.endswith("/names"))
    return [entry for system in systems for entry in check_system(system, z)]


def check_system(system: str, z: Any) -> list[Check]:
    hyper = json.loads(str(z[f"{system}/hyper_json"])) | {"system": system}
    section = replace(
        section_of(hyper),
        qk_gain=hyper["qk_gain_init"],
        embed_init_std=hyper["tied_embed_init_std"],
        init="orthogonal_zero",
    )
    model = GPT(section, hyper["vocab_size"])
    add_lanes(model, [str(name) for name in z[f"{system}/train_param_names"]])
    model.init_weights(1)
    checks = check_export(system, z, hyper, model)
    checks += check_training(system, z, hyper, model)
    encoder = model.order.layers[: model.order.encoder]
    return [
        *checks,
        exact(f"{system} param_count", sum(p.numel() for p in model.parameters()), z[f"{system}/param_count"]),
        exact(f"{system} encoder", encoder, z[f"{system}/encoder_indices"]),
        exact(f"{system} decoder", model.order.layers[len(encoder) :], z[f"{system}/decoder_indices"]),
    ]


def check_export(system: str, z: Any, hyper: dict[str, Any], model: GPT) -> list[Check]:
    """Sizes, classes, clips and bytes of every exported tensor."""
    names = [str(name) for name in z[f"{system}/names"]]
    mine = [next(iter(our_arrays({name: None}, hyper))) for name in names]
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    theirs = [shape_of(text) for text in z[f"{system}/shape"]]
    sizes = [int(np.prod(shape, dtype=np.int64)) for shape in theirs]
    quant = quant_of(hyper)
    specs = {spec.name: spec for spec in tensor_table(shapes, quant, len(model.blocks))}
    stores = plan(shapes, quant, len(model.blocks))
    clips = [float(text) if str(text) else 0.0 for text in z[f"{system}/clip_sigmas"]]
    grids = [stores[name].grid for name in mine]
    scales = [int(np.prod(specs[name].scale_shape)) * 2 if specs[name].bits else 0 for name in mine]
    extra = z[f"{system}/lqer_extra_bytes"]
    matrices = [int(n) for n in np.flatnonzero(extra)]
    factors = [
        sum(t.spec.nbytes for t in lqer.packed("w", *zeros(theirs[n], quant.lqer_rank), quant.lqer_group))
        for n in matrices
    ]
    return [
        exact(f"{system} names", sorted(mine), sorted(shapes)),
        exact(f"{system} sizes", [state[name].numel() for name in mine], sizes),
        exact(f"{system} class", [class_of(specs[name]) for name in mine], z[f"{system}/class_without_lqer"]),
        exact(f"{system} clips", [grid.clip_value if grid is not None else 0.0 for grid in grids], clips),
        exact(f"{system} bytes", [specs[name].nbytes for name in mine], z[f"{system}/bytes_q"] + scales),
        exact(f"{system} bytes of scales", scales, z[f"{system}/bytes_scale"]),
        exact(f"{system} bytes of corrections", factors, extra[matrices]),
        exact(f"{system} payload", payload_bytes(specs.values()), (z[f"{system}/bytes_q"] + scales).sum()),
        exact(f"{system} number of corrections", quant.lqer_tensors, len(matrices)),
    ]


def zeros(shape: tuple[int, ...], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(shape[0], rank), torch.zeros(rank, shape[1])


def optim_of(hyper: dict[str, Any]) -> OptimSection:
    return OptimSection(
        matrix=f"muoneq_r_{hyper['system']}",
        matrix_lr=hyper["matrix_lr"],
        scalar_lr=hyper["scalar_lr"],
        embed_lr=hyper["tied_embed_lr"] if hyper["tie_embeddings"] else hyper.get("embed_lr", 0.6),
        head_lr=hyper.get("head_lr", 0.008),
        momentum=hyper["muon_momentum"],
        ns_steps=hyper["muon_backend_steps"],
        beta1=hyper["beta1"],
        beta2=hyper["beta2"],
        adam_eps=hyper["adam_eps"],
        weight_decay=hyper["muon_wd"],
        embed_weight_decay=hyper["embed_wd"],
        scalar_weight_decay=hyper["adam_wd"],
        ns_dtype="float32",
    )


def settings(optimizers: OptimizerSet, name: str) -> tuple[str, dict[str, Any]]:
    """(their word for the group, its settings as the scripts list them) of one of our parameters."""
    group, section = optimizers.group_of(name), optimizers.section
    if group == "matrix":
        found = {
            "weight_decay": section.weight_decay,
            "momentum": section.momentum,
            "row_normalize": "muoneq" in section.matrix,
            "nesterov": section.nesterov,
            "backend_steps": section.ns_steps,
        }
    else:
        decay = section.scalar_weight_decay if group == "scalar" else section.embed_weight_decay
        found = {"betas": [section.beta1, section.beta2], "eps": section.adam_eps, "weight_decay": decay}
    return THEIR_GROUPS[group], {"lr": optimizers.base_lr(group), **found}


def check_training(system: str, z: Any, hyper: dict[str, Any], model: GPT) -> list[Check]:
    """Optimizer settings of every parameter, and its start values: another seed, so distributions are compared."""
    names = [str(name) for name in z[f"{system}/train_param_names"]]
    values = their_arrays(model.state_dict(), names, hyper)
    optimizers = build_optimizers(model, optim_of(hyper), Dist())
    checks = []
    for index, name in enumerate(names):
        group, _, listed = str(z[f"{system}/train_param_optimizer"][index]).partition("/")
        ours = [settings(optimizers, mine) for mine in our_arrays({name: range(3 * len(model.blocks))}, hyper)]
        if listed:  # else no optimizer of the script has it
            wanted = (group, json.loads(listed))
            checks.append(Check(f"{system} optimizer {name}", float(sum(found != wanted for found in ours)), 0.0))
        shape = shape_of(z[f"{system}/train_param_shape"][index])
        array = values[name].astype(np.float64)
        checks.append(exact(f"{system} size {name}", array.size, int(np.prod(shape, dtype=np.int64))))
        mean, std, peak = (float(z[f"{system}/init_{kind}"][index]) for kind in ("mean", "std", "absmax"))
        error = 6 / max(array.size, 1) ** 0.5
        checks += [
            worst(f"{system} {name} mean", array.mean(), mean, 2 * error * std + BF16 * abs(mean)),
            worst(f"{system} {name} std", array.std(), std, 2 * error * std + BF16 * std),
            worst(f"{system} {name} absmax", np.abs(array).max(), peak, ABSMAX * peak if std else BF16 * peak),
        ]
    return checks
