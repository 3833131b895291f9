"""How the later records store their tensors, as rules of ours, from the settings that a fixture carries."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from paramgolf.pack.stored import TensorSpec
from paramgolf.recipe.sections import GridSection, QuantSection, RuleSection

THRESHOLD = 65_536  # elements: what is not larger is kept in half precision
GATE_RULE = {"match": "*attn_gate*", "ndim": 2, "min_size": 32, "max_size": 8192}
_LAYER = re.compile(r"^blocks\.(\d+)\.")


def quant_of(hyper: Mapping[str, Any]) -> QuantSection:
    """The section of a script: bits and clips of embedding, MLP and attention, and what comes before them."""
    bits, k = hyper.get("matrix_bits", 6), hyper.get("matrix_clip_sigmas", 0.0)
    grids = {
        "gate": GridSection(bits=8, eps=1e-10),
        "embed": GridSection(bits=hyper["embed_bits"], clip="sdclip", clip_value=hyper["embed_clip_sigmas"]),
        "mlp": GridSection(bits=bits, clip="sdclip", clip_value=hyper.get("mlp_clip_sigmas", k)),
        "attn": GridSection(bits=bits, clip="sdclip", clip_value=hyper.get("attn_clip_sigmas", k)),
    }
    rules = [
        RuleSection(max_size=hyper.get("threshold_elements", THRESHOLD), store="float16"),
        RuleSection(match="tok_emb.weight|lm_head.weight", store="embed"),
        RuleSection(match="*.mlp.*", store="mlp"),
        RuleSection(store="attn"),
    ]
    if hyper.get("gated_attn_quant_gate") and not hyper.get("attn_out_gate_enabled"):  # of that gate it is not
        rules.insert(0, RuleSection(**GATE_RULE, store="gate"))
    return QuantSection(
        method="gptq",
        grids=grids,
        rules=tuple(rules),
        lqer_tensors=hyper["lqer_top_k"] if hyper.get("lqer_enabled") else 0,
        lqer_rank=hyper.get("lqer_rank", 4),
        lqer_group=hyper.get("lqer_asym_group", 64),
    )


def class_of(spec: TensorSpec, corrected: bool = False) -> str:
    """The scripts' word for how a tensor is stored."""
    if not spec.bits:
        return f"passthrough ({spec.store})"
    if spec.store == "gate":
        return "gate_int8_row"
    return f"gptq (int{spec.bits})" + ("+lqer_asym" if corrected else "")


def by_layer(names: list[str]) -> list[str]:
    """Names in order of their layers."""
    return sorted(names, key=lambda name: int(found[1]) if (found := _LAYER.match(name)) else -1)
