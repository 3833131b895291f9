"""A light view of types, from annotations and constructor calls: enough to know whose attribute is meant."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from paramgolf.script.nodes import FunctionNode, content_of
from paramgolf.script.source import BUILTINS, Import, Package, Symbol, target_of

_MANY = {"list", "tuple", "set", "Sequence", "Iterable", "Iterator", "dict", "Mapping", "frozenset"}


class Kind(NamedTuple):
    """A class of the package; `many` = a collection of it."""

    symbol: Symbol
    many: bool = False


EXTERNAL = Kind(Symbol("", "?"))  # something whose class is not of the package: its attributes are not ours
MODULE = Kind(Symbol("", "nn.Module"))  # some module of torch, which may be one of ours
_ELEMENTS = frozenset({"values", "pop", "get", "items"})
_SUBMODULES = frozenset({"modules", "named_modules", "children", "named_children"})
_SAME = frozenset({"to", "eval", "train", "cpu", "cuda"})  # methods of torch modules that return the module
_OPEN = frozenset({"Any", "Callable", "object", "type", "getattr", "map", "filter", "zip", "next", "iter", "cast"})


@dataclass
class Frame:
    """A function being looked at, with the class it belongs to and the function around it."""

    module: str
    owner: Symbol | None = None
    node: ast.AST | None = None
    outer: Frame | None = None


class Types:
    """Answers by module, class and function; unknown is None."""

    def __init__(self, package: Package, registries: Mapping[str, Sequence[str]] | None = None) -> None:
        self.package = package
        self.registries = registries or {}
        self._attributes: dict[tuple[Symbol, str], Kind | None] = {}
        self._locals: dict[int, dict[str, Kind | None]] = {}
        self._kept: list[ast.AST] = []  # nodes whose ids are keys above stay alive

    def annotation(self, module: str, node: ast.expr | None) -> Kind | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        if isinstance(node, ast.Name | ast.Attribute):
            found = self.package.resolve_path(module, node)
            if isinstance(found, Symbol) and found.name and self.package.class_node(found) is not None:
                return Kind(found)
            if isinstance(found, Symbol) and found.name:
                alias = self.package.statement(found)
                return self.annotation(found.module, alias.value) if isinstance(alias, ast.Assign) else None
            name = ast.unparse(node)
            if name == "nn.Module":
                return MODULE
            outside = isinstance(found, Import) or (found is None and name.split(".")[0] in BUILTINS)
            return EXTERNAL if outside and name not in _OPEN else None
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            sides = [self.annotation(module, side) for side in (node.left, node.right)]
            none = [isinstance(side, ast.Constant) and side.value is None for side in (node.left, node.right)]
            known = [side for side in sides if side is not None and side != EXTERNAL]
            if sum(side is not None for side in sides) + sum(none) < 2:
                return None
            if not known:
                return EXTERNAL
            return known[0] if len(known) == 1 and any(none) else None
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in _MANY:
            inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            kinds = [self.annotation(module, part) for part in inner if not _is_dots(part)]
            known = [kind for kind in kinds if kind is not None and kind != EXTERNAL]
            if not known:
                return EXTERNAL if all(kinds) else None
            return known[-1]._replace(many=True) if not known[-1].many else None
        return None

    def is_protocol(self, symbol: Symbol) -> bool:
        node = self.package.class_node(symbol)
        return node is not None and any(ast.unparse(base) == "Protocol" for base in node.bases)

    def attribute(self, symbol: Symbol, name: str) -> Kind | None:
        """The type of an attribute or property of instances of a class."""
        for base in self.package.bases(symbol):
            key = (base, name)
            if key not in self._attributes:
                self._attributes[key] = None  # a cycle ends here
                self._attributes[key] = self._own_attribute(base, name)
            if self._attributes[key] is not None:
                return self._attributes[key]
        return None

    def method(self, symbol: Symbol, name: str) -> tuple[Symbol, FunctionNode] | None:
        """The class that defines a method of `symbol`, and the method."""
        for base in self.package.bases(symbol):
            node = self.package.class_node(base)
            for statement in node.body if node else []:
                if isinstance(statement, FunctionNode) and statement.name == name:
                    return base, statement
        return None

    def _own_attribute(self, symbol: Symbol, name: str) -> Kind | None:
        node = self.package.class_node(symbol)
        assert node is not None
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and _is_name(statement.target, name):
                return self.annotation(symbol.module, statement.annotation)
            if isinstance(statement, FunctionNode) and statement.name == name:
                decorators = {ast.unparse(d).split(".")[-1] for d in statement.decorator_list}
                if decorators & {"property", "cached_property"}:
                    return self.annotation(symbol.module, statement.returns)
        for method in node.body:
            if isinstance(method, FunctionNode):
                frame = Frame(symbol.module, symbol, method)
                for target, value, note in content_of(method).assigned:
                    if isinstance(target, ast.Attribute) and _is_name(target.value, "self") and target.attr == name:
                        found = self.annotation(symbol.module, note) or self.infer(value, frame)
                        if found is not None:
                            return found
        return None

    def infer(self, node: ast.expr | None, frame: Frame) -> Kind | None:
        if isinstance(node, ast.Name):
            return self._name(node.id, frame)
        if isinstance(node, ast.Attribute):
            found = self.package.resolve_path(frame.module, node)
            if isinstance(found, Import):
                return EXTERNAL
            base = self.infer(node.value, frame)
            if base is None or base in (MODULE, EXTERNAL) or base.many:
                return EXTERNAL if base == EXTERNAL else None
            return self.attribute(base.symbol, node.attr)
        if isinstance(node, ast.Constant | ast.JoinedStr | ast.Compare):
            return EXTERNAL
        if isinstance(node, ast.BinOp):
            return self.infer(node.left, frame) or self.infer(node.right, frame)
        if isinstance(node, ast.Call):
            return self._call(node, frame)
        if isinstance(node, ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp):
            inner = self.infer(node.value if isinstance(node, ast.DictComp) else node.elt, frame)
            return inner if inner == EXTERNAL or inner is None else inner._replace(many=True)
        if isinstance(node, ast.Subscript):
            base = self._chosen(node.value, frame) or self.infer(node.value, frame)
            return EXTERNAL if base == EXTERNAL else base._replace(many=False) if base and base.many else None
        if isinstance(node, ast.IfExp):
            return self.infer(node.body, frame) or self.infer(node.orelse, frame)
        return None

    def _chosen(self, node: ast.expr, frame: Frame) -> Kind | None:
        """The entry of a registry of which a script has one."""
        found = self.package.resolve_path(frame.module, node)
        if not isinstance(found, Symbol) or not found.name:
            return None
        entries, names = self.package.registry(found), self.registries.get(found.name, ())
        if not entries or len(names) != 1 or names[0] not in entries:
            return None
        target = target_of(entries[names[0]])
        return Kind(target, many=True) if self.package.class_node(target) is not None else None

    def _call(self, node: ast.Call, frame: Frame) -> Kind | None:
        if isinstance(node.func, ast.Name) and node.func.id in ("list", "sorted", "reversed", "tuple") and node.args:
            return self.infer(node.args[0], frame)
        through = self._same_as(node)
        if through is not None:
            return self.infer(through, frame)
        if isinstance(node.func, ast.Name) and node.func.id == "cast":
            return self.annotation(frame.module, node.args[0])
        found = self.package.resolve_path(frame.module, node.func)
        if isinstance(found, Symbol) and found.name:
            statement = self.package.module(found.module).definitions.get(found.name)
            if isinstance(statement, ast.ClassDef):
                return Kind(found)
            return self.annotation(found.module, statement.returns) if isinstance(statement, FunctionNode) else None
        if isinstance(found, Import) or (
            isinstance(node.func, ast.Name) and found is None and node.func.id in BUILTINS - _OPEN
        ):
            return EXTERNAL
        if isinstance(node.func, ast.Attribute):
            base = self.infer(node.func.value, frame)
            return self._result(base, node.func.attr) if base is not None else None
        return None

    def _result(self, base: Kind, name: str) -> Kind | None:
        """What method `name` of something known returns."""
        if base == EXTERNAL:
            return EXTERNAL
        if base.many:
            return base._replace(many=name in ("values", "items")) if name in _ELEMENTS else None
        if name in _SUBMODULES:
            return MODULE._replace(many=True)
        if base == MODULE:
            return MODULE if name in _SAME else EXTERNAL
        method = self.method(base.symbol, name)
        if method is not None:
            return self.annotation(method[0].module, method[1].returns)
        return base if name in _SAME else None

    def _same_as(self, node: ast.Call) -> ast.expr | None:
        """The expression whose kind a call has too."""
        if isinstance(node.func, ast.Subscript):
            return node.func
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        listed = isinstance(node.func, ast.Name) and name in ("list", "sorted", "reversed", "tuple")
        return node.args[0] if node.args and (listed or name in ("replace", "deepcopy")) else None

    def _name(self, name: str, frame: Frame) -> Kind | None:
        current: Frame | None = frame
        while current is not None:
            if name == "self" and current.owner is not None:
                return Kind(current.owner)
            if name == "cls" and current.owner is not None:
                return None
            if isinstance(current.node, FunctionNode | ast.Lambda):
                known = self._function_locals(current)
                if name in known:
                    return known[name]
            current = current.outer
        found = self.package.resolve(frame.module, name)
        if isinstance(found, Symbol) and found.name:
            statement = self.package.module(found.module).definitions[found.name]
            if isinstance(statement, ast.AnnAssign):
                return self.annotation(found.module, statement.annotation)
            if isinstance(statement, ast.Assign):
                return self.infer(statement.value, Frame(found.module))
            if isinstance(statement, ast.ClassDef):
                return Kind(found)
        return None

    def _function_locals(self, frame: Frame) -> dict[str, Kind | None]:
        node = frame.node
        assert isinstance(node, FunctionNode | ast.Lambda)
        if id(node) not in self._locals:
            known: dict[str, Kind | None] = {}
            self._locals[id(node)] = known
            self._kept.append(node)
            every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            for argument in every:
                if argument.arg != "self":
                    known[argument.arg] = self.annotation(frame.module, argument.annotation)
            if isinstance(node, FunctionNode):
                self._assigned_locals(node, frame, known)
        return self._locals[id(node)]

    def _assigned_locals(self, node: FunctionNode, frame: Frame, known: dict[str, Kind | None]) -> None:
        for target, value, note in content_of(node).assigned:
            if isinstance(target, ast.Name):
                kind = self.annotation(frame.module, note) or self.infer(value, frame)
                known[target.id] = kind if known.get(target.id, kind) == kind else None
        for variable, collection in content_of(node).loops:
            _bind_elements(variable, collection, self, frame, known)


def _bind_elements(
    target: ast.expr, source: ast.expr, types: Types, frame: Frame, known: dict[str, Kind | None]
) -> None:
    """The loop variable of a collection whose elements are known; (index, element) and (key, element) pairs too."""
    if isinstance(source, ast.Call) and isinstance(source.func, ast.Name) and source.func.id == "enumerate":
        source = source.args[0]
    kind = types.infer(source, frame)
    if kind == EXTERNAL:
        for part in ast.walk(target):
            if isinstance(part, ast.Name):
                known.setdefault(part.id, EXTERNAL)
    if kind is None or not kind.many:
        return
    variable = target.elts[-1] if isinstance(target, ast.Tuple) and len(target.elts) == 2 else target
    if isinstance(variable, ast.Name):
        known.setdefault(variable.id, kind._replace(many=False))


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is_dots(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...
