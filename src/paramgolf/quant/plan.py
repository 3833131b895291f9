"""Which tensor is stored how: ordered rules, the first that fits decides.

A rule's `match` is alternatives joined by "|"; an alternative is conditions joined by "&", all of which must hold: a
glob on the tensor name, `@control` (small parameters that steer the network: gains, scales, mixes, skips) or
`@last_layers:N` (tensors of the last N blocks). Non-float tensors are kept as they are before any rule is asked.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from paramgolf.errors import GolfError
from paramgolf.model.names import is_control
from paramgolf.pack.stored import TensorSpec
from paramgolf.recipe.sections import GridSection, QuantSection, RuleSection
from paramgolf.registry import close_match

_BLOCK = re.compile(r"^blocks\.(\d+)\.")
# Without rules: control tensors exact, small tensors in half precision, the rest on the first grid if there is one.
_SMALL = 65_536


@dataclass(frozen=True)
class Store:
    """The decision for one tensor: `name` is a plain type or a grid's name; `grid` is None for a plain type."""

    name: str
    grid: GridSection | None = None

    def spec(self, tensor: str, shape: tuple[int, ...]) -> TensorSpec:
        """The row of the tensor table that this decision makes."""
        if self.grid is None:
            return TensorSpec(tensor, shape, self.name)
        packed = self.grid.packed and len(shape) >= 2
        return TensorSpec(tensor, shape, self.name, self.grid.bits, self.grid.scale_dtype, packed)


def rules_of(section: QuantSection) -> tuple[RuleSection, ...]:
    """The section's rules, or the default ones where it has none."""
    if section.rules:
        return section.rules
    rest = next(iter(section.grids), "float32")
    return (
        RuleSection(match="@control", store="float32"),
        RuleSection(max_size=_SMALL, store="float16" if section.grids else "float32"),
        RuleSection(store=rest),
    )


def plan(shapes: Mapping[str, tuple[int, ...]], section: QuantSection, num_layers: int) -> dict[str, Store]:
    """The store of every (float) tensor, in the order given.

    Raises GolfError for a tensor that no rule fits, a store that is neither a plain type nor a grid, or a bad pattern.
    """
    rules = rules_of(section)
    stores = {rule.store: _store(rule.store, section) for rule in rules}
    chosen: dict[str, Store] = {}
    for name, shape in shapes.items():
        rule = next((rule for rule in rules if fits(rule, name, shape, num_layers)), None)
        if rule is None:
            raise GolfError(f"quant.rules: no rule fits tensor {name}; end the rules with one without conditions")
        chosen[name] = stores[rule.store]
    return chosen


def tensor_table(
    shapes: Mapping[str, tuple[int, ...]], section: QuantSection, num_layers: int, kept: Iterable[tuple[str, str]] = ()
) -> list[TensorSpec]:
    """The specs of every tensor in the order given; `kept` are (name, type) of the non-float ones."""
    dtypes = dict(kept)
    floats = {name: shape for name, shape in shapes.items() if name not in dtypes}
    chosen = plan(floats, section, num_layers)
    return [chosen.get(name, Store(dtypes.get(name, ""))).spec(name, tuple(shape)) for name, shape in shapes.items()]


def _store(name: str, section: QuantSection) -> Store:
    if name in section.grids:
        if name in ("float16", "float32") or name.startswith("="):
            raise GolfError(f"quant.grids.{name}: this is the name of a plain type; call the grid otherwise")
        grid = section.grids[name]
        if grid.packed and (grid.bits != 6 or grid.low_code != "symmetric"):
            raise GolfError(f"quant.grids.{name}: packed needs bits = 6 and low_code = 'symmetric'; unset packed")
        return Store(name, section.grids[name])
    if name not in ("float16", "float32"):
        known = ["float16", "float32", *section.grids]
        raise GolfError(f"quant.rules: unknown store '{name}'{close_match(name, known)}")
    return Store(name)


def fits(rule: RuleSection, name: str, shape: tuple[int, ...], num_layers: int) -> bool:
    """Whether the rule's sizes and pattern fit this tensor."""
    size = math.prod(shape)
    if size < rule.min_size or (rule.max_size and size > rule.max_size) or (rule.ndim and len(shape) != rule.ndim):
        return False
    return any(
        all(_condition(term.strip(), name, num_layers) for term in alternative.split("&"))
        for alternative in rule.match.split("|")
    )


def _condition(term: str, name: str, num_layers: int) -> bool:
    if not term.startswith("@"):
        return fnmatch.fnmatchcase(name, term)
    if term == "@control":
        return is_control(name)
    kind, _, count = term.partition(":")
    if kind == "@last_layers" and count.isdecimal():
        block = _BLOCK.match(name)
        return block is not None and int(block.group(1)) >= num_layers - int(count)
    raise GolfError(f"quant.rules: unknown condition '{term}'; use a glob, @control or @last_layers:N")
