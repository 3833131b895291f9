"""What groups of tensors cost in bytes and in loss over bits and clips: the curves that the solver chooses from.

Under an entropy coder the step of a grid (k row deviations over the largest code) is the continuous knob: a coarser
step is fewer bytes and more error; the bits only say where the codes end. For each group (a role and its store) some
(bits, k) are measured on evenly spaced rows: the zero-order entropy of the codes, and the error of the layer outputs,
tr(E H E^T). What a unit of error costs in loss is measured as well: the group alone is quantised coarsely, then as a
first plan would, and the loss on training text is read. Kept are the pairs that no other beats in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

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
WORTH = 4096  # weights from which a matrix that a recipe keeps in floating point is worth a grid
_POINTS = 9  # of a curve for each number of bits; between them log k is interpolated
_DENSE = 1000
_ROWS = 128  # of each tensor that are measured

Loss = Callable[[Mapping[str, Tensor]], float]  # of a state dict, in nats on fixed text


# A scale of 6 significant bits changes a step by 1 % at the most, which no loss shows, and codes to fewer bytes.
SCALE_BITS = 5
# The grid of tensors that were on none the solver can move.
OPENED = GridSection(bits=PROBE_BITS, clip="sdclip", clip_value=12.0, scale_bits=SCALE_BITS)


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


NOTHING_TO_FIT = 'pack.fit moves grids with clip = "sdclip" and no matrix is on one; set one, or pack.fit=false'


def fitted_groups(shapes: Mapping[str, tuple[int, ...]], recipe: Recipe) -> dict[str, tuple[GridSection, list[str]]]:
    """Tensors on a grid with clip = "sdclip", the only ones the solver may move: by role and store, grid and names.

    Raises GolfError when there are none.
    """
    groups: dict[str, tuple[GridSection, list[str]]] = {}
    for name, store in plan(shapes, recipe.quant, recipe.model.num_layers).items():
        if store.grid is not None and store.grid.clip == "sdclip":
            groups.setdefault(f"{role(name)} {store.name}", (store.grid, []))[1].append(name)
    if not groups:
        raise GolfError(NOTHING_TO_FIT)
    return groups


def open_up(recipe: Recipe, shapes: Mapping[str, tuple[int, ...]]) -> Recipe:
    """The recipe with everything worth it given to the solver: what it puts on any grid, and large float matrices;
    with scales of few bits."""
    free = [
        name
        for name, store in plan(shapes, recipe.quant, recipe.model.num_layers).items()
        if (store.grid is not None and store.grid.clip != "sdclip")
        or (store.grid is None and len(shapes[name]) > 1 and math.prod(shapes[name]) >= WORTH and not is_control(name))
    ]
    grids = {
        name: replace(grid, scale_bits=min(grid.scale_bits, SCALE_BITS))
        if grid.clip == "sdclip" and grid.scale_dtype == "float16"
        else grid
        for name, grid in recipe.quant.grids.items()
    }
    rules = rules_of(recipe.quant)
    if free:
        grids["open"] = OPENED
        rules = (RuleSection(match="|".join(free), store="open"), *rules)
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
    grids = dict(quant.grids)
    first: list[RuleSection] = []
    for kind, members in kinds.items():
        store = f"fit{kind.bits}"
        while store in grids:
            store += "x"
        grids[store] = replace(kind, clip_value=round(float(np.median([chosen[i][3] for i in members])), 4))
        first.append(RuleSection(match="|".join(name for i in members for name in chosen[i][0]), store=store))
    return replace(quant, grids=grids, rules=(*first, *rules_of(quant)), coarse_grid="", coarse_fraction=0.0)


class Curves:
    """The groups of a state dict with their curves, and what it takes to measure them again elsewhere.

    Args:
        hessians: second moments of layer inputs by tensor name; a tensor without one is weighed by its plain error.
        loss: without it, a unit of error costs the same in every group.
    """

    @torch.no_grad()
    def __init__(
        self, state: Mapping[str, Tensor], recipe: Recipe, hessians: Mapping[str, Tensor], loss: Loss | None = None
    ) -> None:
        self.state, self.recipe, self.hessians, self.loss = state, recipe, hessians, loss
        for name, tensor in state.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise GolfError(f"tensor {name}: non-finite values; the weights diverged: lower the rates")
        self.before = loss(state) if loss else 0.0
        shapes = {name: tuple(t.shape) for name, t in state.items() if t.is_floating_point()}
        self._measured = [
            _Measured.of(name, base, members, [_Sample.of(state[m], hessians.get(m)) for m in members])
            for name, (base, members) in fitted_groups(shapes, recipe).items()
        ]
        if loss:
            for measured in self._measured:
                for step in PROBE_STEPS:
                    if self._probe(measured, PROBE_BITS, step / step_of(PROBE_BITS, 1.0)) >= PROBE_LOSS:
                        break

    @property
    def groups(self) -> list[Group]:
        return [measured.group() for measured in self._measured]

    @torch.no_grad()
    def refine(self, chosen: Sequence[tuple[int, float]]) -> None:
        """Measure what each group costs on the (bits, k) that it would get: a unit of a large error costs another loss
        than one of a small error."""
        if self.loss:
            for measured, (bits, k) in zip(self._measured, chosen, strict=True):
                self._probe(measured, bits, k)

    def _probe(self, measured: _Measured, bits: int, k: float) -> float:
        """Nats that the group alone costs when it is quantised so, as the recipe does it; remembered if telling."""
        assert self.loss is not None
        part = {name: self.state[name] for name in measured.members}
        section = solved_section(self.recipe.quant, [(measured.members, measured.base, bits, k)])
        section = replace(section, lqer_tensors=0, awq_columns=0)  # the whole model gets so many, not each group
        clips = dict.fromkeys(measured.members, k)
        quantised = restore(export(part, section, self.recipe.model.num_layers, self.hessians, clips=clips))
        increase = self.loss({**self.state, **quantised}) - self.before
        grid = Grid(fit_grid(measured.base, bits, k))
        error = sum(sample.measure(grid)[1] for sample in measured.samples)
        if error > 0 and (increase >= PROBE_LOSS or not measured.anchors):
            measured.anchors.append((error, max(increase, LEAST_LOSS)))
        return increase


@dataclass
class _Measured:
    """A group and every (bits, k) of it with bytes and weighted error; `anchors` are (error, nats) that were seen.

    The errors are those of plain rounding; a quantiser that makes up for them lowers what they cost.
    """

    name: str
    members: tuple[str, ...]
    base: GridSection
    samples: list[_Sample]
    bits: np.ndarray
    k: np.ndarray
    bytes: np.ndarray
    errors: np.ndarray
    anchors: list[tuple[float, float]] = field(default_factory=list)

    @staticmethod
    def of(name: str, base: GridSection, members: Sequence[str], samples: list[_Sample]) -> _Measured:
        peak = min(MOST_K, max(2 * LEAST_K, max(sample.peak() for sample in samples)))
        found: list[tuple[np.ndarray, ...]] = []
        for bits in range(LEAST_BITS, MOST_BITS + 1):
            # Beyond the peak a larger k is a coarser step only, and from twice the peak on fewer bits do that as well.
            ks = np.geomspace(LEAST_K, min(COARSEST_STEP / step_of(bits, 1.0), 2.4 * peak), _POINTS)
            sizes, errors = np.zeros(_POINTS), np.zeros(_POINTS)
            for index, k in enumerate(ks):
                grid = Grid(fit_grid(base, bits, float(k)))
                for sample in samples:
                    size, error = sample.measure(grid)
                    sizes[index] += size / 8
                    errors[index] += error
            dense = np.geomspace(ks[0], ks[-1], _DENSE)
            at, known = np.log(dense), np.log(ks)
            between = np.exp(np.interp(at, known, np.log(np.maximum(errors, 1e-30))))
            found.append((np.full(_DENSE, bits), dense, np.interp(at, known, sizes), between))
        all_bits, all_k, sizes, errors = (np.concatenate(column) for column in zip(*found, strict=True))
        return _Measured(name, tuple(members), base, samples, all_bits, all_k, sizes, errors)

    def group(self) -> Group:
        """The pairs that no other beats in bytes and in cost."""
        cost = self._cost()
        order = np.lexsort((cost, self.bytes))
        least = np.minimum.accumulate(cost[order])
        kept = order[np.concatenate([[True], least[1:] < least[:-1]])]
        weights = round(sum(sample.times * sample.rows_RC.numel() for sample in self.samples))
        return Group(
            self.name, self.members, self.base, weights, self.bits[kept], self.k[kept], self.bytes[kept], cost[kept]
        )

    def _cost(self) -> np.ndarray:
        """Nats of every pair: the error times what a unit costs at the anchors, interpolated between them."""
        if not self.anchors:
            return self.errors
        told = [anchor for anchor in self.anchors if anchor[1] >= PROBE_LOSS] or self.anchors[-1:]
        errors, nats = (np.array(column) for column in zip(*sorted(dict(told).items()), strict=True))
        unit = np.interp(np.log(np.maximum(self.errors, 1e-30)), np.log(errors), np.log(nats / errors))
        return self.errors * np.exp(unit)


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
