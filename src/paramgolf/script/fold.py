"""Source text with what a recipe decides already decided: what cannot be reached is gone, the rest is as written.

Works on text, not on trees, so that comments and layout survive. A pass finds the outermost places that can be decided
and edits them; passes repeat until nothing changes.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from typing import Any

from paramgolf.script.infer import Frame, Types
from paramgolf.script.nodes import FunctionNode, content_of
from paramgolf.script.source import Package, Symbol
from paramgolf.script.text import Edit, Text, apply
from paramgolf.script.values import PRESENT, UNKNOWN, VAGUE, Facts, Values

_PASSES = 60
_GUARD_ERRORS = frozenset({"GolfError", "ValueError"})


def fold(package: Package, types: Types, module: str, facts: Facts, text: str) -> str:
    """`text`, the source of `module` or what an earlier fold made of it, under `facts`."""
    for _ in range(_PASSES):
        edits = list(_Pass(package, types, module, facts, text).edits())
        if not edits:
            return text
        text = apply(text, edits)
    raise AssertionError(f"folding {module} does not end")


class _Pass(Values):
    """The edits of one pass over one text."""

    def __init__(self, package: Package, types: Types, module: str, facts: Facts, text: str) -> None:
        super().__init__(package, types, module, facts)
        self.tree = ast.parse(text)
        self.text = Text(text)
        self.flags = {
            name for (_, _, name), value in facts.parameters.items() if value is None or value is True or value is False
        }

    def edits(self) -> Iterator[Edit]:
        yield from self._suite(self.tree.body, Frame(self.module))

    # -- statements --------------------------------------------------------------------------------------------

    def _suite(self, body: list[ast.stmt], frame: Frame) -> Iterator[Edit]:
        gone = [statement for statement in body if not self._is_elif(statement) and self._goes(statement, frame)]
        ends = next((i for i, s in enumerate(body) if isinstance(s, ast.Return | ast.Raise)), len(body))
        gone += [statement for statement in body[ends + 1 :] if statement not in gone]
        for statement in body:
            if statement in gone:
                first, last = self.text.first_line(statement), statement.end_lineno or 0
                keep = len(gone) == len(body) and statement is body[0]
                yield self.text.whole_lines(first, last, " " * statement.col_offset + "pass\n" if keep else "")
            else:
                yield from self._statement(statement, frame)

    def _is_elif(self, node: ast.stmt) -> bool:
        return isinstance(node, ast.If) and self.text.line(node.lineno).lstrip().startswith("elif")

    def _goes(self, node: ast.stmt, frame: Frame) -> bool:
        """Whether a statement has nothing to do any more."""
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            return self._is_no_op(node.value, frame)
        if isinstance(node, ast.If) and not node.orelse:
            if len(node.body) == 1 and isinstance(node.body[0], ast.Pass):
                return all(is_harmless(part) for part in ast.walk(node.test))
            value = self.value(node.test, frame)
            return (value is not UNKNOWN and value is not PRESENT and not value) or self._is_guard(node.body, frame)
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.For):
            if len(node.body) == 1 and isinstance(node.body[0], ast.Pass):
                return True
            value = self.value(node.iter, frame)
            return value not in VAGUE and hasattr(value, "__len__") and not len(value)
        if isinstance(node, ast.Assign | ast.AnnAssign):
            return self._assignment_goes(node, frame)
        aside = isinstance(node, ast.AugAssign) and self._is_dead(node.target, frame)
        return aside and all(is_harmless(part) for part in ast.walk(node))

    def _assignment_goes(self, node: ast.Assign | ast.AnnAssign, frame: Frame) -> bool:
        if isinstance(node, ast.AnnAssign) and node.value is None:
            kind = frame.node
            return not isinstance(kind, ast.ClassDef) or not (kind.decorator_list or _is_declaring(kind))
        targets: list[ast.expr] = node.targets if isinstance(node, ast.Assign) else [node.target]
        if all(self._is_inline(target, frame) for target in targets):
            return True
        if len(targets) == 1 and node.value is not None and ast.dump(node.value) == _loaded(targets[0]):
            return True
        if all(isinstance(t, ast.Name) and self.is_absent(self.types.infer(t, frame)) for t in targets):
            return True
        dead = all(self._is_dead(target, frame) for target in targets)
        if dead and node.value is not None and all(is_harmless(part) for part in ast.walk(node.value)):
            return True
        return self._is_unused_local(node, targets, frame)

    def _is_guard(self, body: list[ast.stmt], frame: Frame) -> bool:
        """A body that only refuses: the package has checked the recipe, and its own data is what it was."""
        raised = body[-1]
        wording = all(isinstance(part, ast.Assign) and isinstance(part.targets[0], ast.Name) for part in body[:-1])
        if self.module in self.facts.guarded or not wording or not isinstance(raised, ast.Raise):
            return False
        error = raised.exc
        if isinstance(error, ast.Call) and isinstance(error.func, ast.Name) and error.func.id in _GUARD_ERRORS:
            return True
        kind = self.types.infer(error, frame)
        return kind is not None and kind.symbol.name == "GolfError"

    def _only_refuses(self, node: ast.Try, frame: Frame) -> bool:
        """Whether all that a `try` does is to word an error."""
        plain = not node.orelse and not node.finalbody
        return plain and all(self._is_guard(handler.body, frame) for handler in node.handlers)

    def _is_dead(self, target: ast.expr, frame: Frame) -> bool:
        if not isinstance(target, ast.Attribute):
            return False
        base = self.types.infer(target.value, frame)
        return base is not None and (base.symbol.name, target.attr) in self.facts.dead

    def _is_unused_local(self, node: ast.Assign | ast.AnnAssign, targets: list[ast.expr], frame: Frame) -> bool:
        names = targets[0].elts if isinstance(targets[0], ast.Tuple) else targets
        if len(targets) != 1 or not isinstance(frame.node, FunctionNode):
            return False
        if not all(isinstance(name, ast.Name) for name in names):
            return False
        pure = node.value is None or all(is_harmless(part) for part in ast.walk(node.value))
        if isinstance(node.value, ast.Call):
            pure = pure or self.value(node.value, frame) is not UNKNOWN
        read = content_of(frame.node).loads | content_of(frame.node).changed
        return pure and all(isinstance(name, ast.Name) and name.id not in read for name in names)

    def _is_inline(self, target: ast.expr, frame: Frame) -> bool:
        """An attribute or field whose value is a fact and that nobody needs to store."""
        if isinstance(target, ast.Name) and isinstance(frame.node, ast.ClassDef) and frame.owner is not None:
            kind = self.types.attribute(frame.owner, target.id)
            return self.is_absent(kind) or (frame.owner.name, target.id) in self.facts.inline
        if not isinstance(target, ast.Attribute):
            return False
        base = self.types.infer(target.value, frame)
        if base is None:
            return False
        inline = any((b.name, target.attr) in self.facts.inline for b in self.package.bases(base.symbol))
        return inline or self.is_absent(self.types.attribute(base.symbol, target.attr))

    def _is_no_op(self, call: ast.Call, frame: Frame) -> bool:
        if isinstance(call.func, ast.Name):
            found = self.package.resolve_path(self.module, call.func)
            return isinstance(found, Symbol) and found.name in self.facts.no_ops
        if isinstance(call.func, ast.Attribute):
            base = self.types.infer(call.func.value, frame)
            if base is not None:
                return any(f"{b.name}.{call.func.attr}" in self.facts.no_ops for b in self.package.bases(base.symbol))
            found = self.package.resolve_path(self.module, call.func)
            return isinstance(found, Symbol) and found.name in self.facts.no_ops
        return False

    def _statement(self, node: ast.stmt, frame: Frame) -> Iterator[Edit]:
        if isinstance(node, ast.If):
            value = self.value(node.test, frame)
            if value is not UNKNOWN:
                yield self._decided(node, bool(value) or value is PRESENT)
                return
        if isinstance(node, ast.Try) and self._only_refuses(node, frame):
            body = self.text.dedented(self.text.first_line(node.body[0]), node.body[-1].end_lineno or 0)
            yield self.text.whole_lines(node.lineno, node.end_lineno or 0, body)
            return
        if isinstance(node, FunctionNode):
            yield from self._parameters(node)
            yield from self._suite(node.body, Frame(self.module, frame.owner, node, frame))
            return
        if isinstance(node, ast.ClassDef):
            yield from self._suite(node.body, Frame(self.module, Symbol(self.module, node.name), node, frame))
            return
        if isinstance(node, ast.For | ast.Assign):
            yield from self._unread(node, frame)
        for _name, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                yield from self._suite(value, frame)
            elif isinstance(value, list):
                for part in value:
                    yield from self._part(part, frame)
            elif isinstance(value, ast.AST):
                yield from self._expression(value, frame, test=_name == "test")

    def _unread(self, node: ast.For | ast.Assign, frame: Frame) -> Iterator[Edit]:
        """An underscore before what a loop or an assignment binds and nothing reads any more."""
        target = node.target if isinstance(node, ast.For) else node.targets[0]
        if isinstance(node, ast.Assign) and not isinstance(target, ast.Tuple | ast.Name):
            return
        if not isinstance(frame.node, FunctionNode) or content_of(frame.node).shares:
            return
        for part in ast.walk(target):
            if not isinstance(part, ast.Name) or part.id.startswith("_"):
                continue
            if part.id not in content_of(frame.node).loads | content_of(frame.node).changed:
                yield Edit(self.text.start(part), self.text.start(part), "_")

    def _part(self, part: Any, frame: Frame) -> Iterator[Edit]:
        if isinstance(part, ast.ExceptHandler):
            yield from self._suite(part.body, frame)
        elif isinstance(part, ast.withitem):
            yield from self._expression(part.context_expr, frame)
        elif isinstance(part, ast.AST):
            yield from self._expression(part, frame)

    def _decided(self, node: ast.If, taken: bool) -> Edit:
        """The `if` replaced by the branch that is taken."""
        text, elif_ = self.text, self._is_elif(node)
        last = node.end_lineno or 0
        body_first, body_last = text.first_line(node.body[0]), node.body[-1].end_lineno or 0
        if taken:
            if elif_:
                body = "".join(f"{text.line(n)}\n" for n in range(body_first, body_last + 1))
                return text.whole_lines(node.lineno, last, f"{' ' * node.col_offset}else:\n{body}")
            return text.whole_lines(node.lineno, last, text.dedented(body_first, body_last))
        if not node.orelse:
            return text.whole_lines(node.lineno, last)
        following = node.orelse[0]
        if self._is_elif(following):
            rest = "".join(f"{text.line(n)}\n" for n in range(following.lineno, last + 1))
            return text.whole_lines(node.lineno, last, rest if elif_ else rest.replace("elif", "if", 1))
        first = text.first_line(following)
        if elif_:
            rest = "".join(f"{text.line(n)}\n" for n in range(first, last + 1))
            return text.whole_lines(node.lineno, last, f"{' ' * node.col_offset}else:\n{rest}")
        return text.whole_lines(node.lineno, last, text.dedented(first, last))

    def _parameters(self, node: FunctionNode) -> Iterator[Edit]:
        """Parameters that can only be None leave the signature."""
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        defaults = [*node.args.defaults]
        with_default = [*node.args.posonlyargs, *node.args.args]
        by_name = dict(zip([a.arg for a in with_default[len(with_default) - len(defaults) :]], defaults, strict=True))
        for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
            if default is not None:
                by_name[argument.arg] = default
        for before, argument in itertools.pairwise(every):
            if self.is_absent(self.types.annotation(self.module, argument.annotation)):
                last: ast.AST = by_name.get(argument.arg, argument)
                yield Edit(self.text.end(by_name.get(before.arg, before)), self.text.end(last), "")

    # -- expressions -------------------------------------------------------------------------------------------

    def _expression(self, node: ast.AST, frame: Frame, test: bool = False) -> Iterator[Edit]:
        """Edits of the outermost decidable expressions."""
        edit = self._decided_expression(node, frame, test)
        if edit is not None:
            yield edit
            return
        if isinstance(node, ast.Call):
            yield from self._arguments(node, frame)
        inner = Frame(self.module, frame.owner, node, frame) if isinstance(node, ast.Lambda) else frame
        for name, value in ast.iter_fields(node):
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, ast.AST) and name not in ("annotation", "returns"):
                    yield from self._expression(part, inner, test=isinstance(node, ast.IfExp) and name == "test")

    def _decided_expression(self, node: ast.AST, frame: Frame, test: bool) -> Edit | None:
        chosen: str | None = None
        if isinstance(node, ast.BoolOp):
            return self._bool_op(node, frame, test)
        if isinstance(node, ast.IfExp):
            value = self.value(node.test, frame)
            if value is not UNKNOWN:
                chosen = self.text.of(node.body if bool(value) or value is PRESENT else node.orelse)
            elif ast.dump(node.body) == ast.dump(node.orelse):
                chosen = self.text.of(node.body)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and self._is_inline(node, frame):
            value = self.value(node, frame)
            chosen = None if value in VAGUE else repr(value)
        elif isinstance(node, ast.Compare) or (isinstance(node, ast.Name) and self._is_flag(node, frame)):
            value = self.value(node, frame)
            chosen = repr(value) if isinstance(value, bool | None) else None
        elif isinstance(node, ast.Subscript):
            entry = self._entry(node, frame)
            chosen = self.text.of(entry) if entry is not None else None
        return Edit(self.text.start(node), self.text.end(node), chosen) if chosen is not None else None

    def _is_flag(self, node: ast.Name, frame: Frame) -> bool:
        """A parameter that has left its signature, or a name that can only be None, true or false."""
        if not isinstance(node.ctx, ast.Load):
            return False
        own = isinstance(frame.node, FunctionNode) and node.id in content_of(frame.node).flags
        return own or node.id in self.flags or self.is_absent(self.types.infer(node, frame))

    def _entry(self, node: ast.Subscript, frame: Frame) -> ast.expr | None:
        """Of a local table that is written out, the entry of a known key."""
        if not isinstance(node.value, ast.Name) or not isinstance(frame.node, FunctionNode):
            return None
        stores = content_of(frame.node).stores.get(node.value.id, [])
        for target, value, _ in content_of(frame.node).assigned:
            if len(stores) == 1 and target is stores[0] and isinstance(value, ast.Dict):
                wanted = self.value(node.slice, frame)
                for key, entry in zip(value.keys, value.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == wanted and isinstance(entry, ast.Name):
                        return entry
        return None

    def _bool_op(self, node: ast.BoolOp, frame: Frame, test: bool) -> Edit | None:
        """`a and b` without the operands that are known to change nothing."""
        neutral = isinstance(node.op, ast.And)
        kept: list[ast.expr] = []
        for place, operand in enumerate(node.values):
            value = self.value(operand, frame)
            known = value is not UNKNOWN
            truth = known and (value is PRESENT or bool(value))
            last = place == len(node.values) - 1
            if known and truth is neutral and (test or not last):
                continue
            kept.append(operand)
            if known and truth is not neutral:
                break
        if len(kept) == len(node.values):
            return None
        word = " and " if neutral else " or "
        if not kept:
            text = str(neutral)
        elif len(kept) == 1:
            text = self.text.of(kept[0])
            if isinstance(kept[0], ast.BoolOp | ast.IfExp | ast.NamedExpr) and not test:
                text = f"({text})"
        else:
            wrapped = (ast.BoolOp, ast.IfExp, ast.Lambda, ast.NamedExpr)
            text = word.join(f"({self.text.of(k)})" if isinstance(k, wrapped) else self.text.of(k) for k in kept)
        return Edit(self.text.start(node), self.text.end(node), text)

    def _arguments(self, node: ast.Call, frame: Frame) -> Iterator[Edit]:
        """Arguments that can only be None for a parameter that has left its signature."""
        before: ast.AST = node.func
        parts: list[tuple[ast.AST, ast.expr]] = [(a, a) for a in node.args] + [(k, k.value) for k in node.keywords]
        for place, (whole, value) in enumerate(parts):
            named = isinstance(value, ast.Name | ast.Attribute | ast.Call)
            if named and self.is_absent(self.types.infer(value, frame)):
                start, end = self.text.end(before), self.text.end(whole)
                if place == 0:
                    start = self.text.start(whole)
                    end = self.text.start(parts[1][0]) if len(parts) > 1 else end
                yield Edit(start, end, "")
            before = whole


_HARMLESS = (
    ast.Name, ast.Attribute, ast.Constant, ast.expr_context, ast.Subscript, ast.Slice, ast.Tuple, ast.List, ast.Dict,
    ast.Set, ast.Compare, ast.cmpop, ast.BoolOp, ast.boolop, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop,
    ast.IfExp, ast.keyword, ast.Starred, ast.AugAssign, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp,
    ast.comprehension,
)  # fmt: skip
_READING = frozenset({
    "len", "sorted", "set", "min", "max", "tuple", "list", "float", "int", "str", "bool", "isinstance", "get", "abs",
    "amax", "keys", "items", "values", "state_dict", "seek", "compiled_graphs", "compile", "get_frame_parameters",
    "monotonic", "sum", "numel", "parameters", "round",
})  # fmt: skip


def _is_declaring(node: ast.ClassDef) -> bool:
    """Whether annotations without values make a class what it is."""
    return any(ast.unparse(base) in ("Protocol", "NamedTuple", "TypedDict") for base in node.bases)


def is_harmless(node: ast.AST) -> bool:
    """Whether nothing is lost when a value made with this is not made."""
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        return name in _READING
    return isinstance(node, _HARMLESS)


def _loaded(target: ast.expr) -> str:
    """What reading a name looks like."""
    return ast.dump(ast.Name(target.id, ast.Load())) if isinstance(target, ast.Name) else ""
