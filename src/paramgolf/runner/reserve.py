"""What follows training takes time too: seconds that a run which counts packing keeps of its budget."""

from __future__ import annotations

import torch

from paramgolf.pack.forecast import plan_bytes
from paramgolf.quant.hessian import COLUMN_SECONDS, seconds_for
from paramgolf.quant.registry import calibrated
from paramgolf.recipe.sections import Recipe

# Seconds to code a million weights and to round them by rows, on one slow core, with room to spare. `auto` tries every
# codec in both orientations, on a sample where the model is large.
PACK_SECONDS = {"raw": 0.2, "rans": 0.8, "zlib": 3.0, "lzma": 5.0, "zstd": 5.0, "brotli": 8.0, "auto": 40.0}
FIT_ENCODES = 3  # real encodes of a search
FIT_ROUNDINGS = 2 + FIT_ENCODES  # of the whole model: group by group for two probes each, and for every encode
FIT_READS = 6.0  # eighteen forwards, each a third of the work of calibrating on the same text
CURVE_SECONDS = 3.0  # a million weights, of which some rows are rounded to dozens of grids


def calibrates(recipe: Recipe) -> bool:
    """Whether a run of this recipe collects second moments before it packs."""
    return calibrated(recipe.quant) or recipe.pack.fit


def packing_seconds(recipe: Recipe, vocab_size: int, device: torch.device, world: int = 1) -> float:
    """An upper guess of what calibrating, quantising and coding will take."""
    params = plan_bytes(recipe, vocab_size).params
    codec = recipe.pack.codec
    seconds = 1.0 + PACK_SECONDS.get(codec, PACK_SECONDS["auto"]) * params / 1e6
    tokens = recipe.quant.calibration_tokens / world
    if recipe.pack.fit:
        searched = PACK_SECONDS.get("rans" if codec == "auto" else codec, PACK_SECONDS["auto"])
        seconds += (FIT_ENCODES * searched + CURVE_SECONDS) * params / 1e6
        seconds += (FIT_ROUNDINGS - 1) * COLUMN_SECONDS * params if calibrated(recipe.quant) else 0.0
        tokens += FIT_READS * recipe.pack.fit_tokens
    if calibrates(recipe):
        seconds += seconds_for(params, tokens, device)
    return seconds
