"""Where the kept functions are called, as far as every call of one is known; and the commas of a bracket."""

from __future__ import annotations

import ast
import io
import itertools
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass

from paramgolf.script.constants import Constants, Key
from paramgolf.script.infer import Frame
from paramgolf.script.nodes import FunctionNode
from paramgolf.script.reach import ALWAYS
from paramgolf.script.source import Symbol
from paramgolf.script.text import Text

_STRAIGHT = {"no_grad", "contextmanager", "classmethod", "staticmethod"}  # decorators that leave the parameters alone


@dataclass(frozen=True)
class Site:
    """One call, in the unit of `home`."""

    call: ast.Call
    frame: Frame
    home: Symbol


class Sites:
    """`known`: functions, methods (class and name) and dataclasses (class and "__init__") with all their calls."""

    def __init__(self, constants: Constants) -> None:
        self.constants, self.reach = constants, constants.reach
        self.known: dict[Key, list[Site]] = {}
        closed = set(constants.escaped)
        for site in constants.sites:
            real = list(self._real(site.keys))
            direct = isinstance(site.call.func, ast.Attribute) and self._is_class(site.call.func.value, site.frame)
            starred = any(isinstance(a, ast.Starred) for a in site.call.args)
            if len(real) == 1 and not direct and not starred and all(k.arg for k in site.call.keywords):
                self.known.setdefault(real[0], []).append(Site(site.call, site.frame, site.home))
            else:
                closed |= set(real)
        for key in [key for key in self.known if key in closed or not self._is_plain(key)]:
            del self.known[key]

    def _real(self, keys: list[Key]) -> Iterator[Key]:
        """Of the functions that a call may mean those that it can reach: of a class the nearest constructor."""
        constructed = False
        for key in dict.fromkeys(keys):
            if key[1] != "__init__":
                yield key
            elif not constructed and (self.constants.function(key) is not None or self.constants.fields_of(key[0])):
                constructed = True
                yield key

    def _is_class(self, node: ast.expr, frame: Frame) -> bool:
        found = self.reach.package.resolve_path(frame.module, node)
        return isinstance(found, Symbol) and bool(found.name) and self.reach.package.class_node(found) is not None

    def _is_plain(self, key: Key) -> bool:
        """Whether nothing but these calls fixes the signature."""
        symbol, name = key
        node = self.constants.function(key)
        if node is None:
            return len(list(self.reach.package.bases(symbol))) == 1 and (symbol, "") not in self.constants.escaped
        decorators = {ast.unparse(d).split("(")[0].split(".")[-1] for d in node.decorator_list}
        hidden = name in ALWAYS or (name.startswith("__") and name != "__init__")
        if hidden or decorators - _STRAIGHT or node.args.vararg or node.args.kwarg or node.args.posonlyargs:
            return False
        others = [s for s, methods in self.reach.kept.items() if name in methods and s != symbol]
        return name == "__init__" or not any(self.reach.related(symbol, other) for other in others)


def parameters_of(node: FunctionNode, method: bool) -> tuple[list[str], list[str]]:
    """(positional, keyword-only) names, without that of the object."""
    static = any(ast.unparse(d) == "staticmethod" for d in node.decorator_list)
    return [a.arg for a in node.args.args][1 if method and not static else 0 :], [a.arg for a in node.args.kwonlyargs]


class Brackets:
    """The brackets of a text and the places of their commas, in bytes."""

    def __init__(self, text: str) -> None:
        place = Text(text)
        self._close: dict[int, tuple[int, list[int]]] = {}
        open_: list[tuple[int, list[int]]] = []
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type != tokenize.OP:
                continue
            row, column = token.start
            at = place.starts[row - 1] + len(token.line[:column].encode())
            if token.string in ("(", "[", "{"):
                open_.append((at, []))
            elif token.string in (")", "]", "}"):
                start, commas = open_.pop()
                self._close[start] = (at, commas)
            elif token.string == "," and open_:
                open_[-1][1].append(at)
        self._opened = sorted(self._close)

    def elements(self, after: int) -> list[tuple[int, int]]:
        """(start, end) of what the commas of the first bracket from `after` on part; an empty last one is left out."""
        start = next(at for at in self._opened if at >= after)
        close, commas = self._close[start]
        edges = [start, *commas, close]
        return [(a + 1, b) for a, b in itertools.pairwise(edges)]
