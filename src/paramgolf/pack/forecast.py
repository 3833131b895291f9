"""Artifact sizes before there is an artifact: from the recipe alone (`plan_bytes`) and from weights in training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

from paramgolf.errors import GolfError
from paramgolf.model.gpt import GPT
from paramgolf.pack.codecs.base import role
from paramgolf.pack.container import Artifact, encode_artifact
from paramgolf.pack.curves import COARSEST_STEP, FINEST_STEP, NOTHING_TO_FIT, coarsest, finest, fit_grid, step_of
from paramgolf.pack.ledger import group_of
from paramgolf.pack.solver import AIM, LOWEST
from paramgolf.pack.stored import TensorSpec, payload_bytes
from paramgolf.quant.export import export
from paramgolf.quant.grid import Grid
from paramgolf.quant.lqer import correction_bytes
from paramgolf.quant.plan import Store, plan, tensor_table
from paramgolf.recipe.sections import GridSection, Recipe

# Coded size over zero-order entropy, measured on Gaussian rows; heavier tails make it 2 % less with rans and up to 8 %
# more with the byte coders.
OVER_ENTROPY = {"rans": 0.995, "auto": 0.995, "brotli": 1.007, "zstd": 1.01, "lzma": 1.03, "zlib": 1.05}
_SCALE_RATIO, _KEPT_RATIO = 0.75, 0.84  # coded over plain size: sign and exponent bits mostly go, mantissas stay
_FIXED = 250  # manifest and container
_SAMPLE_ROWS = 24  # of each matrix
# Codes that are really coded for a forecast: about half a second each.
_CODED = {"rans": 1 << 21, "auto": 1 << 21, "raw": 1 << 21, "zlib": 1 << 20}
_CODED_SLOWLY = 1 << 18


@dataclass(frozen=True)
class Sizes:
    """Bytes of one part of the file: at the least, expected, at the most."""

    low: float = 0.0
    typical: float = 0.0
    high: float = 0.0

    def __add__(self, other: Sizes) -> Sizes:
        return Sizes(self.low + other.low, self.typical + other.typical, self.high + other.high)


@dataclass(frozen=True)
class SizePlan:
    """Sizes a recipe will give, in bytes.

    `typical` assumes Gaussian rows, `high` weights without any structure; `low` is what trained weights have never gone
    below: heavier tails than a Gaussian's leave fewer bits inside a clip at the maximum, and an absolute floor of the
    scale leaves fewer the smaller the weights are. With `pack.fit` all three lie at the cap, where it can be filled.
    """

    params: int
    payload_bytes: int  # uncompressed tensors
    least_bytes: int  # what the cap counts, whatever the solver or training does
    low_bytes: int  # what the cap counts, at the least
    typical_bytes: int  # what the cap counts, expected
    high_bytes: int  # what the cap counts, at the most
    cap_bytes: int
    groups: dict[str, Sizes]  # by the groups of the ledger; they sum to what the cap counts
    specs: tuple[TensorSpec, ...]

    @property
    def fits(self) -> bool:
        """False when there is no hope to stay within the cap (True without one): ground to refuse before training."""
        return not self.cap_bytes or self.least_bytes <= self.cap_bytes


def plan_bytes(recipe: Recipe, vocab_size: int, *, tokenizer_bytes: int = 0, code_bytes: int = 0) -> SizePlan:
    """Sizes before training; nothing is allocated. The model is built without memory to learn its tensors.

    Raises GolfError for `pack.fit` without a grid that it may move.
    """
    with torch.device("meta"):
        state = GPT(recipe.model, vocab_size).state_dict()
    shapes = {name: tuple(t.shape) for name, t in state.items()}
    kept = [(n, str(t.dtype).removeprefix("torch.")) for n, t in state.items() if not t.is_floating_point()]
    specs = tensor_table(shapes, recipe.quant, recipe.model.num_layers, kept)
    moved = [s for s in specs if s.bits and recipe.pack.fit and recipe.quant.grids[s.store].clip == "sdclip"]
    if recipe.pack.fit and not moved:
        raise GolfError(NOTHING_TO_FIT)
    groups: dict[str, Sizes] = {}

    def add(group: str, sizes: Sizes) -> None:
        groups[group] = groups.get(group, Sizes()) + sizes

    for spec in specs:
        if spec.bits:
            add("scales", Sizes(*[_scale_bytes(spec) * share for share in (0.2, _SCALE_RATIO, 1.0)]))
        else:
            add(group_of(spec.name), Sizes(*[spec.nbytes * share for share in (0.6, _KEPT_RATIO, 1.0)]))
        if spec.bits and spec not in moved:
            add(group_of(spec.name), _grid_sizes(spec, recipe))
    for name, sizes in _correction_sizes(specs, recipe).items():
        add(group_of(name), sizes)
    add("manifest", Sizes(_FIXED / 2, _FIXED, 4 * _FIXED))
    beside = ("tokenizer", tokenizer_bytes) if recipe.pack.count == "file" else ("code", code_bytes)
    add(beside[0], Sizes(*[float(beside[1])] * 3))
    fixed = sum(groups.values(), Sizes())
    least = fixed.low + sum(_solved_bytes(spec, recipe, COARSEST_STEP) for spec in moved)
    for group, sizes in _solved_sizes(moved, recipe, fixed).items():
        add(group, sizes)
    total = sum(groups.values(), Sizes())
    return SizePlan(
        params=sum(spec.size for spec in specs),
        payload_bytes=payload_bytes(specs),
        least_bytes=round(least),
        low_bytes=round(total.low),
        typical_bytes=round(total.typical),
        high_bytes=round(total.high),
        cap_bytes=recipe.budget.bytes,
        groups=groups,
        specs=tuple(specs),
    )


def _correction_sizes(specs: Sequence[TensorSpec], recipe: Recipe) -> dict[str, Sizes]:
    """Bytes of the low-rank correction that a matrix may get: which are left with the largest errors only weights can
    tell, so each is expected with the same chance, and at the most it is the largest ones."""
    each = {spec.name: correction_bytes(spec.shape, recipe.quant) for spec in specs if spec.bits}
    each = {name: size for name, size in each.items() if size}
    count = min(recipe.quant.lqer_tensors, len(each))
    largest = sorted(each, key=lambda name: -each[name])[:count]
    expected = {name: size * count / len(each) for name, size in each.items()}
    return {n: Sizes(0.0, expected[n], size if n in largest else expected[n]) for n, size in each.items() if count}


def _grid_sizes(spec: TensorSpec, recipe: Recipe) -> Sizes:
    """Bytes of the codes of a tensor whose grid stays as the recipe has it."""
    grid, codec = Grid(recipe.quant.grids[spec.store]), recipe.pack.codec
    overhead = _overhead(recipe)
    most = 8 if codec == "raw" else math.log2(grid.qmax - grid.qmin + 1) * max(1.0, overhead)
    columns = spec.shape[-1] if spec.shape else 1
    bits = _coded_bits(gaussian_bits(grid.section, columns), spec, codec, overhead)
    least = 1.0 if codec == "raw" else _low_share(grid.section)
    return Sizes(spec.size * bits * least / 8, spec.size * bits / 8, spec.size * most / 8)


def _solved_bytes(spec: TensorSpec, recipe: Recipe, step: float) -> float:
    """Bytes of the codes of a tensor that the solver gives a step of so many row deviations; Gaussian rows."""
    bits = next((b for b in range(2, 8) if step * (2 ** (b - 1) - 1) >= 4.0), 8)
    grid = fit_grid(recipe.quant.grids[spec.store], bits, step / step_of(bits, 1.0))
    columns = spec.shape[-1] if spec.shape else 1
    return spec.size * gaussian_bits(grid, columns) * _overhead(recipe) / 8


def _solved_sizes(moved: Sequence[TensorSpec], recipe: Recipe, fixed: Sizes) -> dict[str, Sizes]:
    """Bytes by group of what the solver moves: at one step for all, the one at which the file fills its cap."""
    if not moved:
        return {}

    def total(step: float) -> float:
        return sum(_solved_bytes(spec, recipe, step) for spec in moved)

    room = AIM * recipe.budget.bytes - fixed.typical
    low, high = FINEST_STEP, COARSEST_STEP
    if room < total(low):
        for _ in range(40):
            step = math.sqrt(low * high)
            low, high = (low, step) if total(step) < room else (step, high)
    step = high if room < total(low) else low
    filled = LOWEST * recipe.budget.bytes <= fixed.typical + total(step) <= recipe.budget.bytes
    groups: dict[str, Sizes] = {}
    for spec in moved:
        size = _solved_bytes(spec, recipe, step)
        sizes = Sizes(size, size, size) if filled else Sizes(0.85 * size, size, 1.1 * size)
        groups[group_of(spec.name)] = groups.get(group_of(spec.name), Sizes()) + sizes
    if filled:  # what the kept tensors take more or less, the solver gives or takes
        largest = max(groups, key=lambda name: groups[name].typical)
        spare = Sizes(
            LOWEST / AIM * (fixed.typical + total(step)) - fixed.low - total(step), 0.0,
            recipe.budget.bytes - fixed.high - total(step),
        )  # fmt: skip
        groups[largest] = groups[largest] + spare
    return groups


@torch.no_grad()
def forecast(state: Mapping[str, Tensor], recipe: Recipe, *, tokenizer_bytes: int = 0, code_bytes: int = 0) -> int:
    """Predicted bytes that the cap will count, if these weights were packed now; within 2 %, in about half a second.

    A model of up to `_CODED` weights (two million with rans) is really rounded and coded. Of a larger one some rows of
    every matrix are rounded and their zero-order entropy is taken, one histogram a role; what the codec makes of an
    entropy is measured on whole matrices, as many as there is time for. With `pack.fit` the file is as large as its
    cap, where the grids allow that.
    """
    state = {name: torch.nan_to_num(t.detach()) if t.is_floating_point() else t for name, t in state.items()}
    rest = _FIXED + (tokenizer_bytes if recipe.pack.count == "file" else code_bytes)
    shapes = {name: tuple(t.shape) for name, t in state.items() if t.is_floating_point()}
    stores = plan(shapes, recipe.quant, recipe.model.num_layers)
    specs = [stores[name].spec(name, shape) for name, shape in shapes.items()]
    limit = _CODED.get(recipe.pack.codec, _CODED_SLOWLY)
    if not recipe.pack.fit and sum(s.size for s in specs if s.bits) <= limit:
        parts = _really_coded(state, recipe)
        return rest + parts["codes"] + parts["scales"] + parts["kept"]
    scales = sum(_scale_bytes(s) for s in specs if s.bits)
    kept = sum(s.nbytes for s in specs if not s.bits)
    kept += sum(t.numel() * t.element_size() for t in state.values() if not t.is_floating_point())
    rest += round(kept * _KEPT_RATIO)
    moved = [s for s in specs if s.bits and recipe.pack.fit and recipe.quant.grids[s.store].clip == "sdclip"]
    entropy = _entropy_bytes(state, [s for s in specs if s.bits and s not in moved], stores)
    if recipe.pack.fit:
        fixed = rest + scales * _SCALE_RATIO + entropy * _overhead(recipe)
        ends = [_on_grids(stores, moved, grid) for grid in (coarsest, finest)]
        low, high = (fixed + _entropy_bytes(state, moved, end) * _overhead(recipe) for end in ends)
        return round(min(max(AIM * recipe.budget.bytes, low), high))
    sample = _whole_matrices(specs, limit)
    parts = _really_coded({s.name: state[s.name] for s in sample}, recipe)
    rest += round(scales * parts["scales"] / max(1, sum(_scale_bytes(s) for s in sample)))
    if recipe.pack.codec == "raw":
        return rest + sum(s.nbytes - _scale_bytes(s) for s in specs if s.bits)
    return round(rest + entropy * parts["codes"] / max(1.0, _entropy_bytes(state, sample, stores)))


def _on_grids(
    stores: Mapping[str, Store], specs: Sequence[TensorSpec], grid: Callable[[GridSection], GridSection]
) -> dict[str, Store]:  # fmt: skip
    """Stores of these tensors with `grid` of their grids in place of the grids."""
    out = {}
    for spec in specs:
        base = stores[spec.name].grid
        assert base is not None
        out[spec.name] = replace(stores[spec.name], grid=grid(base))
    return out


def _really_coded(state: Mapping[str, Tensor], recipe: Recipe) -> dict[str, int]:
    """Bytes of the parts of a file with these tensors after plain rounding."""
    codec = "rans" if recipe.pack.codec == "auto" else recipe.pack.codec
    section = replace(recipe.quant, method="rtn", coarse_fraction=0.0, awq_columns=0)  # without Hessians
    tensors = export(state, section, recipe.model.num_layers)
    return encode_artifact(Artifact({}, tensors), codec, recipe.pack.level).parts


def _whole_matrices(specs: Sequence[TensorSpec], limit: int) -> list[TensorSpec]:
    """Tensors on a grid of every role in turn, evenly over the layers, as many as stay within `limit` codes; one at
    the least."""
    roles: dict[tuple[str, str], list[TensorSpec]] = {}
    for spec in specs:
        if spec.bits:
            roles.setdefault((role(spec.name), spec.store), []).append(spec)
    whole = sum(spec.size for spec in specs if spec.bits)
    picked = []
    for members in roles.values():
        count = max(1, int(len(members) * limit / whole))
        picked += [members[int((i + 0.5) * len(members) / count)] for i in range(count)]
    picked.sort(key=lambda spec: spec.size)
    sizes = list(itertools.accumulate(spec.size for spec in picked))
    return [spec for spec, size in zip(picked, sizes, strict=True) if size <= 1.5 * limit] or picked[:1]


def _entropy_bytes(state: Mapping[str, Tensor], specs: Sequence[TensorSpec], stores: Mapping[str, Store]) -> float:
    """Bytes of the zero-order entropy, one histogram for a role."""
    groups: dict[tuple[str, str, int], list[TensorSpec]] = {}
    for spec in specs:
        groups.setdefault((role(spec.name), spec.store, spec.shape[-1] if spec.shape else 1), []).append(spec)
    bits = 0.0
    for members in groups.values():
        entropy = _sampled_entropy([state[s.name] for s in members], stores[members[0].name])
        bits += sum(s.size for s in members) * entropy
    return bits / 8


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


def _scale_bytes(spec: TensorSpec) -> int:
    """Plain bytes of a quantised tensor's scales."""
    return math.prod(spec.scale_shape) * {"float16": 2, "float32": 4}[spec.scale_dtype]


def _sampled_entropy(tensors: Sequence[Tensor], store: Store) -> float:
    """Bits a code of these tensors (same grid and columns), from evenly spaced rows of each."""
    assert store.grid is not None
    picked = []
    for tensor in tensors:
        rows = tensor.detach().reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor.detach().reshape(1, -1)
        picked.append(rows[:: max(1, rows.shape[0] // _SAMPLE_ROWS)])
    codes, _ = Grid(store.grid).quantize(torch.cat(picked).float())
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
