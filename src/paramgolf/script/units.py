"""Top-level statements of the package under facts: each folded by itself, when it is first needed."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache

from paramgolf.script.fold import fold
from paramgolf.script.infer import Types
from paramgolf.script.nodes import FunctionNode
from paramgolf.script.source import Package, Symbol
from paramgolf.script.text import Text, apply
from paramgolf.script.values import Facts

Place = tuple[str, int]  # module, index of the statement in it


@dataclass(frozen=True)
class Unit:
    """One statement with the comment lines above it."""

    module: str
    text: str
    node: ast.stmt


@lru_cache(maxsize=4096)
def unit_of(module: str, text: str) -> Unit:
    """The same object, and so the same nodes, as long as the text is the same."""
    return Unit(module, text, ast.parse(text).body[0])


class Units:
    """`earlier`: the texts that an earlier round has left, `known` the facts it had, `changed` what is new since."""

    def __init__(
        self,
        package: Package,
        types: Types,
        facts: Facts,
        earlier: Mapping[Place, str],
        known: Facts | None = None,
        changed: Collection[Place] = (),
    ) -> None:
        self._package, self._types, self._facts, self._earlier = package, types, facts, earlier
        self._changed = changed
        self._news = news(known, facts) if known is not None else None
        self.units: dict[Place, Unit] = {}

    def place(self, symbol: Symbol) -> Place:
        return symbol.module, self._package.module(symbol.module).places[symbol.name]

    def unit(self, symbol: Symbol) -> Unit:
        place = self.place(symbol)
        if place not in self.units:
            earlier = self._earlier.get(place)
            if earlier is None:
                text = self._package.module(symbol.module).source_of(place[1])
                text = fold(self._package, self._types, symbol.module, self._facts, text)
            elif self._news is not None and place not in self._changed and not self._news.search(earlier):
                text = earlier
            else:
                text = fold(self._package, self._types, symbol.module, self._facts, earlier)
            self.units[place] = unit_of(symbol.module, text)
        return self.units[place]

    def node(self, symbol: Symbol) -> ast.stmt:
        return self.unit(symbol).node

    def pruned(self, kept: Mapping[Symbol, set[str]]) -> dict[Place, str]:
        """The texts without methods that are not needed: what is kept only ever shrinks."""
        texts = {place: unit.text for place, unit in self.units.items()}
        for symbol, methods in kept.items():
            unit = self.unit(symbol)
            if isinstance(unit.node, ast.ClassDef):
                text = Text(unit.text)
                gone = [p for p in unit.node.body[1:] if isinstance(p, FunctionNode) and p.name not in methods]
                edits = [text.whole_lines(text.first_line(p), p.end_lineno or 0) for p in gone]
                texts[self.place(symbol)] = apply(unit.text, edits)
        return texts


def news(before: Facts, after: Facts) -> re.Pattern[str]:
    """Finds the texts that new facts may change: by the names of attributes, parameters and functions in them."""
    words = {name for key in after.values.keys() - before.values.keys() for name in key[1:]}
    words |= {parameter for _, _, parameter in after.parameters.keys() - before.parameters.keys()}
    words |= {name.split(".")[-1] for name in after.no_ops - before.no_ops}
    words |= {name.split(".")[-1] for _, name in after.returns.keys() - before.returns.keys()}
    words |= {name for _, name in after.dead - before.dead}
    return re.compile(rf"\b(?:{'|'.join(sorted(map(re.escape, words)))})\b" if words else r"(?!)")
