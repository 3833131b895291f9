"""The reference systems in our terms: recipes with the sizes of a fixture, and the grids as the scripts had them.

The shipped recipes train and export on one grid; the original scripts did not, so their grids are written out here.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from paramgolf.model.gpt import GPT
from paramgolf.quant.grid import Grid
from paramgolf.recipe.load import load_recipe
from paramgolf.recipe.sections import GridSection, ModelSection, Recipe

PERCENTILE = 0.9999984
INT8 = GridSection(bits=8, clip="quantile", clip_value=PERCENTILE, floor=1 / 127, round_scale_first=False)
INT6_FULL = GridSection(bits=6, low_code="full")

# Matrices at export.
EXPORT_GRIDS: dict[str, dict[str, GridSection]] = {
    "baseline": {"int8": INT8},
    "pr128": {"int8": INT8, "int6": replace(INT6_FULL, floor=1 / 31)},
    "pr114": {"int8": INT8, "int6": replace(INT8, bits=6, floor=1 / 31)},
    "pr107": {"int8": INT8, "int6": GridSection(bits=6, eps=1e-12), "int8_group16": INT8},
    "pr137": {
        "int8": GridSection(bits=8, clip="search", eps=1 / 127, round_scale_first=False),
        "int6": replace(INT6_FULL, eps=1e-8),
    },
}
# Vectors and scalars at export: one scale, kept in float32 and without a floor, except for PR 128's int6.
INT8_VECTOR = replace(INT8, floor=0.0, scale_dtype="float32")
VECTOR_GRIDS: dict[str, dict[str, GridSection]] = {
    "baseline": {"int8": INT8_VECTOR},
    "pr128": {"int8": INT8_VECTOR, "int6": INT6_FULL},
    "pr114": {"int8": INT8_VECTOR, "int6": replace(INT8_VECTOR, bits=6)},
    "pr107": {"int8": INT8_VECTOR},
    "pr137": {"int8": INT8_VECTOR},
}
# Fake quantisation while training: float32 scales.
TRAINING = GridSection(bits=6, scale_dtype="float32", eps=1e-8)
QAT_GRIDS: dict[str, GridSection] = {
    "pr128": replace(TRAINING, clip="quantile", clip_value=PERCENTILE),
    "pr107": GridSection(bits=8, scale_dtype="float32", floor=1 / 127),
    "pr137": replace(TRAINING, low_code="full"),
}
POST_QAT_GRIDS = {"pr107": GridSection(bits=8, scale_dtype="float32", eps=1e-12)}


def system_of(path: Path, z: Any) -> str:
    """The reference system a fixture belongs to: its configuration's word, else the last part of the file name."""
    if "config_json" in z.files:
        return str(json.loads(str(z["config_json"]))["system"])
    return path.stem.split("_")[-1]


def recipe_of(system: str) -> Recipe:
    """Our recipe for a fixture's system; the fixtures' pr137 is the committed script."""
    return load_recipe("pr137-script" if system == "pr137" else system)


def model_section(system: str, z: Any, *, tied: bool = True) -> ModelSection:
    """The system's model with the fixture's sizes and constants."""
    config = json.loads(str(z["config_json"]))
    section = replace(
        recipe_of(system).model,
        dim=config["model_dim"],
        num_layers=config["num_layers"],
        num_heads=config["num_heads"],
        num_kv_heads=config["num_kv_heads"],
        mlp_hidden=config["mlp_hidden"],
        rope_base=config["rope_base"],
        logit_softcap=config["logit_softcap"],
        qk_gain=config["qk_gain_init"],
        tie_embeddings=tied,
    )
    if "w/bigram.embed.weight" in z.files:
        buckets, dim = z["w/bigram.embed.weight"].shape
        sized = section.parts | {"bigram_hash": section.parts["bigram_hash"] | {"buckets": buckets, "dim": dim}}
        section = replace(section, parts=sized)
    return section


def load_model(z: Any, *, tied: bool = True) -> GPT:
    """The fixture's model with the fixture's weights, in training mode with the system's own fake quantisation."""
    config = json.loads(str(z["config_json"]))
    model = GPT(model_section(config["system"], z, tied=tied), config["vocab_size"])
    state = {key.removeprefix("w/"): torch.from_numpy(z[key].copy()) for key in z.files if key.startswith("w/")}
    if tied:
        state.pop("lm_head.weight", None)
    model.load_state_dict(state, strict=True)
    qat = QAT_GRIDS.get(config["system"])
    model.set_qat(Grid(qat) if qat else None)
    return model
