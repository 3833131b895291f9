"""What is in a function, worked out once for each syntax node: what it binds, reads, assigns and loops over."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Assigned = tuple[ast.expr, ast.expr | None, ast.expr | None]
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
Scope = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


class ByNode(Generic[T]):
    """Something worked out once for each node."""

    def __init__(self, work: Callable[[Any], T]) -> None:
        self._work = work
        self._known: dict[int, tuple[Any, T]] = {}  # with the node, so that its id stays its own

    def __call__(self, node: Any) -> T:
        found = self._known.get(id(node))
        if found is None:
            found = self._known[id(node)] = (node, self._work(node))
        return found[1]

    def clear(self) -> None:
        self._known.clear()


@dataclass
class Content:
    """What a piece of code holds, nested functions included.

    stores: name -> where it is bound. loads: names that are read. changed: those of `x += 1`. assigned: (target, value,
    annotation) of every assignment, tuples taken apart. loops: (target, collection). shares: whether a name of an outer
    scope is bound.
    """

    stores: dict[str, list[ast.Name]] = field(default_factory=dict)
    loads: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)
    assigned: list[Assigned] = field(default_factory=list)
    loops: list[tuple[ast.expr, ast.expr]] = field(default_factory=list)
    shares: bool = False

    @cached_property
    def flags(self) -> set[str]:
        """Names that are set to None, true or false somewhere."""
        return {
            target.id
            for target, value, _ in self.assigned
            if isinstance(target, ast.Name) and isinstance(value, ast.Constant) and value.value in (None, True, False)
        }


def _content(node: ast.AST) -> Content:
    found = Content()
    for part in walk(node):
        if isinstance(part, ast.Name):
            if isinstance(part.ctx, ast.Load):
                found.loads.add(part.id)
            else:
                found.stores.setdefault(part.id, []).append(part)
        elif isinstance(part, ast.Assign):
            for target in part.targets:
                if isinstance(target, ast.Tuple) and isinstance(part.value, ast.Tuple):
                    found.assigned += [(t, v, None) for t, v in zip(target.elts, part.value.elts, strict=False)]
                else:
                    found.assigned.append((target, part.value, None))
        elif isinstance(part, ast.AugAssign) and isinstance(part.target, ast.Name):
            found.changed.add(part.target.id)
        elif isinstance(part, ast.AnnAssign | ast.NamedExpr):
            found.assigned.append((part.target, part.value, getattr(part, "annotation", None)))
        elif isinstance(part, ast.withitem) and part.optional_vars is not None:
            found.assigned.append((part.optional_vars, part.context_expr, None))
        elif isinstance(part, ast.For | ast.comprehension):
            found.loops.append((part.target, part.iter))
        elif isinstance(part, ast.Global | ast.Nonlocal):
            found.shares = True
    return found


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """Every node inside, in the order of the text; quicker than `ast.walk`."""
    waiting = [node]
    while waiting:
        part = waiting.pop()
        yield part
        below: list[ast.AST] = []
        for name in part._fields:
            value = getattr(part, name, None)
            if isinstance(value, ast.AST):
                below.append(value)
            elif isinstance(value, list):
                below += [child for child in value if isinstance(child, ast.AST)]
        waiting += reversed(below)


def _locals(scope: Scope) -> set[str]:
    arguments = scope.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    every += [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
    names = {argument.arg for argument in every}
    waiting: list[ast.AST] = [*scope.body] if isinstance(scope.body, list) else [scope.body]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
            names.add(node.id)
        elif isinstance(node, FunctionNode | ast.ClassDef | ast.ExceptHandler):
            names.add(node.name or "")
        if not isinstance(node, FunctionNode | ast.ClassDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return names


content_of = ByNode(_content)
locals_of = ByNode(_locals)  # names that a function binds itself, nested functions not entered


def forget() -> None:
    """Let go of the trees of a finished generation."""
    content_of.clear()
    locals_of.clear()
