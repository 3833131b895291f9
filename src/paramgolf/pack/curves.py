"""What groups of tensors cost in bytes and in loss over bits and clips: the curves that the solver chooses from.

Under an entropy coder the step of a grid (k row deviations over the largest code) is the continuous knob: a coarser
step is fewer bytes and more error; the bits only say where the codes end. For each group (a role and its store) some
(bits, k) are measured on evenly spaced rows: the zero-order entropy of the codes, and the error of the layer outputs,
tr(E H E^T). What a unit of error costs in loss is measured as well: the group alone is quantised coarsely and the loss
on training text is read. Kept are the pairs that no other beats in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from paramgolf.errors import GolfError
from paramgolf.model.names import is_control
from paramgolf.pack.codecs.base import role
from paramgolf.pack.ledger import entropy_bits
from paramgolf.quant.export import export, restore
from paramgolf.quant.gptq import weighted_error
from paramgolf.quant.grid import Grid
from paramgolf.quant.plan import plan, rules_of
from paramgolf.recipe.sections import GridSection, QuantSection, Recipe, RuleSection

LEAST_BITS, MOST_BITS = 2, 8
LEAST_K, MOST_K = 1.0, 64.0  # row deviations at which the codes end
COARSEST_STEP = 2.0  # row deviations a step, at the coarsest
FINEST_STEP = 5.0 / 127  # about the one that is chosen where bytes are no matter
PROBE_BITS = 6
PROBE_STEPS = (0.5, 1.0)  # row deviations: where the cost in loss is measured; the second if the first shows nothing
PROBE_LOSS = 1e-3  # nats that are more than nothing
LEAST_LOSS = 1e-5  # nats that a probed group is taken to cost at the least
WORTH = 65_536  # weights from which a matrix that a recipe keeps in floating point is worth a grid
_POINTS = 9  # of a curve for each number of bits; between them log k is interpolated
_DENSE = 1000
_ROWS = 128  # of each tensor that are measured

Loss = Callable[[Mapping[str, Tensor]], float]  # of a state dict, in nats on fixed text


# The grid of tensors that were on none the solver can move. A scale of 6 significant bits changes a step by 1 % at the
# most, which no loss shows, and codes to fewer bytes.
OPENED = GridSection(bits=PROBE_BITS, clip="sdclip", clip_value=12.0, scale_bits=5)


def fit_grid(base: GridSection, bits: int, k: float) -> GridSection:
    """`base` with other bits and its codes ending at k row deviations."""
    return replace(base, bits=bits, clip_value=k, packed=False)


def step_of(bits: int, k: float) -> float:
    """Row deviations between two codes."""
    return k / (2 ** (bits - 1) - 1)


def coarsest(base: GridSection) -> GridSection:
    """The grid with the fewest bytes that the solver may choose."""
    return fit_grid(base, LEAST_BITS, COARSEST_STEP)


def finest(base: GridSection) -> GridSection:
    """About the grid it chooses where bytes are no matter."""
    return fit_grid(base, MOST_BITS, FINEST_STEP / step_of(MOST_BITS, 1.0))


@dataclass(frozen=True)
class Group:
    """Tensors that share bits and k. The arrays are parallel: bytes rise and cost falls from one to the next."""

    name: str
    members: tuple[str, ...]
    base: GridSection
    weights: int
    bits: np.ndarray
    k: np.ndarray
    bytes: np.ndarray  # estimated from the entropy of the codes
    cost: np.ndarray  # predicted nats a token (without a measured loss: weighted squared error)

    def best(self, price: float) -> int:
        """Index with the least cost at `price` for a byte; the smaller one of equals."""
        return int(np.argmin(self.cost + price * self.bytes))

    def within(self, room: float) -> int:
        """Index of the largest that takes at most `room` bytes; 0 if none does."""
        return max(0, int(np.searchsorted(self.bytes, room, side="right")) - 1)


def fitted_groups(shapes: Mapping[str, tuple[int, ...]], recipe: Recipe) -> dict[str, tuple[GridSection, list[str]]]:
    """Tensors on a grid with clip = "sdclip", the only ones the solver may move: by role and store, grid and names.

    Raises GolfError when there are none.
    """
    groups: dict[str, tuple[GridSection, list[str]]] = {}
    for name, store in plan(shapes, recipe.quant, recipe.model.num_layers).items():
        if store.grid is not None and store.grid.clip == "sdclip":
            groups.setdefault(f"{role(name)} {store.name}", (store.grid, []))[1].append(name)
    if not groups:
        raise GolfError('pack.fit moves grids with clip = "sdclip" and there is none; set one, or pack.fit=false')
    return groups


def open_up(recipe: Recipe, shapes: Mapping[str, tuple[int, ...]]) -> Recipe:
    """The recipe with everything worth it given to the solver: what it puts on any grid, and large float matrices."""
    free = [
        name
        for name, store in plan(shapes, recipe.quant, recipe.model.num_layers).items()
        if (store.grid is not None and store.grid.clip != "sdclip")
        or (store.grid is None and len(shapes[name]) > 1 and math.prod(shapes[name]) >= WORTH and not is_control(name))
    ]
    if not free:
        return recipe
    grids = {**recipe.quant.grids, "open": OPENED}
    rules = (RuleSection(match="|".join(free), store="open"), *rules_of(recipe.quant))
    return replace(recipe, quant=replace(recipe.quant, grids=grids, rules=rules))


def solved_section(
    quant: QuantSection, chosen: Sequence[tuple[Sequence[str], GridSection, int, float]]
) -> QuantSection:  # fmt: skip
    """The section that stores each group (names, base, bits, k) on a grid of its bits; clips by tensor go beside it.

    Groups whose grids differ in k only share one.
    """
    kinds: dict[GridSection, list[int]] = {}
    for index, (_, base, bits, _) in enumerate(chosen):
        kinds.setdefault(fit_grid(base, bits, 1.0), []).append(index)
    grids, rules = dict(quant.grids), []
    for kind, members in kinds.items():
        store = f"fit{kind.bits}"
        while store in grids:
            store += "x"
        grids[store] = replace(kind, clip_value=round(float(np.median([chosen[i][3] for i in members])), 4))
        rules.append(RuleSection(match="|".join(name for i in members for name in chosen[i][0]), store=store))
    rules = (*rules, *rules_of(quant))
    return replace(quant, grids=grids, rules=rules, coarse_grid="", coarse_fraction=0.0)


@torch.no_grad()
def measure(
    state: Mapping[str, Tensor], recipe: Recipe, hessians: Mapping[str, Tensor], loss: Loss | None = None
) -> list[Group]:
    """The groups of a state dict with their curves.

    Args:
        hessians: second moments of layer inputs by tensor name; a tensor without one is weighed by its plain error.
        loss: without it, a unit of error costs the same in every group.
    """
    shapes = {name: tuple(t.shape) for name, t in state.items() if t.is_floating_point()}
    before = loss(state) if loss else 0.0
    groups = []
    for name, (base, members) in fitted_groups(shapes, recipe).items():
        samples = [_Sample.of(state[member], hessians.get(member)) for member in members]
        unit = _unit_cost(state, recipe, base, members, samples, hessians, loss, before) if loss else 1.0
        groups.append(_curves(name, base, members, samples, unit))
    return groups


@dataclass(frozen=True)
class _Sample:
    """Some rows of a tensor; what is summed over them counts `times`."""

    rows_RC: Tensor
    hessian: Tensor | None
    times: float

    @staticmethod
    def of(tensor: Tensor, hessian: Tensor | None) -> _Sample:
        rows = tensor.detach().float().reshape(-1, tensor.shape[-1] if tensor.ndim > 1 else max(1, tensor.numel()))
        picked = rows[:: max(1, rows.shape[0] // _ROWS)]
        return _Sample(picked, hessian if tensor.ndim == 2 else None, rows.shape[0] / max(1, picked.shape[0]))

    def measure(self, grid: Grid) -> tuple[float, float]:
        """(bits, weighted error) of the whole tensor by plain rounding."""
        codes, scale = grid.quantize(self.rows_RC)
        error = weighted_error(self.rows_RC, grid.dequantize(codes, scale), self.hessian)
        return self.times * entropy_bits(codes.cpu().numpy()), self.times * error

    def peak(self) -> float:
        """Largest magnitude in deviations of its row."""
        if self.rows_RC.shape[-1] < 2:
            return LEAST_K
        std = self.rows_RC.std(-1)
        ratio = torch.where(std > 0, self.rows_RC.abs().amax(-1) / std.clamp_min(1e-30), 0.0)
        return float(ratio.max()) if ratio.numel() else LEAST_K


def _curves(
    name: str, base: GridSection, members: Sequence[str], samples: Sequence[_Sample], unit_cost: float
) -> Group:  # fmt: skip
    peak = min(MOST_K, max(2 * LEAST_K, max(sample.peak() for sample in samples)))
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    for bits in range(LEAST_BITS, MOST_BITS + 1):
        # Beyond the peak a larger k is a coarser step only, and from twice the peak on fewer bits do that as well.
        last = min(COARSEST_STEP / step_of(bits, 1.0), 2.4 * peak)
        ks = np.geomspace(LEAST_K, last, _POINTS)
        sizes, errors = np.zeros(_POINTS), np.zeros(_POINTS)
        for index, k in enumerate(ks):
            grid = Grid(fit_grid(base, bits, float(k)))
            for sample in samples:
                size, error = sample.measure(grid)
                sizes[index] += size / 8
                errors[index] += error
        dense = np.geomspace(LEAST_K, last, _DENSE)
        between = np.interp(np.log(dense), np.log(ks), np.log(np.maximum(errors, 1e-30)))
        found.append((np.full(_DENSE, bits), dense, np.interp(np.log(dense), np.log(ks), sizes), np.exp(between)))
    bits_all, k_all, bytes_all, errors_all = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((errors_all, bytes_all))
    least = np.minimum.accumulate(errors_all[order])
    kept = order[np.concatenate([[True], least[1:] < least[:-1]])]
    weights = round(sum(sample.times * sample.rows_RC.numel() for sample in samples))
    cost = unit_cost * errors_all[kept]
    return Group(name, tuple(members), base, weights, bits_all[kept], k_all[kept], bytes_all[kept], cost)


def _unit_cost(
    state: Mapping[str, Tensor], recipe: Recipe, base: GridSection, members: Sequence[str],
    samples: Sequence[_Sample], hessians: Mapping[str, Tensor], loss: Loss, before: float,
) -> float:  # fmt: skip
    """Nats that a unit of plain rounding's weighted error costs when the group is quantised as the recipe does it.

    A quantiser that makes up for errors lowers this, not the error itself. Never below a small positive number.
    """
    part = {name: state[name] for name in members}
    increase = error = 0.0
    for step in PROBE_STEPS:
        k = step / step_of(PROBE_BITS, 1.0)
        section = solved_section(recipe.quant, [(members, base, PROBE_BITS, k)])
        clips = dict.fromkeys(members, k)
        quantised = restore(export(part, section, recipe.model.num_layers, hessians, clips=clips))
        increase = loss({**state, **quantised}) - before
        error = sum(sample.measure(Grid(fit_grid(base, PROBE_BITS, k)))[1] for sample in samples)
        if increase >= PROBE_LOSS:
            break
    return max(increase, LEAST_LOSS) / max(error, 1e-30)
