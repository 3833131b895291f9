"""Mixed bits: which matrices bear a coarser grid best, by what it costs at the layers' outputs (#1204)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from paramgolf.errors import GolfError
from paramgolf.quant.gptq import weighted_error
from paramgolf.quant.grid import Grid
from paramgolf.quant.plan import Store, plan, rules_of
from paramgolf.recipe.sections import QuantSection, RuleSection
from paramgolf.registry import close_match


def mixed(
    section: QuantSection, state: Mapping[str, Tensor], num_layers: int, hessians: Mapping[str, Tensor] | None
) -> QuantSection:  # fmt: skip
    """`section` with `coarse_grid` and `coarse_fraction` carried out: rules that name the chosen matrices come first.

    Of the matrices on grids of more bits than `coarse_grid`, that fraction (rounded) moves to it for which the increase
    of tr(E H E^T), E the error of plain rounding, is smallest for each bit saved; without a Hessian the squared error
    counts. GolfError when `coarse_grid` is no grid of the section.
    """
    if not section.coarse_fraction:
        return section
    name = section.coarse_grid
    if name not in section.grids:
        raise GolfError(f"quant.coarse_grid: no grid '{name}'{close_match(name, list(section.grids))}")
    coarse = Grid(section.grids[name])
    floats = {n: tuple(t.shape) for n, t in state.items() if t.is_floating_point()}
    costs = {
        n: _cost(state[n], store, coarse, (hessians or {}).get(n))
        for n, store in plan(floats, section, num_layers).items()
        if store.grid is not None and store.grid.bits > coarse.section.bits and len(floats[n]) == 2
    }
    chosen = sorted(costs, key=lambda n: costs[n])[: round(section.coarse_fraction * len(costs))]
    rules = rules_of(section)
    if chosen:
        rules = (RuleSection(match="|".join(chosen), store=name), *rules)
    return replace(section, rules=rules, coarse_grid="", coarse_fraction=0.0)


def _cost(weight: Tensor, store: Store, coarse: Grid, hessian: Tensor | None) -> float:
    """Increase of the weighted error for each bit that the coarser grid saves."""
    assert store.grid is not None
    weight = weight.detach().float()
    saved = (store.grid.bits - coarse.section.bits) * weight.numel()
    before, after = (
        weighted_error(weight, grid.dequantize(*grid.quantize(weight)), hessian) for grid in (Grid(store.grid), coarse)
    )
    return (after - before) / max(saved, 1)
