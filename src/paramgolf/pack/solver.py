"""The best model under a byte cap: bits and a clip for each group of tensors (see curves.py), and the exact coded size.

At a price for a byte every group takes the grid with the least predicted loss plus price; the price is moved until the
file, really quantised and coded, fills the cap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paramgolf.errors import GolfError
from paramgolf.pack.curves import Group, solved_section, step_of
from paramgolf.recipe.sections import QuantSection, Recipe

LOWEST, HIGHEST = 0.998, 1.0  # parts of the cap between which the file must land
AIM = 0.9993  # where the search aims
FIRST = 0.95  # of the cap for the codes of the solved tensors, at the first try
ENCODES = 10  # real encodes after which the best so far is taken
KILOBYTE = 1000
_TARGETS = 40  # estimates tried; plans that were coded before cost nothing


class CapTooSmall(GolfError):
    """Not even the coarsest plan fits; `smallest` bytes would do."""

    def __init__(self, cap: int, smallest: int) -> None:
        super().__init__(
            f"budget.bytes={cap} is below what this model takes on its coarsest grids; shrink the model, or set "
            f"budget.bytes={smallest}"
        )
        self.smallest = smallest


Size = Callable[[QuantSection, Mapping[str, float]], int]  # counted bytes of the file stored so, with clips by tensor


@dataclass(frozen=True)
class Chosen:
    """What a group of tensors got."""

    name: str
    members: tuple[str, ...]
    weights: int
    bits: int
    k: float
    bytes: float  # estimated from the codes' entropy
    loss: float  # predicted increase in nats a token (without a measured loss: weighted squared error)


@dataclass(frozen=True)
class Fit:
    """A solved plan: `quant` and `clips` (by tensor name) are what `export` is given."""

    quant: QuantSection
    clips: dict[str, float]
    groups: tuple[Chosen, ...]
    nats_per_kilobyte: float  # what 1,000 more bytes would take off the predicted loss
    encodes: int

    @property
    def predicted_loss(self) -> float:
        return sum(group.loss for group in self.groups)

    def facts(self) -> dict[str, Any]:
        """For the record: the choice by group, and what one more kilobyte would buy."""
        groups = {
            g.name: {
                "bits": g.bits, "k": round(g.k, 4), "step": round(step_of(g.bits, g.k), 5),
                "weights": g.weights, "bytes": round(g.bytes), "loss": g.loss,
            }
            for g in self.groups
        }  # fmt: skip
        return {
            "groups": groups,
            "predicted_loss": self.predicted_loss,
            "nats_per_kilobyte": self.nats_per_kilobyte,
            "encodes": self.encodes,
        }


def solve(groups: Sequence[Group], recipe: Recipe, size: Size) -> Fit:
    """The plan whose file takes between 99.8 and 100 % of `budget.bytes`, or the finest one where even that is smaller.

    Args:
        groups: what `curves.measure` said of the weights.
        size: quantises, codes and measures; called about three times, `ENCODES` + 1 at the most.

    Raises CapTooSmall when the coarsest plan does not fit.
    """
    return _Search(list(groups), recipe.quant, size, cap_of(recipe)).run()


def cap_of(recipe: Recipe) -> int:
    """The cap to fill. GolfError without one."""
    if not recipe.budget.bytes:
        raise GolfError("pack.fit fills a byte cap and there is none; set budget.bytes, or pack.fit=false")
    return recipe.budget.bytes


def rough_plan(groups: Sequence[Group], cap: int) -> list[tuple[int, float]]:
    """(bits, k) of every group in about the plan for `cap`, by estimates alone."""
    search = _Search(list(groups), QuantSection(), lambda quant, clips: 0, cap)
    choice = search.estimated(FIRST * cap)
    return [(int(group.bits[index]), float(group.k[index])) for group, index in zip(groups, choice, strict=True)]


class _Search:
    """Moves the price of a byte until the real size fits."""

    def __init__(self, groups: list[Group], quant: QuantSection, size: Size, cap: int) -> None:
        self.groups, self.quant, self.size, self.cap = groups, quant, size, cap
        self.encodes = 0
        self.sizes: dict[tuple[int, ...], int] = {}  # of the plans that were coded

    def run(self) -> Fit:
        low, high = self._estimate(self._at(np.inf)), self._estimate(self._at(0.0))
        fits: float | None = None  # the largest estimate known to fit, and its plan
        too_large: float | None = None  # the smallest known not to
        best: list[int] = []
        target = min(max(FIRST * self.cap, low), high)
        for _ in range(_TARGETS):
            choice = self.estimated(target)
            size = self._encode(choice)
            if size <= HIGHEST * self.cap:
                fits, best = target, choice
                if size >= LOWEST * self.cap or target >= high:
                    break
            elif target <= low:
                break
            else:
                too_large = target
            if self.encodes >= ENCODES and fits is not None:
                break
            target = min(max(target + AIM * self.cap - size, low), high)
            known = (fits is not None and target <= fits) or (too_large is not None and target >= too_large)
            if known or self.estimated(target) == choice:
                target = ((low if fits is None else fits) + (high if too_large is None else too_large)) / 2
        if not best:
            best = self._at(np.inf)
            if (size := self._encode(best)) > self.cap:
                raise CapTooSmall(self.cap, size)
        return self._fit(best)

    def _at(self, price: float) -> list[int]:
        if np.isinf(price):
            return [0] * len(self.groups)
        return [group.best(price) for group in self.groups]

    def _estimate(self, choice: list[int]) -> float:
        return float(sum(group.bytes[index] for group, index in zip(self.groups, choice, strict=True)))

    def estimated(self, target: float) -> list[int]:
        """The plan at the lowest price whose estimate is at most `target`, the rest filled up group by group."""
        cheap, dear = self._at(0.0), self._at(np.inf)
        if self._estimate(cheap) <= target:
            return cheap
        low, high = -60.0, 30.0  # log price
        for _ in range(70):
            middle = (low + high) / 2
            choice = self._at(float(np.exp(middle)))
            if self._estimate(choice) <= target:
                high, dear = middle, choice
            else:
                low, cheap = middle, choice
        left = target - self._estimate(dear)
        # Where the curves are not convex, a price leaves a gap: filled between the two plans first, then by any group.
        for ends in (cheap, [len(group.bytes) - 1 for group in self.groups]):
            for index, group in enumerate(self.groups):
                finer = min(ends[index], group.within(group.bytes[dear[index]] + left))
                if finer > dear[index]:
                    left -= float(group.bytes[finer] - group.bytes[dear[index]])
                    dear[index] = finer
        return dear

    def _encode(self, choice: list[int]) -> int:
        key = tuple(choice)
        if key not in self.sizes:
            self.encodes += 1
            self.sizes[key] = self.size(*self._plan(choice))
        return self.sizes[key]

    def _plan(self, choice: list[int]) -> tuple[QuantSection, dict[str, float]]:
        pairs = list(zip(self.groups, choice, strict=True))
        chosen = [(group.members, group.base, int(group.bits[index]), float(group.k[index])) for group, index in pairs]
        return solved_section(self.quant, chosen), {name: k for names, _, _, k in chosen for name in names}

    def _fit(self, choice: list[int]) -> Fit:
        pairs = list(zip(self.groups, choice, strict=True))
        groups = tuple(
            Chosen(g.name, g.members, g.weights, int(g.bits[i]), float(g.k[i]), float(g.bytes[i]), float(g.cost[i]))
            for g, i in pairs
        )
        finer = self.estimated(self._estimate(choice) + KILOBYTE)
        after = sum(group.cost[index] for group, index in zip(self.groups, finer, strict=True))
        quant, clips = self._plan(choice)
        gain = max(0.0, float(sum(g.loss for g in groups) - after))
        return Fit(quant, clips, groups, gain, self.encodes)
