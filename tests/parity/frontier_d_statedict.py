"""Part D of the frontier set: a whole model calibrated, quantised, corrected, through our file and back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paramgolf.dist import Dist
from paramgolf.model.gpt import GPT
from paramgolf.pack.codecs.archive import group_streams, reorders
from paramgolf.pack.codecs.base import CodeSpec, CodeTensor, role
from paramgolf.pack.container import Artifact, decode_artifact, encode_artifact
from paramgolf.pack.stored import StoredTensor
from paramgolf.quant import lqer
from paramgolf.quant.export import export, restore
from paramgolf.quant.hessian import collect
from paramgolf.recipe.sections import QuantSection
from tests.parity.frontier_a_model import rows
from tests.parity.frontier_d_quant import DIFFERENT, codes_apart, other_scales, ulps
from tests.parity.frontier_models import build, config_of, our_arrays
from tests.parity.frontier_quant import by_layer, class_of, quant_of
from tests.parity.harness import Check, exact, worst

HESSIAN, RESIDUAL = 1e-4, 1e-3
ONE_TENSOR = 0.01  # share of codes that may differ in one tensor; over all of them it is DIFFERENT
NLL, LOSS = 1e-3, 1e-4  # after quantisation: one code in a thousand may differ by one
# With Hessians of our own a code at a tie may fall the other way, and later columns make up for it: noise of 1e-7 in a
# Hessian, float32's own, changes 82 of 16,384 codes of one such matrix by up to two. Given theirs it is one (D_quant).
FAR = 2
ENDINGS = {"q": "values", "scale": "scale", "gq": "values", "gs": "scale"}
FACTORS = {"lqA_a": (lqer.LEFT, "values"), "lqAs_a": (lqer.LEFT, "scale"),
           "lqB_a": (lqer.RIGHT, "values"), "lqBs_a": (lqer.RIGHT, "scale")}  # fmt: skip


def check(path: Path, z: Any) -> list[Check]:
    hyper = json.loads(str(z["hyper_json"]))
    with np.load(path.parent / str(z["weights_file"]), allow_pickle=False) as weights:
        model, config = build(weights).eval(), config_of(weights)
        x, y = rows(weights, "dense")
    section = quant_of(config | hyper)
    hessians = calibrated(model, z["calib_tokens"])
    checks = check_hessians(z, model, hessians)
    state = model.state_dict()
    stored = export(state, section, len(model.blocks), hessians)
    checks += check_classes(z, config, stored) + check_stored(z, config, stored)
    checks += check_residuals(z, config, section, stored, state) + check_corrections(z, config, section, state)
    if "archive/group_order" in z.files:
        checks += check_archive(z, config)
    exported, read = (
        restore(stored),
        restore(decode_artifact(encode_artifact(Artifact({}, stored), "rans").data).tensors),
    )
    checks.append(exact("file", [name for name, weight in exported.items() if not torch.equal(read[name], weight)], []))
    # Their codes, not ours: one code at a tie that fell the other way is within the bounds above and moves the loss.
    model.load_state_dict({name: their_weight(z, config, name).view_as(w) for name, w in state.items()})
    with torch.no_grad():
        checks.append(worst("roundtrip loss", model(x, y), z["roundtrip/loss"], LOSS))
        checks.append(worst("roundtrip nll", model(x, y, "none"), z["roundtrip/dense_loop_on_nll"], NLL))
    return checks


def calibrated(model: GPT, tokens: np.ndarray) -> dict[str, Tensor]:
    """Our Hessians of the fixture's batches: (batches, rows, T) ids."""
    stream = tokens.reshape(-1).astype(np.uint16)
    return collect(model, [stream], seq_len=tokens.shape[-1], tokens=stream.size, dist=Dist())


def check_hessians(z: Any, model: GPT, hessians: dict[str, Tensor]) -> list[Check]:
    """Ours are means over tokens and passes, theirs sums over both divided by the number of batches."""
    names = [str(name) for name in z["hessian_names"]]
    checks = [exact("Hessians that are missing", [name for name in names if name not in hessians], [])]
    passes = {f"blocks.{i}.": model.order.layers.count(i) for i in range(len(model.blocks))}
    per_batch = z["calib_tokens"].size / len(z["calib_tokens"])
    for index, name in enumerate(names):
        runs = next((count for start, count in passes.items() if name.startswith(start)), 1)
        ours = hessians[name].double() * per_batch * runs
        checks.append(worst(f"Hessian trace {name}", ours.trace(), z["hessian_trace"][index], HESSIAN, relative=True))
        checks.append(Check(f"Hessian sum {name}", abs(float(ours.sum() - z["hessian_sum"][index]))
                            / float(ours.abs().sum()), HESSIAN))  # fmt: skip
        if f"hessian/{name}" in z.files:
            checks.append(worst(f"Hessian {name}", ours, z[f"hessian/{name}"], HESSIAN, relative=True))
    return checks


def our_name(theirs: str, config: dict[str, Any]) -> str:
    (name,) = our_arrays({theirs: None}, config)
    return name


def check_classes(z: Any, config: dict[str, Any], stored: list[StoredTensor]) -> list[Check]:
    found = {t.name: t for t in stored}
    names = [our_name(str(name), config) for name in z["names"]]
    ours = [class_of(found[name].spec, f"{name}.{lqer.LEFT}" in found) for name in names]
    kept = [t for t in found if not t.endswith((lqer.LEFT, lqer.RIGHT))]
    return [
        exact("names", sorted(kept), sorted(names)),
        exact("class", ours, z["class"]),
        exact("bytes", sum(t.spec.nbytes for t in stored), z["stored_total_bytes"]),
    ]


def check_stored(z: Any, config: dict[str, Any], stored: list[StoredTensor]) -> list[Check]:
    """Every stored array: kept ones bit for bit, scales to an ulp, codes but for one in a thousand.

    LQER factors are looked at in `check_corrections`: their signs are the choice of the routine.
    """
    found = {t.name: t for t in stored}
    checks, differ, total = [], 0, 0
    for key in (k.removeprefix("stored/") for k in z.files if k.startswith("stored/")):
        name, _, ending = key.rpartition(".")
        theirs = z[f"stored/{key}"]
        if ending in FACTORS:
            continue
        if ending not in ENDINGS:
            checks.append(exact(f"kept {key}", found[our_name(key, config)].values.reshape(theirs.shape), theirs))
            continue
        ours = getattr(found[our_name(name, config)], ENDINGS[ending]).reshape(theirs.shape)
        if ending == "scale":
            checks.append(ulps(key, torch.from_numpy(ours.copy()), torch.from_numpy(theirs)))
            checks.append(other_scales(f"{key} rows that differ", ours == theirs))
        elif ending == "q":
            same = found[our_name(name, config)].scale == z[f"stored/{name}.scale"]
            apart = np.abs(ours.astype(int) - theirs.astype(int))[same]
            checks += codes_apart(key, apart, ONE_TENSOR, FAR)
            differ, total = differ + int((apart != 0).sum()), total + apart.size
        else:
            checks.append(exact(key, ours, theirs))
    return [*checks, Check("codes that differ", differ / total if total else float("inf"), DIFFERENT)]


def check_residuals(
    z: Any, config: dict[str, Any], section: QuantSection, stored: list[StoredTensor], state: dict[str, Tensor]
) -> list[Check]:  # fmt: skip
    """Norms of what their codes left, and whose are the largest."""
    found = {t.name: t for t in stored}
    names = [str(name) for name in z["residual_names"]]
    norms = [
        float(lqer.error_of(their_matrix(z, name).numpy(), state[our_name(name, config)]).norm()) for name in names
    ]
    checks = [worst(f"residual {n}", a, b, RESIDUAL, relative=True)
              for n, a, b in zip(names, norms, z["residual_norms"], strict=True)]  # fmt: skip
    ours = sorted(n.removesuffix(f".{lqer.LEFT}") for n in found if n.endswith(f".{lqer.LEFT}"))
    theirs = sorted(str(name) for name in z["lqer_selected"] if str(name))
    assert len(ours) <= section.lqer_tensors
    return [*checks, exact("corrected matrices", ours, theirs)]


def check_corrections(z: Any, config: dict[str, Any], section: QuantSection, state: dict[str, Tensor]) -> list[Check]:
    """Packed factors from the stored ones; our own factors span the same product; weights put together again."""
    checks = []
    for key in (k for k in z.files if k.startswith("lqer/") and k.endswith("/A")):
        name = key.removeprefix("lqer/").removesuffix("/A")
        a, b = (torch.from_numpy(z[f"lqer/{name}/{side}"]) for side in "AB")
        packed = {t.name: t for t in lqer.packed(name, a, b, section.lqer_group)}
        for ending, (half, what) in FACTORS.items():
            theirs = z[f"stored/{name}.{ending}"]
            ours = getattr(packed[f"{name}.{half}"], what).reshape(theirs.shape)
            checks.append(exact(f"{name}.{ending}", ours, theirs))
        own = lqer.factors(state[name] - their_matrix(z, name), section.lqer_rank)
        checks.append(worst(f"{name} product", own[0] @ own[1], a @ b, RESIDUAL, relative=True))
    for key in (k for k in z.files if k.startswith("reconstructed/")):
        name = key.removeprefix("reconstructed/")
        arrays = {name: their_matrix(z, name).numpy()}
        if f"lqer/{name}/A" in z.files:
            for t in lqer.packed(name, *(torch.from_numpy(z[f"lqer/{name}/{s}"]) for s in "AB"), section.lqer_group):
                arrays[t.name] = t.dequantised()
        checks.append(worst(key, lqer.applied(arrays)[name], z[key], 1e-6))
    return checks


def their_matrix(z: Any, name: str) -> Tensor:
    scale = torch.from_numpy(z[f"stored/{name}.scale"]).float()
    return torch.from_numpy(z[f"stored/{name}.q"]).float() * scale[:, None]


def their_weight(z: Any, config: dict[str, Any], ours: str) -> Tensor:
    """What their stored arrays stand for, of the tensor that has this name here."""
    name = next(str(n) for n in z["names"] if our_name(str(n), config) == ours)

    def array(ending: str) -> Tensor:
        return torch.from_numpy(z[f"stored/{name}{ending}"].copy()).float()

    if f"stored/{name}.gq" in z.files:
        return array(".gq") * array(".gs")[:, None]
    if f"stored/{name}.q" not in z.files:
        return array("")
    if f"stored/{name}.lqA_a" not in z.files:
        return their_matrix(z, name)
    right, scales = array(".lqB_a"), array(".lqBs_a")
    right = (right.reshape(len(scales), -1) * scales[:, None]).view_as(right)
    return their_matrix(z, name) + (array(".lqA_a") * array(".lqAs_a")) @ right


def check_archive(z: Any, config: dict[str, Any]) -> list[Check]:
    """The groups' bytes and permutations from the stored codes."""
    names = by_layer([str(name) for name in z["residual_names"]])
    tensors = []
    for name in names:
        codes = z[f"stored/{name}.q"]
        tensors.append(CodeTensor(CodeSpec(name, codes.shape, 8), codes))
    streams, orders = group_streams(tensors)
    filled = z["archive/group_bytes"] > 0
    groups = [str(group).lstrip("_").removesuffix(".q") for group in z["archive/group_order"][filled]]
    digests = [hashlib.sha256(stream).hexdigest() for stream in streams.values()]
    checks = [
        exact("groups", list(streams), groups),
        exact("bytes of groups", [len(stream) for stream in streams.values()], z["archive/group_bytes"][filled]),
        exact("groups' hashes", digests, z["archive/group_sha256"][filled]),
        exact("permutations", orders, z["archive/permutations"]),
    ]
    for key in (k for k in z.files if k.startswith("archive/group_") and k.endswith(".q")):
        name = key.removeprefix("archive/group_").lstrip("_").removesuffix(".q")
        checks.append(exact(key, np.frombuffer(streams[name], np.int8), z[key].reshape(-1)))
    assert all(role(t.spec.name) in streams for t in tensors if reorders(t.spec))
    return checks
