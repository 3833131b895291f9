"""The systems at their trained size: tensors, how each is stored, its optimizer, and its initial distribution."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paramgolf.dist import Dist
from paramgolf.model.gpt import GPT
from paramgolf.optim.groups import build_optimizers
from paramgolf.pack.stored import payload_bytes
from paramgolf.quant.plan import tensor_table
from paramgolf.recipe.sections import ModelSection
from tests.parity.c_statedict import THRESHOLD, class_of, reference_quant
from tests.parity.harness import Check, exact, worst
from tests.parity.systems import recipe_of

BF16 = 2.0**-8  # the scripts' start values passed through bfloat16
OFFDIAGONAL = 0.08  # of the Gram matrix; 0.14 to 0.25 for independent entries, below 0.001 for orthogonal ones
ABSMAX = 0.3  # relative: the largest of many Gaussian draws; of uniform ones it is far closer


def check(path: Path, z: Any) -> list[Check]:
    systems = dict.fromkeys(key.partition("/")[0] for key in z.files if key.endswith("/names"))
    return [entry for system in systems for entry in check_system(system, z)]


def check_system(system: str, z: Any) -> list[Check]:
    names = [str(name) for name in z[f"{system}/names"]]
    theirs = dict(zip(names, (shape_of(text) for text in z[f"{system}/shape"]), strict=True))
    section = section_of(system, theirs)
    model = GPT(section, theirs["tok_emb.weight"][0])
    model.init_weights(1)
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    checks = [Check(f"{system} names and shapes", float(shapes != theirs), 0.0)]
    if not checks[0].ok:
        return checks
    threshold = int(z[f"{system}/threshold"]) if f"{system}/threshold" in z.files else THRESHOLD
    specs = {s.name: s for s in tensor_table(shapes, reference_quant(system, threshold), section.num_layers)}
    checks += [
        exact(f"{system} class", [class_of(specs[name]) for name in names], z[f"{system}/class"]),
        exact(
            f"{system} scale_dtype",
            [specs[name].scale_dtype if specs[name].bits else "" for name in names],
            z[f"{system}/scale_dtype"],
        ),
        exact(f"{system} payload_bytes", payload_bytes(specs.values()), z[f"{system}/payload_bytes"]),
        exact(f"{system} param_count", sum(p.numel() for p in model.parameters()), z[f"{system}/param_count"]),
        exact(f"{system} opt_group", opt_groups(system, model, z[f"{system}/opt_names"]), z[f"{system}/opt_group"]),
    ]
    for index, name in enumerate(names):
        checks += check_init(system, z, index, state[name])
    return checks


def shape_of(text: object) -> tuple[int, ...]:
    return tuple(int(side) for side in str(text).split("x") if side)


def section_of(system: str, shapes: dict[str, tuple[int, ...]]) -> ModelSection:
    """The recipe's model with the sizes the fixture's shapes have."""
    section = recipe_of(system).model
    dim = shapes["tok_emb.weight"][1]
    heads = shapes["blocks.0.attn.q_gain"][0]
    parts = dict(section.parts)
    if "bigram.embed.weight" in shapes:
        buckets, width = shapes["bigram.embed.weight"]
        parts["bigram_hash"] = parts["bigram_hash"] | {"buckets": buckets, "dim": width}
    return replace(
        section,
        dim=dim,
        num_layers=len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        num_heads=heads,
        num_kv_heads=shapes["blocks.0.attn.c_k.weight"][0] * heads // dim,
        mlp_hidden=shapes["blocks.0.mlp.fc.weight"][0],
        tie_embeddings="lm_head.weight" not in shapes,
        parts=parts,
    )


def opt_groups(system: str, model: GPT, names: Any) -> list[str]:
    """`muon:lr=0.02`: optimizer and base learning rate of each parameter under our recipe."""
    optimizers = build_optimizers(model, recipe_of(system).optim, Dist())
    groups = [optimizers.group_of(str(name)) for name in names]
    return [f"{'muon' if g == 'matrix' else 'adam'}:lr={optimizers.base_lr(g):g}" for g in groups]


def check_init(system: str, z: Any, index: int, tensor: Tensor) -> list[Check]:
    """Another seed, so distributions are compared: mean and deviation within six standard errors, or bfloat16."""
    name = f"{system} {z[f'{system}/names'][index]}"
    mean, std, peak, offdiagonal = (
        float(z[f"{system}/init_{kind}"][index]) for kind in ("mean", "std", "absmax", "offdiag_ratio")
    )
    values = tensor.double()
    error = 6 / max(values.numel(), 1) ** 0.5
    checks = [
        worst(f"{name} mean", float(values.mean()), mean, 2 * error * std + BF16 * abs(mean)),
        worst(f"{name} std", float(values.std(correction=0)), std, 2 * error * std),
        worst(f"{name} absmax", float(values.abs().max()), peak, ABSMAX * peak if std else BF16 * peak),
    ]
    if np.isfinite(offdiagonal):
        checks.append(worst(f"{name} orthogonality", gram_offdiagonal(values), offdiagonal, OFFDIAGONAL))
    return checks


def gram_offdiagonal(matrix: Tensor) -> float:
    """Largest off-diagonal entry of the smaller Gram matrix over its mean diagonal; 0 for a zero matrix."""
    thin = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    gram = thin @ thin.T
    diagonal = gram.diagonal().clone()
    if not diagonal.any():
        return 0.0
    return float((gram - torch.diag(diagonal)).abs().max() / diagonal.mean())
