"""Functions of one expression put where they are called: those that are called once, or only name an attribute."""

from __future__ import annotations

import ast
from collections.abc import Mapping

from paramgolf.script.constants import Key
from paramgolf.script.fold import is_harmless
from paramgolf.script.nodes import FunctionNode, locals_of, walk
from paramgolf.script.sites import Site, Sites, parameters_of
from paramgolf.script.source import BUILTINS, Import, Symbol
from paramgolf.script.text import Edit, Text, apply
from paramgolf.script.units import Place

_LONGEST = 120  # characters of an expression that is moved
_SHORT = 32  # of one that is moved out of its class
_ATOMS = ast.Name | ast.Attribute | ast.Constant
_BOUND = ast.Call | ast.Subscript | ast.List | ast.Dict | ast.JoinedStr
_OPEN = (
    ast.Return | ast.Assign | ast.AnnAssign | ast.Expr | ast.Call | ast.keyword
)  # an expression needs no brackets there
_CONVERTERS = ("float", "int", "str", "bool", "bytes")
_SCOPED = ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


def inlined(sites: Sites) -> dict[Place, str]:
    """The texts that change."""
    units, edits = sites.reach.units, dict[Symbol, list[Edit]]()
    for key, calls in sites.known.items():
        value = _expression(key, sites)
        if value is None or (len(calls) > 1 and not isinstance(value, _ATOMS)):
            continue
        moved = [_moved(key, value, site, sites) for site in calls]
        if all(moved):
            for site, edit in zip(calls, moved, strict=True):
                edits.setdefault(site.home, []).append(edit or Edit(0, 0, ""))
    return {units.place(symbol): apply(units.unit(symbol).text, found) for symbol, found in edits.items()}


def _expression(key: Key, sites: Sites) -> ast.expr | None:
    """What a function returns whose only statement that is."""
    node = sites.constants.function(key)
    if node is None or node.decorator_list or key[1] == "__init__":
        return None
    body = [s for s in node.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    value = body[0].value if len(body) == 1 and isinstance(body[0], ast.Return) else None
    if value is None or len(ast.unparse(value)) > _LONGEST:
        return None
    return None if any(isinstance(part, ast.Yield | ast.Await | ast.NamedExpr) for part in ast.walk(value)) else value


def _moved(key: Key, value: ast.expr, site: Site, sites: Sites) -> Edit | None:
    """The call replaced by the expression; None where names or the order of evaluation forbid it."""
    node, home = sites.constants.function(key), Text(sites.reach.units.unit(site.home).text)
    assert node is not None
    given = _arguments(node, value, key, site)
    if given is None or any(part is site.call for part in ast.walk(value)):
        return None
    bound = {part.id for part in ast.walk(value) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    late = {
        name.id
        for part in ast.walk(value)
        if isinstance(part, _SCOPED)
        for name in ast.walk(part)
        if isinstance(name, ast.Name)
    }
    loads = [part for part in ast.walk(value) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)]
    for name, argument in given.items():
        count = sum(load.id == name for load in loads)
        used = {part.id for part in ast.walk(argument) if isinstance(part, ast.Name)}
        simple = isinstance(argument, _ATOMS)
        if used & bound or (not simple and (count > 1 or name in late)):
            return None
        if not count and not all(is_harmless(part) for part in ast.walk(argument)):
            return None
        if isinstance(argument, ast.Constant) and _is_converted(name, value):
            return None
    if isinstance(_parent(site, sites), ast.Expr) and not isinstance(value, ast.Call):
        return None
    imports: list[Import] = []
    for name in sorted({load.id for load in loads} - given.keys() - bound):
        needed = _import_for(name, key[0], site, sites)
        if needed is None:
            return None
        imports += needed
    sites.reach.package.add_imports(site.frame.module, imports)
    if isinstance(value, ast.Name) and value.id in given:
        value, text, given = given[value.id], home, {}
    else:
        text = Text(sites.reach.units.unit(key[0]).text)
    words = _filled_in(value, {name: _bracketed(argument, home) for name, argument in given.items()}, text)
    closed = isinstance(value, _ATOMS | _BOUND) and "\n" not in words
    closed = closed or (_stands_alone(site, sites) and not isinstance(value, ast.Tuple))
    return Edit(home.start(site.call), home.end(site.call), words if closed else f"({words})")


def _arguments(node: FunctionNode, value: ast.expr, key: Key, site: Site) -> dict[str, ast.expr] | None:
    """Parameter -> argument, the object of a method included; None where a default would be needed."""
    positional, keyword = parameters_of(node, bool(key[1]))
    given: dict[str, ast.expr] = dict(zip(positional, site.call.args, strict=False))
    given |= {k.arg: k.value for k in site.call.keywords if k.arg}
    if given.keys() != {*positional, *keyword}:
        return None
    if key[1]:
        base = site.call.func.value if isinstance(site.call.func, ast.Attribute) else None
        if not isinstance(base, ast.Name) or (base.id != "self" and len(ast.unparse(value)) > _SHORT):
            return None
        given[node.args.args[0].arg] = base
    return given


def _import_for(name: str, symbol: Symbol, site: Site, sites: Sites) -> list[Import] | None:
    """What the module of the call must import for `name` to mean what it means to `symbol`; None = it cannot."""
    package, frame = sites.reach.package, site.frame
    found, there = package.resolve(symbol.module, name), package.resolve(frame.module, name)
    if there is not None and there != found:
        return None
    module = frame.module
    while frame.outer is not None:
        if isinstance(frame.node, FunctionNode | ast.Lambda) and name in locals_of(frame.node):
            return None
        frame = frame.outer
    if found == there:
        return []
    if name in package.module(module).imports or name in BUILTINS:
        return None
    return [found if isinstance(found, Import) else Import(found.module, found.name, name)] if found else None


def _is_converted(name: str, value: ast.expr) -> bool:
    """Whether a parameter is given to `float` or its like."""
    calls = [part for part in ast.walk(value) if isinstance(part, ast.Call) and ast.unparse(part.func) in _CONVERTERS]
    return any(isinstance(argument, ast.Name) and argument.id == name for call in calls for argument in call.args)


def _bracketed(argument: ast.expr, home: Text) -> str:
    return home.of(argument) if isinstance(argument, _ATOMS | _BOUND) else f"({home.of(argument)})"


def _filled_in(value: ast.expr, given: Mapping[str, str], text: Text) -> str:
    start, edits = text.start(value), []
    for part in ast.walk(value):
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load) and part.id in given:
            edits.append(Edit(text.start(part) - start, text.end(part) - start, given[part.id]))
    return apply(text.of(value), edits)


def _stands_alone(site: Site, sites: Sites) -> bool:
    """Whether nothing could bind closer to the call than what is put in its place."""
    parent = _parent(site, sites)
    return isinstance(parent, _OPEN) and getattr(parent, "func", None) is not site.call


def _parent(site: Site, sites: Sites) -> ast.AST | None:
    for part in walk(sites.reach.units.node(site.home)):
        if any(child is site.call for child in ast.iter_child_nodes(part)):
            return part
    return None
