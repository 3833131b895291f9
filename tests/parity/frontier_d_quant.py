"""Part D of the frontier set: GPTQ, SD-clip, int8 gates, percentile search, LQER, and what the archives rearrange."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paramgolf.pack.codecs.rearrange import (
    byte_shuffle,
    byte_unshuffle,
    join_streams,
    similarity_order,
    split_streams,
)
from paramgolf.quant import gptq, lqer, percentile
from paramgolf.quant.gptq import weighted_error
from paramgolf.quant.grid import Grid
from paramgolf.recipe.sections import GridSection
from tests.parity.c_quant import array
from tests.parity.harness import Check, exact

DIFFERENT = 1e-3  # share of GPTQ codes that may differ, each by 1
OTHER_SCALES = 0.05  # share of rows whose scale may be an ulp away; always one row
ERROR = 1e-3  # relative, of the Hessian-weighted error
_CASE = re.compile(r"^gptq/([^/]+)/k([\d.]+)_r(\d+)/q$")


def check(path: Path, z: Any) -> list[Check]:
    checks: list[Check] = []
    for key in z.files:
        if case := _CASE.match(key):
            checks += check_gptq(z, key.removesuffix("/q"), case[1], float(case[2]), int(case[3]))
    checks += check_pathological(z) + check_sdclip(z) + check_gate(z)
    for name in (key.removeprefix("percentile/in/") for key in z.files if key.startswith("percentile/in/")):
        checks += check_percentile(z, name)
    for key in z.files:
        if key.startswith("lqer/") and key.endswith("/asym/A"):
            checks += check_lqer(z, key.removesuffix("/asym/A"))
        if key.startswith("byte_shuffle/") and key.endswith("/in"):
            checks += check_shuffle(z, key.removesuffix("/in"))
    return checks + check_similarity(z) + check_streams(z)


def sdclip(k: float, largest: int) -> Grid:
    return Grid(GridSection(bits=(largest + 1).bit_length(), clip="sdclip", clip_value=k))


def ulps(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> Check:
    """Largest distance of float16 scales in steps of the type; one is allowed."""
    steps = ours.view(torch.int16).int() - theirs.view(torch.int16).int()
    return Check(name, float(steps.abs().max()), 1.0)


def other_scales(name: str, same: np.ndarray) -> Check:
    """Share of rows whose scale is not theirs."""
    return Check(name, float((~same).mean()), max(OTHER_SCALES, 1 / same.size))


def codes_apart(name: str, apart: np.ndarray, share: float, far: int = 1) -> list[Check]:
    """How many codes differ and how far, of the rows whose scale is theirs; no such row is a failure."""
    if not apart.size:
        return [Check(f"{name} (no row has their scale)", float("inf"), share)]
    return [Check(f"{name} distance", float(apart.max()), float(far)), Check(name, float((apart != 0).mean()), share)]


def check_gptq(z: Any, prefix: str, tag: str, k: float, largest: int) -> list[Check]:
    """Codes where the scale is bit for bit theirs (all but one row in some thousand), and the error they leave."""
    weight, hessian = array(z, f"gptq/{tag}/W"), array(z, f"gptq/{tag}/H")
    their_codes, their_scale = array(z, f"{prefix}/q"), array(z, f"{prefix}/scale")
    grid = sdclip(k, largest)
    codes, scale = gptq.quantize(weight, grid, hessian)
    same = scale == their_scale
    apart = (codes.int() - their_codes.int()).abs()[same]
    theirs, plain = z[f"{prefix}/hessian_error_gptq_and_plain"]
    error = weighted_error(weight.double(), grid.dequantize(codes, scale), hessian)
    rounded = weighted_error(weight.double(), grid.dequantize(*grid.quantize(weight)), hessian)
    return [
        ulps(f"{prefix} scale", scale, their_scale),
        other_scales(f"{prefix} rows with other scales", same.numpy()),
        *codes_apart(f"{prefix} codes", apart.numpy(), DIFFERENT),
        Check(f"{prefix} weighted error", abs(error / theirs - 1), ERROR),
        Check(f"{prefix} weighted error of plain rounding", abs(rounded / plain - 1), ERROR),
    ]


def check_pathological(z: Any) -> list[Check]:
    """Rows of zeros, of one value and of tiny values beside plain ones. Where the scripts' scale underflows they store

    zeros; ours may not be further from the weights than that."""
    weight, hessian = array(z, "gptq_pathological/W"), array(z, "gptq_pathological/H")
    their_codes, their_scale = array(z, "gptq_pathological/q"), array(z, "gptq_pathological/scale")
    grid = sdclip(12.85, 31)
    codes, scale = gptq.quantize(weight, grid, hessian)
    plain = their_scale != 0
    left = (grid.dequantize(codes, scale) - weight).square().sum(-1)[~plain]
    excess = left - weight.square().sum(-1)[~plain]
    return [
        ulps("pathological scale", scale[plain], their_scale[plain]),
        exact("pathological codes", codes[plain], their_codes[plain]),
        Check("pathological rows against zeros", float(excess.max()), 1e-12),
    ]


def check_sdclip(z: Any) -> list[Check]:
    """The scale is k x the row's unbiased deviation over the largest code."""
    expected = 12.85 * z["sdclip/row_std_unbiased"].astype(np.float64) / 31
    scale = sdclip(12.85, 31).quantize(array(z, "sdclip/W"))[1]
    return [ulps("sdclip scale", scale, torch.from_numpy(expected).half())]


def check_gate(z: Any) -> list[Check]:
    """Where the scripts' scale underflows to zero all decodes to zero, and their codes are platform noise."""
    codes, scale = Grid(GridSection(bits=8, eps=1e-10)).quantize(array(z, "gate_int8/w"))
    their_scale = array(z, "gate_int8/scale")
    alive = their_scale != 0
    return [
        exact("gate scale", scale, their_scale),
        exact("gate codes", codes[alive], array(z, "gate_int8/q")[alive]),
    ]


def check_percentile(z: Any, name: str) -> list[Check]:
    grid = Grid(GridSection(bits=6, floor=1 / 31))
    codes, scale = percentile.quantize(array(z, f"percentile/in/{name}"), grid)
    return [
        exact(f"percentile scale {name}", scale, z[f"percentile/scale/{name}"]),
        exact(f"percentile codes {name}", codes, z[f"percentile/q/{name}"]),
    ]


def check_lqer(z: Any, prefix: str) -> list[Check]:
    """Both forms from the stored factors; the group is what the number of scales says."""
    a, b = array(z, f"{prefix}/asym/A"), array(z, f"{prefix}/asym/B")
    left, right = lqer.packed("w", a, b, b.numel() // z[f"{prefix}/asym/sB"].size)
    checks = [
        exact(f"{prefix} asym qA", left.values.reshape(a.shape), z[f"{prefix}/asym/qA"]),
        exact(f"{prefix} asym sA", left.scale, z[f"{prefix}/asym/sA"]),
        exact(f"{prefix} asym qB", right.values.reshape(b.shape), z[f"{prefix}/asym/qB"]),
        exact(f"{prefix} asym sB", right.scale, z[f"{prefix}/asym/sB"]),
    ]
    for name, factor in (("A", a), ("B", b)):
        codes, scale = Grid(GridSection(bits=4)).quantize(factor)
        checks.append(exact(f"{prefix} sym4 q{name}", codes, z[f"{prefix}/sym4/q{name}"]))
        checks.append(exact(f"{prefix} sym4 s{name}", scale, z[f"{prefix}/sym4/s{name}"]))
    return checks


def check_similarity(z: Any) -> list[Check]:
    return [exact("order of rows", similarity_order(z["similarity_sort/matrix"]), z["similarity_sort/order"])]


def check_shuffle(z: Any, prefix: str) -> list[Check]:
    stride = int(prefix.rpartition("/stride")[2])
    plain, theirs = z[f"{prefix}/in"].tobytes(), z[f"{prefix}/out"].tobytes()
    ours = byte_shuffle(plain, stride)
    back = byte_unshuffle(theirs, len(plain), stride)
    return [Check(prefix, float(ours != theirs), 0.0), Check(f"{prefix} back", float(back != plain), 0.0)]


def check_streams(z: Any) -> list[Check]:
    streams, theirs = [b"", b"abc", bytes(range(10))], z["pack_streams/out"].tobytes()
    return [
        Check("streams", float(join_streams(streams) != theirs), 0.0),
        Check("streams back", float(split_streams(theirs) != streams), 0.0),
    ]
