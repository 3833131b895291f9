"""What the kept code itself decides: attributes that only ever hold one constant, parameters that only ever get one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any, NamedTuple

from paramgolf.script.infer import EXTERNAL, MODULE, Frame, Kind
from paramgolf.script.nodes import FunctionNode, Scope, locals_of
from paramgolf.script.reach import Reach
from paramgolf.script.source import Import, Symbol, bound_names
from paramgolf.script.values import UNKNOWN, Facts, Values

Key = tuple[Symbol, str]  # a function (with "") or a class and its method
_SIMPLE = (type(None), bool, int, float, str, tuple)


class Called(NamedTuple):
    """A call in the unit of `home`, and every kept function that it may mean."""

    call: ast.Call
    frame: Frame
    home: Symbol
    keys: list[Key]


class Constants:
    """One look over the kept code of `reach`."""

    def __init__(self, reach: Reach, facts: Facts) -> None:
        self.reach, self.facts, self.package, self.types = reach, facts, reach.package, reach.types
        self._values: dict[str, Values] = {}
        self.calls: dict[Key, list[tuple[ast.Call, Frame]]] = {}
        self.sites: list[Called] = []
        self.escaped: set[Key] = set()
        self.read: set[str] = set()  # attributes that are read anywhere
        self.replaced: set[str] = set()  # fields given to dataclasses.replace
        self.stores: dict[tuple[Symbol | None, str], list[Any]] = {}
        for home, statement, frame in self._parts():
            self._home = home
            self._look(statement, frame, called=False)
        for symbol in reach.kept:
            for target in (reach.chosen(symbol) or {}).values():
                self._escape_all(target)

    def _parts(self) -> Iterator[tuple[Symbol, ast.AST, Frame]]:
        for symbol, methods in self.reach.kept.items():
            if self.reach.chosen(symbol) is not None:
                continue
            statement = self.reach.units.node(symbol)
            frame = Frame(symbol.module)
            if not isinstance(statement, ast.ClassDef):
                yield symbol, statement, frame
                continue
            inner = Frame(symbol.module, symbol, statement, frame)
            for part in statement.body:
                if not isinstance(part, FunctionNode) or part.name in methods:
                    yield symbol, part, inner

    # -- collecting --------------------------------------------------------------------------------------------

    def _look(self, node: ast.AST, frame: Frame, called: bool) -> None:
        if isinstance(node, ast.Call):
            keys = self._callees(node, frame)
            self.sites.append(Called(node, frame, self._home, keys))
            for key in keys:
                self.calls.setdefault(key, []).append((node, frame))
            if ast.unparse(node.func).split(".")[-1] == "replace":
                self.replaced |= {keyword.arg for keyword in node.keywords if keyword.arg}
            self._look(node.func, frame, called=True)
            for child in [*node.args, *node.keywords]:
                self._look(child, frame, called=False)
            return
        if isinstance(node, ast.Name | ast.Attribute) and not called and isinstance(node.ctx, ast.Load):
            self.escaped |= set(self._named_by(node, frame))
        if isinstance(node, ast.Attribute):
            self._look_at_attribute(node, frame)
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            self._look_at_stores(node, frame)
        inner = Frame(frame.module, frame.owner, node, frame) if isinstance(node, FunctionNode | ast.Lambda) else frame
        for name, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and name not in ("annotation", "returns", "decorator_list"):
                    self._look(child, inner, called=isinstance(node, ast.Attribute))

    def _look_at_attribute(self, node: ast.Attribute, frame: Frame) -> None:
        if isinstance(node.ctx, ast.Load):
            self.read.add(node.attr)
        elif isinstance(node.ctx, ast.Store):
            base = self.types.infer(node.value, frame)
            if base != EXTERNAL:
                self.stores.setdefault((_owner(base), node.attr), [])

    def _look_at_stores(self, node: ast.Assign | ast.AnnAssign | ast.AugAssign, frame: Frame) -> None:
        pairs: list[tuple[ast.expr, ast.expr | None]] = []
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs += zip(target.elts, node.value.elts, strict=False)
            elif isinstance(target, ast.Tuple):
                pairs += [(part, None) for part in target.elts]
            else:
                mutable = isinstance(node, ast.AugAssign) or isinstance(node.value, ast.List | ast.Dict | ast.Set)
                pairs.append((target, None if mutable else node.value))
        for target, value in pairs:
            if isinstance(target, ast.Attribute):
                base = self.types.infer(target.value, frame)
                if base != EXTERNAL:
                    held = self._value(value, frame) if value is not None else UNKNOWN
                    self.stores.setdefault((_owner(base), target.attr), []).append(held)

    def _callees(self, node: ast.Call, frame: Frame) -> list[Key]:
        if isinstance(node.func, ast.Name) and node.func.id == "cls" and frame.owner is not None:
            return self._constructors(frame.owner)
        if isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "super()" and frame.owner:
            bases = [b for b in self.package.bases(frame.owner) if b != frame.owner]
            return [(base, node.func.attr) for base in bases]
        found: list[Key] = []
        for symbol, method in self._named_by(node.func, frame):
            found += [(symbol, method)] if method else self._constructors(symbol)
        return found

    def _constructors(self, symbol: Symbol) -> list[Key]:
        if self.package.class_node(symbol) is None:
            return [(symbol, "")]
        return [(base, "__init__") for base in self.package.bases(symbol)]

    def _named_by(self, node: ast.expr, frame: Frame) -> list[Key]:
        """The kept functions, classes or methods that a name or attribute may mean."""
        first = node
        while isinstance(first, ast.Attribute):
            first = first.value
        if not (isinstance(first, ast.Name) and _is_local(first.id, frame)):
            found = self.package.resolve_path(frame.module, node)
            if isinstance(found, Symbol) and found in self.reach.kept:
                return [(found, "")]
            if isinstance(found, Symbol | Import):
                return []
        if not isinstance(node, ast.Attribute):
            return []
        base = self.types.infer(node.value, frame)
        if base == EXTERNAL:
            return []
        owners = [s for s, methods in self.reach.kept.items() if node.attr in methods]
        if base is not None and not base.many:
            owners = [s for s in owners if self._related(s, base.symbol)]
        return [(owner, node.attr) for owner in owners]

    def _related(self, one: Symbol, other: Symbol) -> bool:
        return self.reach.related(one, other)

    def _escape_all(self, symbol: Symbol) -> None:
        self.escaped.add((symbol, ""))
        for base in self.package.bases(symbol):
            self.escaped |= {(base, name) for name in (*self.reach.kept.get(base, ()), "__init__")}

    # -- results -----------------------------------------------------------------------------------------------

    def attributes(self) -> dict[tuple[str, str], Any]:
        """(class, attribute) -> the constant that every assignment stores."""
        unknown = {name for owner, name in self.stores if owner is None}
        learned: dict[tuple[str, str], Any] = {}
        for (owner, name), values in self.stores.items():
            if owner is None or name in unknown or self._is_field(owner, name):
                continue
            if any(n == name and o != owner and self._related(o, owner) for o, n in self.stores if o is not None):
                continue
            if all(isinstance(v, _SIMPLE) for v in values) and len({(type(v), v) for v in values}) == 1:
                learned[owner.name, name] = values[0]
        return learned

    def dead(self) -> set[tuple[str, str]]:
        """(class, attribute) that is stored and never read; torch reads the modules and parameters of a module."""
        found = set()
        for owner, name in self.stores:
            if owner is None or name in self.read or self._is_field(owner, name):
                continue
            if name.startswith("_") or not self.reach.is_module(owner):
                found.add((owner.name, name))
        return found

    def returns(self) -> dict[tuple[str, str], Any]:
        """(module, function) -> the constant it returns."""
        learned: dict[tuple[str, str], Any] = {}
        for symbol, methods in self.reach.kept.items():
            for name in ("", *methods):
                value = self._returned((symbol, name))
                if name and any(
                    self._returned((other, name)) != value and self._related(symbol, other)
                    for other, theirs in self.reach.kept.items()
                    if name in theirs
                ):
                    continue
                if isinstance(value, _SIMPLE):
                    learned[symbol.module, f"{symbol.name}.{name}" if name else symbol.name] = value
        return learned

    def _returned(self, key: Key) -> Any:
        """What a function of one statement returns, if that is known."""
        node = self.function(key)
        body = [s for s in node.body if not _is_nothing(s)] if node is not None else []
        if node is None or len(body) != 1 or not isinstance(body[0], ast.Return) or node.decorator_list:
            return UNKNOWN
        owner = key[0] if key[1] else None
        frame = Frame(key[0].module, owner, node, Frame(key[0].module, owner))
        return self._value(body[0].value, frame) if body[0].value is not None else UNKNOWN

    def _is_field(self, owner: Symbol, name: str) -> bool:
        """Set by a generated constructor or in the class body too."""
        for base in self.package.bases(owner):
            node = self.package.class_node(base)
            if node is not None and any(name in bound_names(p) for p in node.body if not isinstance(p, FunctionNode)):
                return True
        return False

    def fields_of(self, symbol: Symbol) -> dict[str, ast.expr | None]:
        node = self.package.class_node(symbol)
        if node is not None and symbol in self.reach.kept:
            folded = self.reach.units.node(symbol)
            assert isinstance(folded, ast.ClassDef)
            node = folded
        if node is None or not any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            return {}
        return {
            part.target.id: part.value
            for part in node.body
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
        }

    def fields(self) -> dict[tuple[str, str], Any]:
        """(dataclass, field) -> the constant that every constructor call gives, where nothing is stored later."""
        learned: dict[tuple[str, str], Any] = {}
        for symbol in self.reach.kept:
            table = self.fields_of(symbol)
            stored = {name for owner, name in self.stores if owner is None or self._related(owner, symbol)}
            calls = self.calls.get((symbol, "__init__"), [])
            if not table or not calls or (symbol, "") in self.escaped:
                continue
            for place, (name, default) in enumerate(table.items()):
                if name not in stored and name not in self.replaced:
                    value = self._common(calls, place, name, default, symbol.module)
                    if value is not UNKNOWN:
                        learned[symbol.name, name] = value
        return learned

    def parameters(self) -> dict[tuple[str, str, str], Any]:
        """(module, function, parameter) -> the constant that every call passes."""
        learned: dict[tuple[str, str, str], Any] = {}
        for key, calls in self.calls.items():
            symbol, method = key
            node = self.function(key)
            hidden = method.startswith("__") and method != "__init__"
            if node is None or hidden or method == "forward" or key in self.escaped:
                continue
            static = any(ast.unparse(d) == "staticmethod" for d in node.decorator_list)
            positional = [*node.args.posonlyargs, *node.args.args][1 if method and not static else 0 :]
            defaults = dict(zip([a.arg for a in positional][::-1], node.args.defaults[::-1], strict=False))
            defaults |= {a.arg: d for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if d}
            name = f"{symbol.name}.{method}" if method else symbol.name
            for place, argument in enumerate([*positional, *node.args.kwonlyargs]):
                at = place if place < len(positional) else 10_000
                value = self._common(calls, at, argument.arg, defaults.get(argument.arg), symbol.module)
                if value is not UNKNOWN:
                    learned[symbol.module, name, argument.arg] = value
        return learned

    def function(self, key: Key) -> FunctionNode | None:
        symbol, method = key
        if symbol not in self.reach.kept or self.reach.chosen(symbol) is not None:
            return None
        statement = self.reach.units.node(symbol)
        if not method:
            return statement if isinstance(statement, FunctionNode) else None
        body = statement.body if isinstance(statement, ast.ClassDef) else []
        return next((p for p in body if isinstance(p, FunctionNode) and p.name == method), None)

    def _common(
        self, calls: list[tuple[ast.Call, Frame]], place: int, name: str, default: ast.expr | None, module: str
    ) -> Any:
        """What all calls pass for one parameter, where that is one simple constant."""
        seen: list[Any] = []
        for call, frame in calls:
            if any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords):
                return UNKNOWN
            given = next((k.value for k in call.keywords if k.arg == name), None)
            if given is None and place < len(call.args):
                given = call.args[place]
            if given is not None:
                value = self._value(given, frame)
            else:
                value = self._value(default, Frame(module)) if default is not None else UNKNOWN
            if not isinstance(value, _SIMPLE):
                return UNKNOWN
            seen.append(value)
        same = all(type(v) is type(seen[0]) and v == seen[0] for v in seen)
        return seen[0] if same else UNKNOWN

    def _value(self, node: ast.expr, frame: Frame) -> Any:
        if frame.module not in self._values:
            self._values[frame.module] = Values(self.package, self.types, frame.module, self.facts)
        return self._values[frame.module].value(node, frame)

    def no_ops(self) -> set[str]:
        """Functions and methods with nothing left in them."""
        found = set()
        for symbol, methods in self.reach.kept.items():
            if self.reach.chosen(symbol) is not None:
                continue
            statement = self.reach.units.node(symbol)
            if isinstance(statement, FunctionNode) and _is_empty(statement):
                found.add(symbol.name)
            for part in statement.body if isinstance(statement, ast.ClassDef) else []:
                if isinstance(part, FunctionNode) and part.name in methods and _is_empty(part):
                    others = [s for s, m in self.reach.kept.items() if s != symbol and part.name in m]
                    if not any(self._related(symbol, other) for other in others):
                        found.add(f"{symbol.name}.{part.name}")
        return found


def _owner(kind: Kind | None) -> Symbol | None:
    return None if kind is None or kind == MODULE else kind.symbol


def _is_empty(node: FunctionNode) -> bool:
    plain = all(_is_nothing(part) or (isinstance(part, ast.Return) and part.value is None) for part in node.body)
    return plain and not node.decorator_list


def _is_nothing(node: ast.stmt) -> bool:
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def _is_local(name: str, frame: Frame) -> bool:
    current: Frame | None = frame
    while current is not None:
        if isinstance(current.node, Scope) and name in locals_of(current.node):
            return True
        current = current.outer
    return False
