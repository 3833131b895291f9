"""Quantisation-aware training: the switch inside the run, and PR 107's phase after it.

Both see the grids that the export will use (`quant.qat = "export"`), or one grid by name for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from paramgolf.model.gpt import GPT
from paramgolf.quant.grid import Grid
from paramgolf.quant.plan import plan
from paramgolf.recipe.sections import Recipe

ADAM_BETAS = (0.9, 0.999)  # of the post-training phase, as PR 107 ran it


def weight_grids(model: nn.Module, recipe: Recipe, choice: str) -> dict[str, Grid]:
    """Grid of every weight that the export quantises; `choice` is "export", a grid's name, or "" (none)."""
    if not choice:
        return {}
    shapes = {name: tuple(t.shape) for name, t in model.named_parameters()}
    stores = plan(shapes, recipe.quant, recipe.model.num_layers)
    # One object a grid: compiled blocks are guarded by identity and would not share a graph otherwise.
    named = {name: Grid(section) for name, section in recipe.quant.grids.items()}
    quantised = {name: store.name for name, store in stores.items() if store.grid is not None}
    return {name: named[grid if choice == "export" else choice] for name, grid in quantised.items()}


class QatSwitch:
    """Turns the fake quantisation of linear weights on and off; `states` are those the run will pass through."""

    def __init__(self, model: GPT, recipe: Recipe) -> None:
        self._model = model
        self._choice = recipe.quant.qat
        self._start = recipe.quant.qat_start
        self._grids: Grid | dict[str, Grid] | None = None
        if self._choice == "export":
            self._grids = weight_grids(model, recipe, "export")
        elif self._choice:  # one grid for every linear weight, whatever its export
            self._grids = Grid(recipe.quant.grids[self._choice])
        self.on = False
        self.set(self.wanted(0.0))

    @property
    def states(self) -> list[bool]:
        """The states in the order in which training sees them."""
        if not self._choice:
            return [False]
        return [True] if self._start == 0 else [False, True]

    def wanted(self, fraction: float) -> bool:
        """Whether QAT is on at `fraction` of the training window."""
        return bool(self._choice) and fraction >= self._start

    def set(self, on: bool) -> None:
        if on != self.on:
            self._model.set_qat(self._grids if on else None)
            self.on = on


class GridPoint:
    """Large matrices moved to their quantised values for one forward and backward, then put back exactly."""

    def __init__(self, model: nn.Module, grids: dict[str, Grid]) -> None:
        self._pairs = [(p, grids[name]) for name, p in model.named_parameters() if name in grids]

    @property
    def count(self) -> int:
        """How many matrices are moved."""
        return len(self._pairs)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, the weights are those a reader of the artifact would see; gradients are taken there."""
        kept: list[Tensor] = [p.detach().clone() for p, _ in self._pairs]
        try:
            with torch.no_grad():
                for parameter, grid in self._pairs:
                    parameter.copy_(grid.fake_quantize(parameter))
            yield
        finally:
            with torch.no_grad():
                for (parameter, _), original in zip(self._pairs, kept, strict=True):
                    parameter.copy_(original)
