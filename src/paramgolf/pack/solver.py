"""The best model under a byte cap: a clip (k of k x row deviation) for each group of tensors, and the exact coded size.

A larger k is a coarser grid: fewer bytes, more error. For each group (a role and its grid) two curves over k are
measured: the zero-order entropy of the codes, and the error of the layer outputs, tr(E H E^T). What a unit of error
costs in loss is measured as well: the group alone is quantised coarsely and the loss on held-out training text is read.
At a price for a byte every group takes the k with the least predicted loss plus price; the price is moved until the
file, really quantised and coded, fills the cap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paramgolf.errors import GolfError
from paramgolf.pack.codecs.base import role
from paramgolf.pack.ledger import entropy_bits
from paramgolf.quant.export import export, restore
from paramgolf.quant.gptq import weighted_error
from paramgolf.quant.grid import Grid
from paramgolf.quant.plan import plan
from paramgolf.recipe.sections import GridSection, Recipe

LOWEST, HIGHEST = 0.998, 1.0  # parts of the cap between which the file must land
AIM = 0.9993  # where the search aims
ENCODES = 10  # real encodes after which the best so far is taken
FINEST_K = 2.0  # below it the clip cuts off more than finer steps gain
COARSEST_STEP = 2.0  # row deviations a step, at the coarsest
PROBE_STEP = 0.5  # row deviations a step, where the cost in loss is measured: well above the noise of the text
_POINTS = 14  # of a curve; between them log k is interpolated
_DENSE = 2001

Loss = Callable[[Mapping[str, Tensor]], float]  # of a state dict, in nats on fixed text
Size = Callable[[Mapping[str, float]], int]  # counted bytes of the file with these clips by tensor


@dataclass(frozen=True)
class Fit:
    """What the solver chose. `clips` by tensor name, the other tables by group."""

    clips: dict[str, float]
    k: dict[str, float]
    bytes: dict[str, int]  # estimated from the codes' entropy
    loss: dict[str, float]  # predicted increase in nats a token (without `Loss`: weighted squared error)
    nats_per_kilobyte: float  # what 1,000 more bytes would take off the predicted loss
    encodes: int

    def facts(self) -> dict[str, Any]:
        """For the record: the choice by group, and what one more kilobyte would buy."""
        groups = {name: {"k": self.k[name], "bytes": self.bytes[name], "loss": self.loss[name]} for name in self.k}
        return {
            "groups": groups,
            "predicted_loss": sum(self.loss.values()),
            "nats_per_kilobyte": self.nats_per_kilobyte,
            "encodes": self.encodes,
        }


@dataclass(frozen=True)
class _Group:
    """Tensors that share a k, and their curves over `k` (dense, ascending): bytes fall, cost need not be monotone."""

    name: str
    members: tuple[str, ...]
    k: np.ndarray
    bytes: np.ndarray
    cost: np.ndarray

    def best(self, price: float) -> int:
        """Index of the k with the least cost at `price` for a byte; the coarser one of equals."""
        total = self.cost + price * self.bytes
        return len(total) - 1 - int(np.argmin(total[::-1]))


def k_range(grid: GridSection) -> tuple[float, float]:
    """(finest, coarsest) k of a grid."""
    largest = 2 ** (grid.bits - 1) - 1
    return FINEST_K, max(COARSEST_STEP * largest, 2 * FINEST_K)


def fitted_groups(shapes: Mapping[str, tuple[int, ...]], recipe: Recipe) -> dict[str, tuple[GridSection, list[str]]]:
    """Groups of tensors on a grid with clip = "sdclip", the only ones whose size can be moved.

    Raises GolfError when there are none.
    """
    groups: dict[str, tuple[GridSection, list[str]]] = {}
    for name, store in plan(shapes, recipe.quant, recipe.model.num_layers).items():
        if store.grid is not None and store.grid.clip == "sdclip":
            groups.setdefault(f"{role(name)} {store.name}", (store.grid, []))[1].append(name)
    if not groups:
        raise GolfError('pack.fit moves grids with clip = "sdclip" and there is none; set one, or pack.fit=false')
    return groups


@torch.no_grad()
def solve(
    state: Mapping[str, Tensor], recipe: Recipe, size: Size, hessians: Mapping[str, Tensor], loss: Loss | None = None
) -> Fit:
    """Clips whose file takes between 99.8 and 100 % of `budget.bytes`, or the finest plan where even that is smaller.

    Args:
        size: quantises, codes and measures; called about three times, `ENCODES` + 1 at the most.
        hessians: second moments of layer inputs by tensor name; a tensor without one is weighed by its plain error.
        loss: without it, a unit of error costs the same in every group.

    Raises GolfError when the coarsest plan does not fit, with its size.
    """
    cap = recipe.budget.bytes
    if not cap:
        raise GolfError("pack.fit fills a byte cap and there is none; set budget.bytes, or pack.fit=false")
    shapes = {name: tuple(t.shape) for name, t in state.items() if t.is_floating_point()}
    before = loss(state) if loss else 0.0
    groups = []
    for name, (grid, members) in fitted_groups(shapes, recipe).items():
        unit = _unit_cost(state, recipe, grid, members, hessians, loss, before) if loss else 1.0
        groups.append(_curves(name, grid, [(m, state[m].float(), hessians.get(m)) for m in members], unit))
    return _Search(groups, size, cap).run()


def _curves(
    name: str, grid: GridSection, members: list[tuple[str, Tensor, Tensor | None]], unit_cost: float
) -> _Group:  # fmt: skip
    """The group's bytes and cost over k from plain rounding at `_POINTS` of them."""
    finest, coarsest = k_range(grid)
    ks = np.geomspace(finest, coarsest, _POINTS)
    bits, errors = np.zeros(_POINTS), np.zeros(_POINTS)
    for index, k in enumerate(ks):
        made = Grid(replace(grid, clip_value=float(k)))
        for _, weight, hessian in members:
            codes, scale = made.quantize(weight)
            bits[index] += entropy_bits(codes.cpu().numpy())
            errors[index] += weighted_error(weight, made.dequantize(codes, scale), hessian)
    dense = np.geomspace(finest, coarsest, _DENSE)
    sizes = np.interp(np.log(dense), np.log(ks), np.minimum.accumulate(bits) / 8)
    errors = np.exp(np.interp(np.log(dense), np.log(ks), np.log(np.maximum(errors, 1e-30))))
    return _Group(name, tuple(m for m, _, _ in members), dense, sizes, unit_cost * errors)


def _unit_cost(
    state: Mapping[str, Tensor], recipe: Recipe, grid: GridSection, members: list[str],
    hessians: Mapping[str, Tensor], loss: Loss, before: float,
) -> float:  # fmt: skip
    """Nats that a unit of plain rounding's weighted error costs when the group is quantised as the recipe does it.

    A quantiser that makes up for errors lowers this, not the error itself. Never below a small positive number.
    """
    clip = max(FINEST_K, PROBE_STEP * (2 ** (grid.bits - 1) - 1))
    part = {name: state[name] for name in members}
    quantised = restore(
        export(part, recipe.quant, recipe.model.num_layers, hessians, clips=dict.fromkeys(members, clip))
    )
    increase = loss({**state, **quantised}) - before
    made = Grid(replace(grid, clip_value=clip))
    error = sum(
        weighted_error(t.float(), made.dequantize(*made.quantize(t.float())), hessians.get(name))
        for name, t in part.items()
    )
    return max(increase, 1e-5) / max(error, 1e-30)


class _Search:
    """Moves the price of a byte until the real size fits."""

    def __init__(self, groups: list[_Group], size: Size, cap: int) -> None:
        self.groups, self.size, self.cap = groups, size, cap
        self.encodes = 0

    def run(self) -> Fit:
        low, high = self._estimate(self._at(np.inf)), self._estimate(self._at(0.0))
        fits: float | None = None  # the largest estimate known to fit, and its plan
        best: list[int] = []
        too_large: float | None = None
        target = min(max(0.95 * self.cap, low), high)
        while True:
            choice = self._for_bytes(target)
            size = self._encode(choice)
            if size <= HIGHEST * self.cap:
                fits, best = target, choice
                if size >= LOWEST * self.cap or target >= high:
                    break
            elif target <= low:
                raise GolfError(
                    f"budget.bytes={self.cap} is below what this model takes on its coarsest grids; shrink the model, "
                    f"or set budget.bytes={size}"
                )
            else:
                too_large = target
            if self.encodes >= ENCODES and fits is not None:
                break
            lower, upper = low if fits is None else fits, high if too_large is None else too_large
            target += AIM * self.cap - size
            if target >= upper:
                target = upper if too_large is None else (lower + upper) / 2
            elif target <= lower:
                target = lower if fits is None else (lower + upper) / 2
        return self._fit(best)

    def _at(self, price: float) -> list[int]:
        if np.isinf(price):
            return [len(group.k) - 1 for group in self.groups]
        return [group.best(price) for group in self.groups]

    def _estimate(self, choice: list[int]) -> float:
        return float(sum(group.bytes[index] for group, index in zip(self.groups, choice, strict=True)))

    def _for_bytes(self, target: float) -> list[int]:
        """The plan at the lowest price whose estimate is at most `target`, the rest filled up group by group."""
        cheap, dear = self._at(0.0), self._at(np.inf)
        if self._estimate(cheap) <= target:
            return cheap
        low, high = -40.0, 30.0  # log price
        for _ in range(60):
            middle = (low + high) / 2
            choice = self._at(float(np.exp(middle)))
            if self._estimate(choice) <= target:
                high, dear = middle, choice
            else:
                low, cheap = middle, choice
        left = target - self._estimate(dear)
        for index, group in enumerate(self.groups):  # where the curves are not convex, a price leaves a gap
            room = group.bytes[dear[index]] + left
            finer = next((i for i in range(cheap[index], dear[index]) if group.bytes[i] <= room), dear[index])
            left -= float(group.bytes[finer] - group.bytes[dear[index]])
            dear[index] = finer
        return dear

    def _encode(self, choice: list[int]) -> int:
        self.encodes += 1
        return self.size(self._clips(choice))

    def _clips(self, choice: list[int]) -> dict[str, float]:
        pairs = zip(self.groups, choice, strict=True)
        return {name: float(group.k[index]) for group, index in pairs for name in group.members}

    def _fit(self, choice: list[int]) -> Fit:
        pairs = list(zip(self.groups, choice, strict=True))
        cost = sum(group.cost[index] for group, index in pairs)
        finer = self._for_bytes(self._estimate(choice) + 1000)
        after = sum(group.cost[index] for group, index in zip(self.groups, finer, strict=True))
        return Fit(
            clips=self._clips(choice),
            k={group.name: round(float(group.k[index]), 4) for group, index in pairs},
            bytes={group.name: round(float(group.bytes[index])) for group, index in pairs},
            loss={group.name: float(group.cost[index]) for group, index in pairs},
            nats_per_kilobyte=float(cost - after),
            encodes=self.encodes,
        )
