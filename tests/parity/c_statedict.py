"""A whole state dict through export, our file format and back, under the scripts' own precision rules."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paramgolf.pack.container import Artifact, decode_artifact, encode_artifact
from paramgolf.pack.packing import pack6
from paramgolf.pack.stored import StoredTensor, TensorSpec
from paramgolf.quant.export import export, payload_bytes, restore
from paramgolf.recipe.sections import QuantSection, RuleSection
from tests.parity.harness import Check, exact, worst
from tests.parity.systems import EXPORT_GRIDS, VECTOR_GRIDS, load_model, recipe_of, system_of

NLL, LOSS = 2e-4, 1e-5
THRESHOLD = 65_536  # elements: the scripts' small tensors
PLAIN = {"float16": "fp16", "float32": "fp32"}
# The one rule that our recipe states by position and the script by number.
NUMBERED = {"pr137": ("@last_layers:2&*.attn.c_k.weight", "blocks.7.attn.c_k.weight|blocks.8.attn.c_k.weight")}


def reference_quant(system: str, threshold: int = THRESHOLD) -> QuantSection:
    """The system's export as its script has it: our recipe's rules, with the script's grids and its quirks by name.

    Control tensors are only looked for among the small ones; PR 128 stores every small tensor in fp16 before it looks.
    """
    grids = {name: grid for name, grid in EXPORT_GRIDS[system].items() if "_" not in name}
    if system == "pr107":
        grids["int6"] = replace(grids["int6"], packed=True)
    vectors = {f"{name}_vector": grid for name, grid in VECTOR_GRIDS[system].items()}
    rules: list[RuleSection] = []
    for rule in recipe_of(system).quant.rules:
        old, new = NUMBERED.get(system, ("", ""))
        rule = replace(rule, match=new if rule.match == old else rule.match)
        if rule.match == "@control" or rule.max_size:
            rule = replace(rule, max_size=threshold)
        if f"{rule.store}_vector" in vectors:
            rules.append(replace(rule, ndim=1, store=f"{rule.store}_vector"))
        rules.append(rule)
    if system == "pr128":
        rules.insert(0, RuleSection(max_size=threshold, store="float16"))
    return QuantSection(grids=grids | vectors, rules=tuple(rules))


def class_of(spec: TensorSpec) -> str:
    """The fixture's word for how a tensor is stored."""
    if not spec.bits:
        return PLAIN[spec.store]
    return f"int{spec.bits}" + ("packed" if spec.packed else "")


def integers(tensor: StoredTensor) -> np.ndarray:
    """The integer array as the script stores it."""
    return pack6(tensor.values) if tensor.spec.packed else tensor.values


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def check(path: Path, z: Any) -> list[Check]:
    system = system_of(path, z)
    with np.load(path.parent / str(z["weights_file"]), allow_pickle=False) as weights:
        model = load_model(weights).eval()
        x, y = (torch.from_numpy(weights[key].astype(np.int64)) for key in ("x", "y"))
    stored = export(model.state_dict(), reference_quant(system, int(z["threshold"])), len(model.blocks))
    found = {tensor.name: tensor for tensor in stored}
    names = [str(name) for name in z["names"]]
    checks = [
        exact("names", sorted(found), sorted(names)),
        exact("payload_bytes", payload_bytes(stored), z["payload_bytes"]),
    ]
    if not checks[0].ok:
        return checks
    checks.append(exact("class", [class_of(found[name].spec) for name in names], z["class"]))
    for index, name in enumerate(names):
        checks += check_tensor(z, index, found[name])
    file = encode_artifact(Artifact({}, stored), "zlib", 1)
    model.load_state_dict(restore(decode_artifact(file.data).tensors))
    with torch.no_grad():
        checks.append(worst("roundtrip loss", model(x, y), z["roundtrip/loss"], LOSS))
        checks.append(worst("roundtrip nll", model(x, y, "none"), z["roundtrip/nll"], NLL))
    return checks


def check_tensor(z: Any, index: int, tensor: StoredTensor) -> list[Check]:
    """Codes, scale, kept values and what they decode to, wherever the fixture has them."""
    name = tensor.name
    checks = []
    if f"scale/{name}" in z.files:
        assert tensor.scale is not None
        checks.append(exact(f"scale type {name}", tensor.scale.dtype.name, z[f"scale/{name}"].dtype.name))
        checks.append(exact(f"scale {name}", tensor.scale, z[f"scale/{name}"]))
    if f"q/{name}" in z.files:
        checks.append(exact(f"codes {name}", integers(tensor), z[f"q/{name}"]))
    if f"keep/{name}" in z.files:
        checks.append(exact(f"kept type {name}", tensor.values.dtype.name, z[f"keep/{name}"].dtype.name))
        checks.append(exact(f"kept {name}", tensor.values, z[f"keep/{name}"]))
    if str(z["q_sha256"][index]):
        checks.append(exact(f"codes hash {name}", sha256(integers(tensor)), str(z["q_sha256"][index])))
    if "deq_sha256" in z.files and str(z["deq_sha256"][index]):
        checks.append(exact(f"decoded hash {name}", sha256(tensor.dequantised()), str(z["deq_sha256"][index])))
    return checks
