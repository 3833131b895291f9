"""Statements merged where that changes nothing: neighbouring assignments, branches that only return, last values."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from paramgolf.script.nodes import FunctionNode
from paramgolf.script.text import Edit, Text, apply

WIDTH = 120
_PASSES = 30


def tighten(text: str, *, short: bool, merged: bool) -> str:
    """`text` with fewer lines and the same meaning.

    Branches that only choose a value become an expression, as ruff asks for. With `short` values that are used once go
    where they are used (comments would be lost); with `merged` neighbouring assignments and fields become one line.
    """
    if not short and "else:" not in text:
        return text
    text = _short_records(text) if merged else text
    for _ in range(_PASSES):
        place = Text(text)
        edits = [
            edit
            for body, function in _suites(ast.parse(text))
            for edit in _merges(body, function, place, short, merged)
        ]
        if not edits:
            break
        text = apply(text, edits)
    return text


def _short_records(text: str) -> str:
    """Dataclasses as calls of `make_dataclass`, with their methods below."""
    place, edits = Text(text), []
    for node in ast.parse(text).body:
        fields = (
            [part for part in node.body if isinstance(part, ast.AnnAssign)] if isinstance(node, ast.ClassDef) else []
        )
        if not isinstance(node, ast.ClassDef) or node.bases or len(fields) < 2 or len(node.decorator_list) != 1:
            continue
        methods = [part for part in node.body if isinstance(part, FunctionNode)]
        made = {method.name for method in methods} & {"__post_init__", "__init__"}
        if made or len(fields) + len(methods) != len(node.body) or node.body[: len(fields)] != fields:
            continue
        decorator = node.decorator_list[0]
        keywords = decorator.keywords if isinstance(decorator, ast.Call) else []
        if ast.unparse(decorator).split("(")[0] != "dataclass":
            continue
        rows = [
            f'"{ast.unparse(f.target)}"'
            if f.value is None
            else f'("{ast.unparse(f.target)}", Any, {place.of(f.value)})'
            for f in fields
        ]
        call = f'make_dataclass("{node.name}", [{", ".join(rows)}]'
        call += "".join(f", {place.of(keyword)}" for keyword in keywords) + ")"
        line = f"class {node.name}({call}):" if methods else f"{node.name} = {call}"
        last = (methods[0].lineno - len(methods[0].decorator_list) - 1) if methods else node.end_lineno or 0
        edits.append(place.whole_lines(decorator.lineno, last, f"{line}\n"))
    return apply(text, edits)


def _suites(tree: ast.AST, function: ast.AST | None = None) -> Iterator[tuple[list[ast.stmt], ast.AST | None]]:
    """Every list of statements with the function it is in."""
    for _, value in ast.iter_fields(tree):
        statements = isinstance(value, list) and value and isinstance(value[0], ast.stmt)
        if statements and not isinstance(tree, ast.Module | ast.ClassDef):
            yield value, tree if isinstance(tree, FunctionNode) else function
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, ast.AST):
                yield from _suites(part, part if isinstance(part, FunctionNode) else function)


def _merges(body: list[ast.stmt], function: ast.AST | None, place: Text, short: bool, merged: bool) -> Iterator[Edit]:
    at = 0
    while at < len(body):
        one, two = body[at], body[at + 1] if at + 1 < len(body) else None
        line = _ternary(one, place)
        if line is None and short and two is not None:
            line = _conditional_return(one, two, place) or _used_once(one, two, function, place)
            line = line or (_joined(one, two, place) if merged else None)
            last = two
        else:
            last = one
        if line is not None and one.col_offset + len(line) <= WIDTH:
            first, end = one.lineno, last.end_lineno or 0
            if last is two and isinstance(two, ast.If | ast.For | ast.While | ast.With) and line.endswith(":"):
                end = two.lineno  # only its head is on this line
            yield place.whole_lines(first, end, f"{' ' * one.col_offset}{line}\n")
            at += 1 if last is one else 2
        else:
            at += 1


def _value(node: ast.expr | None, place: Text) -> str | None:
    """The text of an expression on one line, in brackets where it would not bind."""
    if node is None or node.lineno != node.end_lineno:
        return None
    text = place.of(node)
    loose = isinstance(node, ast.IfExp | ast.Lambda | ast.NamedExpr | ast.Yield)
    loose = loose or (isinstance(node, ast.Tuple) and not text.startswith("("))
    return f"({text})" if loose else text


def _ternary(node: ast.stmt, place: Text) -> str | None:
    """`x = a if c else b` for an `if` whose branches only bind one name."""
    if not isinstance(node, ast.If) or len(node.body) != 1 or len(node.orelse) != 1:
        return None
    yes, no = node.body[0], node.orelse[0]
    if place.line(node.lineno).lstrip().startswith("elif") or "#" in place.of(node):
        return None
    if isinstance(yes, ast.Return) and isinstance(no, ast.Return):
        parts = [_value(yes.value, place), _value(node.test, place), _value(no.value, place)]
        return None if None in parts else f"return {parts[0]} if {parts[1]} else {parts[2]}"
    if not isinstance(yes, ast.Assign) or not isinstance(no, ast.Assign):
        return None
    if ast.dump(yes.targets[0]) != ast.dump(no.targets[0]) or isinstance(yes.targets[0], ast.Tuple):
        return None
    parts = [_value(yes.value, place), _value(node.test, place), _value(no.value, place)]
    return None if None in parts else f"{place.of(yes.targets[0])} = {parts[0]} if {parts[1]} else {parts[2]}"


def _conditional_return(one: ast.stmt, two: ast.stmt, place: Text) -> str | None:
    """`return a if c else b` for `if c: return a` before `return b`."""
    if not isinstance(one, ast.If) or one.orelse or len(one.body) != 1 or not isinstance(two, ast.Return):
        return None
    inner = one.body[0]
    if not isinstance(inner, ast.Return) or place.line(one.lineno).lstrip().startswith("elif"):
        return None
    if any(isinstance(node, ast.IfExp) for value in (inner.value, two.value) if value for node in ast.walk(value)):
        return None
    if isinstance(inner.value, ast.Tuple) or isinstance(two.value, ast.Tuple):
        return None
    parts = [_value(inner.value, place), _value(one.test, place), _value(two.value, place)]
    if None in parts or "True" in parts or "False" in parts:
        return None
    return f"return {parts[0]} if {parts[1]} else {parts[2]}"


_ATOMS = ast.Name | ast.Attribute | ast.Call | ast.Subscript | ast.Constant | ast.List | ast.Dict
_DEFERRED = ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


def _used_once(one: ast.stmt, two: ast.stmt, function: ast.AST | None, place: Text) -> str | None:
    """The second statement with the value of `x = e` in the place of x, which nothing else reads."""
    pairs = _pairs(one)
    if function is None or pairs is None or len(pairs) != 1 or not isinstance(pairs[0][0], ast.Name):
        return None
    name, value = pairs[0][0].id, pairs[0][1]
    uses = [node for node in ast.walk(function) if isinstance(node, ast.Name) and node.id == name]
    head = _head(two)
    inside = [node for part in head for node in ast.walk(part)]
    found = next((node for node in inside if isinstance(node, ast.Name) and node.id == name), None)
    if len(uses) != 2 or found is None or not isinstance(found.ctx, ast.Load):
        return None
    if any(found in set(ast.walk(node)) for node in inside if isinstance(node, _DEFERRED)):
        return None
    at, calls = place.start(found), any(isinstance(node, ast.Call) for node in ast.walk(value))
    if calls and any(isinstance(node, ast.Call) and place.end(node) <= at for node in inside):
        return None  # it would be called after what it comes before
    one_line = value.lineno == value.end_lineno and all(part.lineno == part.end_lineno == two.lineno for part in head)
    line = place.line(two.lineno)
    whole = two.end_lineno == two.lineno or line.endswith(":")
    if not one_line or not whole or line.lstrip().startswith("elif"):
        return None
    text = place.of(value)
    apart = [part for node in inside for part in _apart(node)]  # what commas and brackets already set apart
    plain = isinstance(value, _ATOMS) or found in [getattr(two, "value", None), *apart]
    start = at - place.starts[two.lineno - 1]
    data = line.encode()
    return (
        (data[:start] + (text if plain else f"({text})").encode() + data[start + len(name.encode()) :]).decode().strip()
    )


def _apart(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Call):
        return [*node.args, *(keyword.value for keyword in node.keywords)]
    return [node.slice] if isinstance(node, ast.Subscript) else list(getattr(node, "elts", []))


def _head(node: ast.stmt) -> list[ast.expr]:
    """The expressions that a statement evaluates once, on its first line."""
    if isinstance(node, ast.Return | ast.Expr | ast.Assign | ast.AugAssign | ast.AnnAssign):
        return [node.value] if node.value is not None else []
    if isinstance(node, ast.If):
        return [node.test]
    return [node.iter] if isinstance(node, ast.For) else []


def _joined(one: ast.stmt, two: ast.stmt, place: Text) -> str | None:
    """`a, b = x, y` for `a = x` before `b = y`, where y does not depend on a."""
    first, second = _pairs(one), _pairs(two)
    if first is None or second is None:
        return None
    targets = [ast.dump(_reading(target)) for target, _ in first]
    stores_on_self = any(isinstance(target, ast.Attribute) for target, _ in first)
    for _, value in second:
        for node in ast.walk(value):
            if ast.dump(node) in targets:
                return None
            if stores_on_self and isinstance(node, ast.Name) and node.id in ("self", "cls"):
                return None
    for target, _ in second:  # `self.x = 1` after `self = ...`: the same name again
        if any(ast.dump(node) in targets for node in ast.walk(_reading(target))):
            return None
    parts = [(place.of(target), _value(value, place)) for target, value in (*first, *second)]
    if any(value is None for _, value in parts):
        return None
    return f"{', '.join(name for name, _ in parts)} = {', '.join(str(value) for _, value in parts)}"


def _pairs(node: ast.stmt) -> list[tuple[ast.expr, ast.expr]] | None:
    """The (target, value) pairs of an assignment to names and attributes."""
    pairs: list[tuple[ast.expr, ast.expr]]
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        pairs = [(node.target, node.value)]
    elif isinstance(node, ast.Assign) and len(node.targets) == 1:
        target, value = node.targets[0], node.value
        if isinstance(target, ast.Tuple):
            if not isinstance(value, ast.Tuple) or len(target.elts) != len(value.elts):
                return None
            pairs = list(zip(target.elts, value.elts, strict=True))
        else:
            pairs = [(target, value)]
    else:
        return None
    plain = all(isinstance(t.value if isinstance(t, ast.Attribute) else t, ast.Name) for t, _ in pairs)
    starred = any(isinstance(v, ast.Starred | ast.Yield) for _, v in pairs)
    return pairs if plain and not starred else None


def _reading(target: ast.expr) -> ast.expr:
    if isinstance(target, ast.Name):
        return ast.Name(target.id, ast.Load())
    assert isinstance(target, ast.Attribute)
    return ast.Attribute(target.value, target.attr, ast.Load())
