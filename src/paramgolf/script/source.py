"""The package's own source as data: modules, what they define at top level and what their names stand for."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import paramgolf
from paramgolf.script.nodes import FunctionNode
from paramgolf.script.text import Text

PACKAGE = "paramgolf"
ROOT = Path(paramgolf.__file__).parent
BUILTINS = frozenset(dir(builtins))


@dataclass(frozen=True, order=True)
class Symbol:
    """A top-level name of a module of the package; with an empty `name` the module itself."""

    module: str
    name: str


@dataclass(frozen=True)
class Import:
    """What an import binds: `name` of `module`, or the module itself (name "")."""

    module: str
    name: str
    alias: str

    @property
    def internal(self) -> bool:
        return self.module == PACKAGE or self.module.startswith(f"{PACKAGE}.")

    @property
    def statement(self) -> str:
        if not self.name:
            return f"import {self.module}" + (f" as {self.alias}" if self.alias != self.module else "")
        return f"{self.name} as {self.alias}" if self.alias != self.name else self.name


@dataclass
class Module:
    """One source file. `definitions`: top-level name -> the statement that binds it."""

    name: str
    text: str
    imports: dict[str, Import] = field(default_factory=dict)
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    added: set[str] = field(default_factory=set)  # names that a function made for a recipe uses; imported then

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.text)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for found in imports_of(node):
                    self.imports.setdefault(found.alias, found)
        for statement in self.tree.body:
            for name in bound_names(statement):
                self.definitions[name] = statement

    @cached_property
    def places(self) -> dict[str, int]:
        """Top-level name -> index of the statement that binds it."""
        return {name: i for i, statement in enumerate(self.tree.body) for name in bound_names(statement)}

    def source_of(self, index: int) -> str:
        """The text of a top-level statement with the comment lines above it."""
        text, statement = Text(self.text), self.tree.body[index]
        last = statement.end_lineno or 0
        return "".join(f"{text.line(number)}\n" for number in range(text.first_line(statement), last + 1))

    @cached_property
    def local_imports(self) -> frozenset[str]:
        """Names that only imports inside functions bind."""
        top: set[str] = set()
        for statement in self.tree.body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                top |= {found.alias for found in imports_of(statement)}
        return frozenset(self.imports) - top - self.added


def imports_of(node: ast.Import | ast.ImportFrom) -> list[Import]:
    if isinstance(node, ast.Import):
        return [Import(alias.name, "", alias.asname or alias.name.split(".")[0]) for alias in node.names]
    return [Import(node.module or "", alias.name, alias.asname or alias.name) for alias in node.names]


def bound_names(statement: ast.stmt) -> list[str]:
    """The names a top-level statement binds, imports aside."""
    if isinstance(statement, FunctionNode | ast.ClassDef):
        return [statement.name]
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


class Package:
    """Modules by dotted name, read and parsed at first use. A symbol of `substitutes` means another one everywhere."""

    def __init__(self, substitutes: Mapping[Symbol, Symbol] | None = None) -> None:
        self._substitutes = substitutes or {}
        self._modules: dict[str, Module] = {}

    def module(self, name: str) -> Module:
        if name not in self._modules:
            self._modules[name] = Module(name, source_path(name).read_text("utf-8"))
        return self._modules[name]

    def resolve(self, module: str, name: str) -> Symbol | Import | None:
        """What `name` means at the top level of `module`: a definition of the package (re-exports followed), a module
        of it, something imported from elsewhere, or None for a builtin or an unknown name."""
        own = self.module(module)
        if name in own.definitions:
            symbol = Symbol(module, name)
            return self._substitutes.get(symbol, symbol)
        found = own.imports.get(name)
        if found is None:
            return None
        if not found.internal:
            return found
        if not found.name:
            return Symbol(found.module, "")
        if is_module(f"{found.module}.{found.name}"):
            return Symbol(f"{found.module}.{found.name}", "")
        return self.resolve(found.module, found.name)

    def resolve_path(self, module: str, node: ast.expr) -> Symbol | Import | None:
        """Like `resolve`, of a name or of `module_alias.name`."""
        if isinstance(node, ast.Name):
            return self.resolve(module, node.id)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            base = self.resolve(module, node.value.id)
            if isinstance(base, Symbol) and not base.name:
                return self.resolve(base.module, node.attr)
            if isinstance(base, Import):
                return base
        return None

    def add_imports(self, module: str, found: Iterable[Import]) -> None:
        """Names that a module has beside its own."""
        own = self.module(module)
        own.imports |= {one.alias: one for one in found}
        own.added |= {one.alias for one in found}

    def statement(self, symbol: Symbol) -> ast.stmt:
        return self.module(symbol.module).definitions[symbol.name]

    def class_node(self, symbol: Symbol) -> ast.ClassDef | None:
        found = self.module(symbol.module).definitions.get(symbol.name)
        return found if isinstance(found, ast.ClassDef) else None

    def bases(self, symbol: Symbol) -> Iterator[Symbol]:
        """The class and its bases inside the package, nearest first."""
        node = self.class_node(symbol) if symbol.module else None
        if node is None:
            return
        yield symbol
        for base in node.bases:
            target = self.resolve_path(symbol.module, base)
            if isinstance(target, Symbol):
                yield from self.bases(target)

    def registry(self, symbol: Symbol) -> dict[str, str] | None:
        """The entries of a `Registry(kind, {...})` assignment, None for anything else."""
        node = self.module(symbol.module).definitions.get(symbol.name)
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "Registry":
            entries = ast.literal_eval(value.args[1])
            assert isinstance(entries, dict)
            return entries
        return None


def source_path(name: str) -> Path:
    stem = ROOT.parent.joinpath(*name.split("."))
    return stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")


def is_module(name: str) -> bool:
    return source_path(name).is_file()


def target_of(entry: str) -> Symbol:
    """`"module:name"` of a registry line."""
    module, _, name = entry.partition(":")
    return Symbol(module, name)
