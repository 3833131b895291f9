"""What follows training takes time too: seconds that a run which counts packing keeps of its budget."""

from __future__ import annotations

import torch

from paramgolf.pack.forecast import plan_bytes
from paramgolf.quant.hessian import seconds_for
from paramgolf.quant.registry import calibrated
from paramgolf.recipe.sections import Recipe

# Seconds to quantise and code a million weights, on one slow core, with room to spare. `auto` tries every codec in both
# orientations, on a sample where the model is large.
PACK_SECONDS = {"raw": 0.2, "rans": 0.8, "zlib": 3.0, "lzma": 5.0, "zstd": 5.0, "brotli": 8.0, "auto": 40.0}
FIT_FACTOR = 5.0  # of those seconds, for a solver's several encodes
FIT_READS = 3.0  # nine forwards, each a third of the work of calibrating on the same text


def calibrates(recipe: Recipe) -> bool:
    """Whether a run of this recipe collects second moments before it packs."""
    return calibrated(recipe.quant) or recipe.pack.fit


def packing_seconds(recipe: Recipe, vocab_size: int, device: torch.device, world: int = 1) -> float:
    """An upper guess of what calibrating, quantising and coding will take."""
    params = plan_bytes(recipe, vocab_size).params
    seconds = 1.0 + PACK_SECONDS.get(recipe.pack.codec, PACK_SECONDS["auto"]) * params / 1e6
    tokens = recipe.quant.calibration_tokens / world
    if recipe.pack.fit:  # the solver quantises and codes several times, and reads text for each group
        seconds *= FIT_FACTOR
        tokens += FIT_READS * recipe.pack.fit_tokens
    if calibrates(recipe):
        seconds += seconds_for(params, tokens, device)
    return seconds
