"""What a script needs of the package: definitions reachable by name from its entry, methods of classes included."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence

from paramgolf.script.infer import EXTERNAL, MODULE, Frame, Types
from paramgolf.script.nodes import FunctionNode, Scope, locals_of
from paramgolf.script.source import Import, Package, Symbol, bound_names, target_of
from paramgolf.script.units import Units

# Called by torch or by Python itself, never by name.
ALWAYS = frozenset({"forward", "backward"})
# Class attributes that mean nothing outside the package.
DROPPED = frozenset({"__pydantic_config__", "excludes"})


class Reach:
    """The closure of `entry`. `kept`: symbol -> None, or for a class the names of its methods that are needed."""

    def __init__(self, package: Package, units: Units, types: Types, registries: Mapping[str, Sequence[str]]) -> None:
        self.package, self.units = package, units
        self.types = types
        self.registries = registries
        self.kept: dict[Symbol, set[str]] = {}
        self.externals: set[Import] = set()
        self._named: set[str] = set()  # attributes of objects of unknown class
        self._typed: set[tuple[Symbol, str]] = set()
        self._waiting: list[Symbol] = []
        self._relations: dict[tuple[Symbol, Symbol], bool] = {}

    def run(self, entry: Symbol) -> None:
        self._want(entry)
        while self._waiting or self._new_methods():
            while self._waiting:
                symbol = self._waiting.pop()
                self._visit(symbol)

    def reads(self, kind: str, name: str) -> bool:
        """Whether the code reads attribute `name` of class `kind`, or of something unknown."""
        return name in self._named or any(s.name == kind and attribute == name for s, attribute in self._typed)

    def chosen(self, symbol: Symbol) -> dict[str, Symbol] | None:
        """The entries of a registry that the script has; None for what is no registry."""
        entries = self.package.registry(symbol)
        if entries is None:
            return None
        names = self.registries.get(symbol.name, ())
        return {name: target_of(entries[name]) for name in names}

    def _want(self, symbol: Symbol) -> None:
        if symbol.name and symbol not in self.kept:
            self.kept[symbol] = set()
            self._waiting.append(symbol)

    def _visit(self, symbol: Symbol) -> None:
        chosen = self.chosen(symbol)
        if chosen is not None:
            for target in chosen.values():
                self._want(target)
            return
        statement = self.units.node(symbol)
        for name in bound_names(statement):
            self._want(Symbol(symbol.module, name))
        if isinstance(statement, ast.ClassDef):
            self._visit_class(symbol, statement)
        else:
            self._scan(statement, Frame(symbol.module))

    def _visit_class(self, symbol: Symbol, node: ast.ClassDef) -> None:
        frame = Frame(symbol.module, symbol, node)
        for part in [*node.decorator_list, *node.bases, *(k.value for k in node.keywords)]:
            self._scan(part, frame)
        for statement in node.body:
            if not isinstance(statement, FunctionNode) and not DROPPED & set(bound_names(statement)):
                self._scan(statement, frame)

    def _new_methods(self) -> bool:
        """Scan methods that have become needed; whether there were any."""
        found = False
        for symbol in list(self.kept):
            if self.chosen(symbol) is not None or self.package.class_node(symbol) is None:
                continue
            node = self.units.node(symbol)
            assert isinstance(node, ast.ClassDef)
            for method in node.body:
                if not isinstance(method, FunctionNode) or method.name in self.kept[symbol]:
                    continue
                if self._is_needed(symbol, method.name):
                    found = True
                    self.kept[symbol].add(method.name)
                    self._scan(method, Frame(symbol.module, symbol))
        return found

    def _is_needed(self, symbol: Symbol, name: str) -> bool:
        if name in ALWAYS or name in self._named or (name.startswith("__") and name.endswith("__")):
            return True
        return any(attribute == name and self.related(symbol, owner) for owner, attribute in self._typed)

    def related(self, one: Symbol, other: Symbol) -> bool:
        """Whether an object of one class may be meant by the other: by inheritance, or as a protocol asks."""
        if (one, other) not in self._relations:
            if MODULE.symbol in (one, other):
                return self.is_module(other if one == MODULE.symbol else one)
            inherits = one in self.package.bases(other) or other in self.package.bases(one)
            fits = self._methods(one) >= self._methods(other) and self.types.is_protocol(other)
            self._relations[one, other] = inherits or fits
        return self._relations[one, other]

    def is_module(self, symbol: Symbol) -> bool:
        """Whether a class is a module of torch, whose attributes torch looks at by itself."""
        nodes = [self.package.class_node(base) for base in self.package.bases(symbol)]
        return any(ast.unparse(base).startswith("nn.") for node in nodes if node for base in node.bases)

    def _methods(self, symbol: Symbol) -> set[str]:
        nodes = [self.package.class_node(base) for base in self.package.bases(symbol)]
        return {part.name for node in nodes if node for part in node.body if isinstance(part, FunctionNode)}

    def _scan(self, node: ast.AST, frame: Frame, shadowed: frozenset[str] = frozenset()) -> None:
        """Everything a piece of code refers to; annotations do not count."""
        if isinstance(node, FunctionNode | ast.Lambda):
            self._scan_function(node, frame, shadowed)
        elif isinstance(node, ast.AnnAssign):
            for part in (node.target, node.value):
                if part is not None:
                    self._scan(part, frame, shadowed)
        elif isinstance(node, ast.Name):
            if node.id not in shadowed and isinstance(node.ctx, ast.Load):
                self._refer(frame.module, node)
        elif isinstance(node, ast.Attribute):
            self._scan_attribute(node, frame, shadowed)
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            for child in ast.iter_child_nodes(node):
                self._scan(child, frame, shadowed)

    def _scan_function(self, node: Scope, frame: Frame, shadowed: frozenset[str]) -> None:
        outside = [*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)]
        outside += node.decorator_list if isinstance(node, FunctionNode) else []
        for part in outside:
            self._scan(part, frame, shadowed)
        inner = shadowed | locals_of(node)
        for statement in node.body if isinstance(node.body, list) else [node.body]:
            self._scan(statement, Frame(frame.module, frame.owner, node, frame), inner)

    def _scan_attribute(self, node: ast.Attribute, frame: Frame, shadowed: frozenset[str]) -> None:
        base_shadowed = isinstance(node.value, ast.Name) and node.value.id in shadowed
        if not base_shadowed and self._refer(frame.module, node):
            return
        kind = self.types.infer(node.value, frame)
        if kind is None or (kind.many and kind != EXTERNAL):
            self._named.add(node.attr)
        elif kind != EXTERNAL:
            self._typed.add((kind.symbol, node.attr))
        self._scan(node.value, frame, shadowed)

    def _refer(self, module: str, node: ast.expr) -> bool:
        found = self.package.resolve_path(module, node)
        if isinstance(found, Symbol):
            self._want(found)
        elif isinstance(found, Import) and found.alias not in self.package.module(module).local_imports:
            self.externals.add(found)
        return found is not None


def annotated(node: ast.AST) -> Iterator[tuple[ast.AST, ast.expr]]:
    """(holder, annotation) of everything annotated inside."""
    for part in ast.walk(node):
        if isinstance(part, ast.arg | ast.AnnAssign) and part.annotation is not None:
            yield part, part.annotation
        elif isinstance(part, FunctionNode) and part.returns is not None:
            yield part, part.returns


def scopes(node: ast.AST, outer: tuple[Scope, ...] = ()) -> Iterator[tuple[ast.AST, tuple[Scope, ...]]]:
    """Every node with the functions around it, outermost first."""
    yield node, outer
    inner = (*outer, node) if isinstance(node, FunctionNode | ast.Lambda) else outer
    for name, value in ast.iter_fields(node):
        here = outer if name in ("decorator_list", "returns", "args") else inner
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, ast.AST):
                yield from scopes(part, here)
