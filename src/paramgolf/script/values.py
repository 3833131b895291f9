"""What an expression comes to where a recipe decides it."""

from __future__ import annotations

import ast
import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from paramgolf.script.infer import Frame, Kind, Types
from paramgolf.script.nodes import FunctionNode, Scope, content_of
from paramgolf.script.source import Package, Symbol

PRESENT = type("Present", (), {"__repr__": lambda self: "PRESENT"})()  # a value of which only "not None" is known
FALSY = type("Falsy", (), {"__bool__": lambda self: False, "__repr__": lambda self: "FALSY"})()  # only that is known
UNKNOWN = object()
VAGUE = (PRESENT, FALSY, UNKNOWN)
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What holds for one recipe.

    values: (class, attribute) -> its value, or PRESENT.
    choices: (class, attribute) -> the values that its objects have.
    inline: those of them that are state: their assignments go and their reads become the value.
    absent: classes of which there is never an instance; what is annotated `X | None` is None.
    no_ops: `function` or `Class.method`: a statement that only calls it goes.
    parameters: (module, function or Class.method, parameter) -> what every call passes.
    guarded: modules that keep their checks of data.
    dead: (class, attribute) that nothing reads: their assignments go.
    returns: (module, function) -> the constant it returns.
    never: constants that nothing is ever equal to (codes of coders a script does not have).
    """

    values: dict[tuple[str, str], Any] = field(default_factory=dict)
    inline: frozenset[tuple[str, str]] = frozenset()
    choices: dict[tuple[str, str], frozenset[Any]] = field(default_factory=dict)
    absent: frozenset[Symbol] = frozenset()
    no_ops: frozenset[str] = frozenset()
    parameters: dict[tuple[str, str, str], Any] = field(default_factory=dict)
    dead: frozenset[tuple[str, str]] = frozenset()
    returns: dict[tuple[str, str], Any] = field(default_factory=dict)
    never: frozenset[Symbol] = frozenset()
    guarded: frozenset[str] = frozenset()


_PLAIN: dict[str, Callable[[Any], Any]] = {"bool": bool, "len": len, "list": list, "tuple": tuple}


class Values:
    """Evaluates expressions of one module under facts."""

    def __init__(self, package: Package, types: Types, module: str, facts: Facts) -> None:
        self.package, self.types, self.module, self.facts = package, types, module, facts

    def value(self, node: ast.expr, frame: Frame) -> Any:
        """The value of an expression where the facts tell it, PRESENT where they only tell that it is not None."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self._name_value(node.id, frame)
        if isinstance(node, ast.Attribute):
            return self._attribute_value(node, frame)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self.value(node.operand, frame)
            return inner if inner is UNKNOWN else inner is not PRESENT and not inner
        if isinstance(node, ast.BoolOp):
            return self._bool_value(node, frame)
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            return self._compare_value(node, frame)
        if isinstance(node, ast.Compare):
            sides = itertools.pairwise([node.left, *node.comparators])
            links = [ast.Compare(a, [op], [b]) for (a, b), op in zip(sides, node.ops, strict=True)]
            return self._bool_value(ast.BoolOp(ast.And(), list[ast.expr](links)), frame)
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            parts = [self.value(part, frame) for part in node.elts]
            return UNKNOWN if any(p in VAGUE for p in parts) else tuple(parts)
        if isinstance(node, ast.Call):
            return self._call_value(node, frame)
        return UNKNOWN

    def _call_value(self, node: ast.Call, frame: Frame) -> Any:
        if isinstance(node.func, ast.Name) and node.func.id in ("any", "all", "sorted") and node.args:
            first = node.args[0]
            source = first.generators[0].iter if isinstance(first, ast.GeneratorExp) else first
            value = self.value(source, frame)
            empty = isinstance(value, tuple | list) and not value
            return {"any": False, "all": True, "sorted": ()}[node.func.id] if empty else UNKNOWN
        if isinstance(node.func, ast.Name) and node.func.id in ("bool", "len", "list", "tuple") and len(node.args) == 1:
            value = self.value(node.args[0], frame)
            return _PLAIN[node.func.id](value) if value not in VAGUE else UNKNOWN
        found = self.package.resolve_path(self.module, node.func)
        if isinstance(found, Symbol) and found.name:
            statement = self.package.module(found.module).definitions.get(found.name)
            if isinstance(statement, FunctionNode) and not statement.decorator_list:
                if (found.module, found.name) in self.facts.returns:
                    return self.facts.returns[found.module, found.name]
                return self._returned(found.module, statement)
        if isinstance(node.func, ast.Name) and node.func.id == "isinstance" and found is None:
            return False if self.value(node.args[0], frame) is None else UNKNOWN
        if isinstance(node.func, ast.Attribute) and found is None:
            base = self.types.infer(node.func.value, frame)
            method = self.types.method(base.symbol, node.func.attr) if base is not None and not base.many else None
            if (
                method is not None
                and (key := (method[0].module, f"{method[0].name}.{node.func.attr}")) in self.facts.returns
            ):
                return self.facts.returns[key]
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("items", "keys", "values") and not node.args:
            value = self.value(node.func.value, frame)
            return list(getattr(value, node.func.attr)()) if isinstance(value, dict) else UNKNOWN
        return UNKNOWN

    def _returned(self, module: str, function: FunctionNode) -> Any:
        """What a function returns whose only statement is one expression of the recipe."""
        body = [s for s in function.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
        if len(body) != 1 or not isinstance(body[0], ast.Return) or body[0].value is None:
            return UNKNOWN
        return Values(self.package, self.types, module, self.facts).value(body[0].value, Frame(module, None, function))

    def _name_value(self, name: str, frame: Frame) -> Any:
        current: Frame | None = frame
        while current is not None:
            if isinstance(current.node, FunctionNode | ast.Lambda):
                found = self._local_value(name, current.node, current)
                if found is not None:
                    return found[0]
            current = current.outer
        return self._global_value(name)

    def _global_value(self, name: str) -> Any:
        """Of a module's own constants the sets and numbers that are written out."""
        found = self.package.resolve(self.module, name)
        if not isinstance(found, Symbol) or not found.name:
            return UNKNOWN
        statement = self.package.module(found.module).definitions[found.name]
        node = statement.value if isinstance(statement, ast.Assign) and len(statement.targets) == 1 else None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "frozenset" and node.args:
            node = node.args[0]
        try:
            value = ast.literal_eval(node) if node is not None else UNKNOWN
        except ValueError:
            return UNKNOWN
        return value if isinstance(value, set | int | float | str) else UNKNOWN

    def _local_value(self, name: str, scope: Scope, frame: Frame) -> tuple[Any] | None:
        """The value of a local that is bound once, to something known; None when the scope does not bind it."""
        for argument in [*scope.args.posonlyargs, *scope.args.args, *scope.args.kwonlyargs]:
            if argument.arg == name:
                if name in content_of(scope).stores:
                    return (UNKNOWN,)
                if self.is_absent(self.types.annotation(self.module, argument.annotation)):
                    return (None,)
                return (self.facts.parameters.get((self.module, function_key(frame), name), UNKNOWN),)
        stores = content_of(scope).stores.get(name)
        if not stores:
            return None
        if len(stores) == 1:
            for target, value, _ in content_of(scope).assigned:
                if target is stores[0] and value is not None:
                    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
                        return (UNKNOWN,)  # it may be changed later
                    known = self.value(value, frame)
                    made = isinstance(value, ast.Call) and isinstance(known, list | tuple | dict)
                    return (UNKNOWN if made else known,)
        return (UNKNOWN,)

    def _attribute_value(self, node: ast.Attribute, frame: Frame) -> Any:
        base = self.types.infer(node.value, frame)
        if base is None or base.many:
            return UNKNOWN
        for symbol in self.package.bases(base.symbol):
            if (symbol.name, node.attr) in self.facts.values:
                return self.facts.values[symbol.name, node.attr]
        return None if self.is_absent(self.types.attribute(base.symbol, node.attr)) else UNKNOWN

    def _bool_value(self, node: ast.BoolOp, frame: Frame) -> Any:
        neutral = isinstance(node.op, ast.And)
        unknown: list[ast.expr] = []
        result: Any = neutral
        for operand in node.values:
            value = self.value(operand, frame)
            if value is UNKNOWN:
                unknown.append(operand)
                continue
            result = value
            if (value is PRESENT or bool(value)) is not neutral:
                if not unknown:
                    return value
                exact = isinstance(value, bool) and all(isinstance(part, ast.Compare) for part in unknown)
                return value if exact else FALSY if neutral else PRESENT
        return UNKNOWN if unknown else result

    def _choices(self, node: ast.expr, frame: Frame) -> frozenset[Any] | None:
        """The values that an attribute has in some object or other."""
        base = self.types.infer(node.value, frame) if isinstance(node, ast.Attribute) else None
        return None if base is None else self.facts.choices.get((base.symbol.name, getattr(node, "attr", "")))

    def _is_never(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and self.package.resolve(self.module, node.id) in self.facts.never

    def _compare_value(self, node: ast.Compare, frame: Frame) -> Any:
        left, right = self.value(node.left, frame), self.value(node.comparators[0], frame)
        if isinstance(node.ops[0], ast.Eq) and self._is_never(node.comparators[0]):
            return False
        if left is UNKNOWN and right is not UNKNOWN and isinstance(node.ops[0], ast.Eq | ast.In | ast.NotEq):
            choices = self._choices(node.left, frame)
            wanted = right if isinstance(node.ops[0], ast.In) else (right,)
            if choices is not None and not any(choice in wanted for choice in choices):
                return isinstance(node.ops[0], ast.NotEq)
        if left is UNKNOWN or right is UNKNOWN:
            return UNKNOWN
        if FALSY in (left, right):
            return UNKNOWN
        if isinstance(node.ops[0], ast.Is | ast.IsNot):
            if PRESENT in (left, right) and None not in (left, right):
                return UNKNOWN
            same = left is right
            return same if isinstance(node.ops[0], ast.Is) else not same
        if PRESENT in (left, right):
            return UNKNOWN
        return _COMPARE[type(node.ops[0])](left, right)

    def is_absent(self, kind: Kind | None) -> bool:
        return kind is not None and not kind.many and kind.symbol in self.facts.absent


def function_key(frame: Frame) -> str:
    """`name` or `Class.name` of the top-level function or method that a frame is in, else ""."""
    node, outer = frame.node, frame.outer
    if not isinstance(node, FunctionNode) or outer is None:
        return ""
    if isinstance(outer.node, ast.ClassDef):
        return f"{outer.node.name}.{node.name}"
    return node.name if outer.node is None and outer.owner is None else ""
