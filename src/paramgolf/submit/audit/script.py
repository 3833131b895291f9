"""One script of a submission: its text, syntax tree and the layers packed in it. Nothing is executed."""

from __future__ import annotations

import ast
import re
import warnings
from dataclasses import dataclass, field
from functools import cached_property

from paramgolf.submit.audit.newer_python import blank_fstrings
from paramgolf.submit.audit.unpack import MAX_CODE, MAX_DEPTH, Bomb, Budget, Literals, Opaque

Function = ast.FunctionDef | ast.AsyncFunctionDef


def shown(text: str, limit: int = 150) -> str:
    """One line of evidence, cut to `limit` characters, without control characters (they could fool a terminal)."""
    text = "".join(c if c.isprintable() else " " for c in text).strip()
    return text if len(text) <= limit else text[: limit - 1] + "…"


@dataclass
class Script:
    """`name` is the path in the folder, with `!unpacked` for each unpacked layer; `size` is in bytes on disk."""

    name: str
    text: str
    size: int
    tree: ast.Module | None = None
    error: str = ""
    newer: bool = False  # written for Python 3.12 or later; read without the contents of its f-strings
    layers: list[Script] = field(default_factory=list)
    bombs: list[int] = field(default_factory=list)  # lines
    opaque: list[int] = field(default_factory=list)
    indirect: list[tuple[int, str]] = field(default_factory=list)  # line, file name run ("" = not determined)
    budget: Budget = field(default_factory=Budget, compare=False)  # its layers have the same

    @cached_property
    def lines(self) -> list[str]:
        return self.text.split("\n")

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree)) if self.tree else []

    @cached_property
    def functions(self) -> list[Function]:
        return [n for n in self.nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]

    @cached_property
    def literals(self) -> Literals:
        return Literals(self.tree or ast.Module(body=[], type_ignores=[]), self.budget)

    @cached_property
    def identifiers(self) -> list[tuple[str, int]]:
        """Every name used in code (not in comments or strings), with its line; source order not guaranteed."""
        found: list[tuple[str, int]] = []
        for node in self.nodes:
            if isinstance(node, ast.Name):
                found.append((node.id, node.lineno))
            elif isinstance(node, ast.Attribute):
                found.append((node.attr, node.lineno))
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.append((node.name, node.lineno))
            elif isinstance(node, ast.arg | ast.keyword) and node.arg:
                found.append((node.arg, node.lineno))
        return found

    def at(self, line: int, around: str = "") -> str:
        """Evidence `file:line: text`; in a minified line the text around `around`."""
        text = self.lines[line - 1] if 0 < line <= len(self.lines) else ""
        if around and len(text) > 150:
            place = max(0, text.find(around) - 30)
            text = ("…" if place else "") + text[place:]
        return f"{self.name}:{line}: {shown(text)}"

    def with_layers(self) -> list[Script]:
        """This script and every layer below it that could be read."""
        return [self] + [deeper for layer in self.layers for deeper in layer.with_layers()]

    @property
    def readable(self) -> list[Script]:
        """The layers to look into: the unpacked ones where there are any (the stub itself says nothing)."""
        return [s for s in self.with_layers() if s.tree is not None]


def call_name(node: ast.Call) -> str:
    """The last part of the called name: `load` for `torch.load(...)`."""
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def parse(name: str, text: str, size: int, depth: int = 0, budget: Budget | None = None) -> Script:
    """Parse and unpack a script. A script that does not parse has `tree` None and `error` set."""
    script = Script(name, text, size, budget=budget or Budget())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the audited code are not ours to print
            script.tree = ast.parse(text)
    except SyntaxError as error:
        script.tree = _parse_newer(text) if "f-string" in error.msg else None
        script.newer = script.tree is not None
        if script.tree is None:
            script.error = f"line {error.lineno}: {error.msg}"
            return script
    except (ValueError, RecursionError, MemoryError) as error:
        script.error = f"{type(error).__name__}: {error}"
        return script
    try:
        _unpack(script, depth)
    except RecursionError:
        script.tree, script.error = None, "nested too deeply to be read"
    return script


def _parse_newer(text: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(blank_fstrings(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _unpack(script: Script, depth: int) -> None:
    inner: set[int] = set()  # decompress calls that are arguments of one already read
    for node in script.nodes:
        if not isinstance(node, ast.Call) or id(node) in inner:
            continue
        runs = isinstance(node.func, ast.Name) and node.func.id in ("exec", "eval")
        if not runs and not script.literals.is_decompress(node):
            continue
        if not (runs and not node.args):
            inner.update(id(n) for n in ast.walk(node) if n is not node)
            _unpack_one(script, node.args[0] if runs else node, node.lineno, runs, depth)


def _unpack_one(script: Script, node: ast.expr, line: int, runs: bool, depth: int) -> None:
    try:
        value = script.literals.value(node)
    except Bomb:
        script.bombs.append(line)
        return
    except Opaque:
        if runs:
            _unreadable(script, node, line)
        return
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    if not isinstance(text, str) or (not runs and "import " not in text):
        return  # packed data, not code
    budget = script.budget
    if (text, runs) in budget.parsed:
        return
    if depth >= MAX_DEPTH or len(text) > min(MAX_CODE, budget.code):
        script.bombs.append(line)
        return
    budget.parsed.add((text, runs))
    budget.code -= len(text)
    layer = parse(f"{script.name}!unpacked", text, len(text.encode("utf-8", "replace")), depth + 1, budget)
    if layer.tree is not None or runs:
        script.layers.append(layer)


def _unreadable(script: Script, node: ast.expr, line: int) -> None:
    opened = any(
        isinstance(n, ast.Call) and call_name(n) in ("open", "read_text", "read_bytes") for n in ast.walk(node)
    )
    if not opened:
        script.opaque.append(line)
        return
    files = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    files = [f for f in files if re.fullmatch(r"[\w./-]+\.py", f)]
    script.indirect.append((line, files[-1] if files else ""))
