"""Artifact sizes before there is an artifact: from the recipe alone (`plan_bytes`) and from weights in training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

from paramgolf.model.gpt import GPT
from paramgolf.pack.codecs.base import role
from paramgolf.pack.solver import k_range
from paramgolf.pack.stored import TensorSpec, payload_bytes
from paramgolf.quant.grid import Grid
from paramgolf.quant.plan import Store, plan, tensor_table
from paramgolf.recipe.sections import GridSection, Recipe

# Coded size over zero-order entropy, measured on trained-like weights; the other codecs lie within some percent.
OVER_ENTROPY = {"rans": 0.99, "auto": 0.99, "brotli": 1.005, "zstd": 1.03, "lzma": 1.03, "zlib": 1.09}
_SCALE_RATIO, _KEPT_RATIO = 0.75, 0.84  # coded over plain size: sign and exponent bits mostly go, mantissas stay
_FIXED = 250  # manifest and container
_SAMPLE_ROWS = 24  # of each matrix


@dataclass(frozen=True)
class SizePlan:
    """Sizes a recipe will give, in bytes. `typical` assumes Gaussian rows, `high` weights without any structure.

    `low` is what trained weights have never gone below: heavier tails than a Gaussian's leave fewer bits inside a clip
    at the maximum, and an absolute floor of the scale leaves fewer the smaller the weights are.
    """

    params: int
    payload_bytes: int  # uncompressed tensors
    low_bytes: int  # what the cap counts, at the least
    typical_bytes: int  # what the cap counts, expected
    high_bytes: int  # what the cap counts, at the most
    cap_bytes: int
    specs: tuple[TensorSpec, ...]

    @property
    def fits(self) -> bool:
        """False when there is no hope to stay within the cap (True without one): ground to refuse before training."""
        return not self.cap_bytes or self.low_bytes <= self.cap_bytes


def plan_bytes(recipe: Recipe, vocab_size: int, *, tokenizer_bytes: int = 0, code_bytes: int = 0) -> SizePlan:
    """Sizes before training; nothing is allocated. The model is built without memory to learn its tensors."""
    with torch.device("meta"):
        state = GPT(recipe.model, vocab_size).state_dict()
    shapes = {name: tuple(t.shape) for name, t in state.items()}
    kept = [(n, str(t.dtype).removeprefix("torch.")) for n, t in state.items() if not t.is_floating_point()]
    specs = tensor_table(shapes, recipe.quant, recipe.model.num_layers, kept)
    grids = {name: Grid(grid) for name, grid in recipe.quant.grids.items()}
    overhead = _overhead(recipe)
    low = typical = high = 0.0
    for spec in specs:
        if not spec.bits:
            continue
        grid = grids[spec.store]
        high += spec.size * (8 if recipe.pack.codec == "raw" else math.log2(grid.qmax - grid.qmin + 1))
        columns = spec.shape[-1] if spec.shape else 1
        bits = spec.size * _coded_bits(gaussian_bits(grid.section, columns), spec, recipe.pack.codec, overhead)
        typical += bits
        least = 1.0 if recipe.pack.codec == "raw" else _low_share(grid.section)
        if recipe.pack.fit and grid.section.clip == "sdclip":  # the solver may choose any clip
            coarsest = replace(grid.section, clip_value=k_range(grid.section)[1])
            bits = spec.size * _coded_bits(gaussian_bits(coarsest, columns), spec, recipe.pack.codec, overhead)
        low += bits * least
    scales, kept_bytes = _side_bytes(specs)
    side = scales * _SCALE_RATIO + kept_bytes * _KEPT_RATIO
    rest = _FIXED + (tokenizer_bytes if recipe.pack.count == "file" else code_bytes)
    return SizePlan(
        params=sum(spec.size for spec in specs),
        payload_bytes=payload_bytes(specs),
        low_bytes=round(low / 8 + side) + rest,
        typical_bytes=round(typical / 8 + side) + rest,
        high_bytes=round(high / 8 * max(1.0, overhead)) + scales + kept_bytes + rest,
        cap_bytes=recipe.budget.bytes,
        specs=tuple(specs),
    )


@torch.no_grad()
def forecast(state: Mapping[str, Tensor], recipe: Recipe, *, tokenizer_bytes: int = 0, code_bytes: int = 0) -> int:
    """Predicted bytes that the cap will count, if these weights were packed now; within about 2 %, in milliseconds.

    Some rows of every matrix are quantised as the export would and their zero-order entropy is taken, one histogram a
    role; scales and kept tensors count at the ratio they usually code to.
    """
    floats = {name: tuple(t.shape) for name, t in state.items() if t.is_floating_point()}
    stores = plan(floats, recipe.quant, recipe.model.num_layers)
    specs = [stores[name].spec(name, shape) for name, shape in floats.items()]
    overhead = _overhead(recipe)
    groups: dict[tuple[str, str, int], list[TensorSpec]] = {}
    for spec in specs:
        if spec.bits:
            groups.setdefault((role(spec.name), spec.store, spec.shape[-1] if spec.shape else 1), []).append(spec)
    bits = 0.0
    for members in groups.values():
        entropy = _sampled_entropy([state[s.name] for s in members], stores[members[0].name])
        bits += sum(s.size * _coded_bits(entropy, s, recipe.pack.codec, overhead) for s in members)
    scales, kept = _side_bytes(specs)
    kept += sum(t.numel() * t.element_size() for t in state.values() if not t.is_floating_point())
    rest = _FIXED + (tokenizer_bytes if recipe.pack.count == "file" else code_bytes)
    return round(bits / 8 + scales * _SCALE_RATIO + kept * _KEPT_RATIO) + rest


def _low_share(grid: GridSection) -> float:
    """Part of the Gaussian bits that trained weights take at the least; a clip at k deviations fixes the bits."""
    if grid.floor:
        return 0.4
    return 0.93 if grid.clip == "sdclip" else 0.8


def _overhead(recipe: Recipe) -> float:
    return OVER_ENTROPY.get(recipe.pack.codec, 1.0)


def _coded_bits(entropy: float, spec: TensorSpec, codec: str, overhead: float) -> float:
    """Bits one code will take: the byte coders find little in packed codes, raw is one byte a code."""
    if codec == "raw":
        return 6.0 if spec.packed else 8.0
    if spec.packed and codec not in ("auto", "rans"):
        return min(6.0, entropy * 1.08)
    return entropy * overhead


def _side_bytes(specs: Sequence[TensorSpec]) -> tuple[int, int]:
    """Plain bytes of all scales, and of all tensors kept unquantised."""
    scale = {"float16": 2, "float32": 4}
    scales = sum(math.prod(s.scale_shape) * scale[s.scale_dtype] for s in specs if s.bits)
    return scales, sum(s.nbytes for s in specs if not s.bits)


def _sampled_entropy(tensors: Sequence[Tensor], store: Store) -> float:
    """Bits a code of these tensors (same grid and columns), from evenly spaced rows of each."""
    assert store.grid is not None
    picked = []
    for tensor in tensors:
        rows = tensor.detach().reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor.detach().reshape(1, -1)
        picked.append(rows[:: max(1, rows.shape[0] // _SAMPLE_ROWS)])
    codes, _ = Grid(store.grid).quantize(torch.nan_to_num(torch.cat(picked).float()))
    counts = torch.bincount((codes.reshape(-1).int() + 128), minlength=256).cpu().double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log2()).sum())


@lru_cache(maxsize=256)
def gaussian_bits(grid: GridSection, columns: int) -> float:
    """Entropy in bits of one code of a Gaussian row of that length on the grid.

    An absolute floor of the scale, which can only coarsen the grid, is not known to apply and is left out.
    """
    normal = NormalDist()
    peak = normal.inv_cdf(1 - 0.28 / max(columns, 2))  # median of the largest magnitude, in standard deviations
    clip = {"sdclip": grid.clip_value, "search": 0.95 * peak}.get(grid.clip, peak)
    qmax = 2 ** (grid.bits - 1) - 1
    step = clip / qmax
    edges = [0.0, *(normal.cdf((code + 0.5) * step) for code in range(-qmax, qmax)), 1.0]
    shares = [high - low for low, high in itertools.pairwise(edges) if high > low]
    return -sum(share * math.log2(share) for share in shares)
