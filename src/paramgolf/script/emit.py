"""One text out of the kept definitions: renamed where names collide, in an order that runs, imports on top."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator

from paramgolf.script.layout import Style
from paramgolf.script.nodes import FunctionNode, Scope, locals_of
from paramgolf.script.reach import DROPPED, Reach, annotated, scopes
from paramgolf.script.source import BUILTINS, Import, Symbol, bound_names
from paramgolf.script.text import Edit, Text, apply
from paramgolf.script.units import Unit

_STRIPPED_PACKAGES = frozenset({"pydantic", "psutil", "typing_extensions"})


class Names:
    """The final name of every kept definition: its own, or one with its module's name where two would collide."""

    def __init__(self, reach: Reach) -> None:
        self.reach = reach
        self.package = reach.package
        self._taken = {found.alias for found in reach.externals} | BUILTINS
        by_name: dict[str, list[Symbol]] = {}
        for symbol in sorted(reach.kept):
            by_name.setdefault(symbol.name, []).append(symbol)
        self._renamed: dict[Symbol, str] = {}
        for name, symbols in by_name.items():
            for symbol in symbols if name in self._taken else symbols[1:]:
                self.rename(symbol)

    def rename(self, symbol: Symbol) -> None:
        stem, name = symbol.module.rsplit(".", 1)[1], symbol.name
        if name.isupper() or (name.strip("_").isupper()):
            self._renamed[symbol] = f"{stem.upper()}_{name.strip('_')}"
        elif name[:1].isupper():
            self._renamed[symbol] = f"{stem.title().replace('_', '')}{name}"
        else:
            self._renamed[symbol] = f"{stem}_{name.strip('_')}"

    def of(self, symbol: Symbol) -> str:
        return self._renamed.get(symbol, symbol.name)

    def settle(self) -> None:
        """Rename whatever a local of a function that uses it would hide."""
        for symbol in sorted(self.reach.kept):
            if self.reach.chosen(symbol) is not None:
                continue
            for node, around in scopes(self.reach.units.node(symbol)):
                target = self.target(symbol.module, node, around)
                if target is None:
                    continue
                hidden = any(self.of(target) in locals_of(scope) for scope in around)
                if hidden:
                    self.rename(target)

    def target(self, module: str, node: ast.AST, around: tuple[Scope, ...]) -> Symbol | None:
        """The kept definition that a name or `alias.name` means."""
        if isinstance(node, ast.Name):
            first = node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            first = node.value.id
        else:
            return None
        if any(first in locals_of(scope) for scope in around):
            return None
        found = self.package.resolve_path(module, node)
        return found if isinstance(found, Symbol) and found.name and found in self.reach.kept else None


class Emitter:
    """The texts of definitions."""

    def __init__(self, reach: Reach) -> None:
        self.reach, self.package = reach, reach.package
        self.names = Names(reach)
        self.names.settle()
        self.used: set[Import] = set()

    def definitions(self, skip: frozenset[str]) -> list[str]:
        """The kept definitions module by module, of the modules `skip` only what is called; registries come last."""
        blocks: list[str] = []
        tables: list[str] = []
        needed = [s for s in self.reach.kept if s.module not in skip or self._is_called(s)]
        for name in self._module_order():
            kept = {self.reach.units.place(s): s for s in needed if s.module == name}
            own: list[str] = []
            for place in sorted(kept):
                symbol = kept[place]
                chosen = self.reach.chosen(symbol)
                if chosen is not None:
                    rows = ", ".join(f'"{key}": {self.names.of(target)}' for key, target in chosen.items())
                    tables.append(f"{self.names.of(symbol)} = {{{rows}}}\n")
                else:
                    own.append(self._definition(self.reach.units.unit(symbol)))
            if own:
                blocks += [ruler(name.removeprefix("paramgolf.").replace(".", "/")), *own]
        return [*blocks, ruler("what the recipe names"), *tables] if tables else blocks

    def _is_called(self, symbol: Symbol) -> bool:
        others = (s for s in self.reach.kept if s.module != symbol.module and self.reach.chosen(s) is None)
        return any(f"{symbol.name}(" in self.reach.units.unit(other).text for other in others)

    def imports(self, body: str) -> str:
        """Import lines of what `body` uses, as ruff's isort rules want them."""
        words = set(re.findall(r"\w+", body))
        standard: dict[str, set[str]] = {}
        others: dict[str, set[str]] = {}
        for found in self.reach.externals | self.used:
            if found.module != "__future__" and found.alias in words:
                table = standard if found.module.split(".")[0] in sys.stdlib_module_names else others
                table.setdefault(found.module if found.name else "", set()).add(found.statement)
        parts = ["from __future__ import annotations"]
        for table in (standard, others):
            if table:
                lines = sorted(table.pop("", set()), key=_import_key)
                for module in sorted(table, key=str.lower):
                    names = ", ".join(sorted(table[module], key=_name_key))
                    lines.append(f"from {module} import {names}")
                parts.append("\n".join(lines))
        return "\n\n".join(parts)

    def _module_order(self) -> list[str]:
        """Kept modules, each after those it imports."""
        wanted = {symbol.module for symbol in self.reach.kept}
        order: list[str] = []
        seen: set[str] = set()

        def visit(name: str) -> None:
            if name in seen:
                return
            seen.add(name)
            module = self.package.module(name)
            for found in module.imports.values():
                if found.internal and found.alias not in module.local_imports:
                    target = self.package.resolve(name, found.alias)
                    if isinstance(target, Symbol) and target.module != name:
                        visit(target.module)
            order.append(name)

        for name in sorted(wanted):
            visit(name)
        return [name for name in order if name in wanted]

    # -- one definition ----------------------------------------------------------------------------------------

    def _definition(self, unit: Unit) -> str:
        text, node = Text(unit.text), unit.node
        edits = [*self._renames(unit, text), *self._annotation_edits(unit.module, node, text)]
        edits += self._import_edits(node, text)
        if isinstance(node, ast.ClassDef):
            edits += self._dropped_methods(unit.module, node, text)
        return apply(unit.text, edits)

    def _renames(self, unit: Unit, text: Text) -> Iterator[Edit]:
        node = unit.node
        if isinstance(node, FunctionNode | ast.ClassDef):
            final = self.names.of(Symbol(unit.module, node.name))
            if final != node.name:
                at = text.data.index(node.name.encode(), text.start(node) + 4)
                yield Edit(at, at + len(node.name.encode()), final)
        for part, around in scopes(node):
            target = self.names.target(unit.module, part, around)
            if target is not None:
                final = self.names.of(target)
                if final != text.of(part):
                    yield Edit(text.start(part), text.end(part), final)

    def _annotation_edits(self, module: str, statement: ast.stmt, text: Text) -> Iterator[Edit]:
        """Annotations that name something the script does not have go; `Annotated[T, ...]` becomes T."""
        for holder, note in annotated(statement):
            if isinstance(note, ast.Subscript) and ast.unparse(note.value) == "Annotated":
                assert isinstance(note.slice, ast.Tuple)
                yield Edit(text.start(note), text.end(note), text.of(note.slice.elts[0]))
                continue
            if self._annotation_holds(module, note):
                continue
            if isinstance(holder, ast.arg):
                yield Edit(text.start(holder), text.end(holder), holder.arg)
            elif isinstance(holder, FunctionNode):
                arrow = text.data.rindex(b"->", text.start(holder), text.start(note))
                yield Edit(arrow - 1, text.end(note), "")
            elif isinstance(holder, ast.AnnAssign) and holder.value is None:
                if isinstance(holder.target, ast.Name) and holder in getattr(statement, "body", []):
                    yield Edit(text.start(note), text.end(note), "object")
                else:
                    yield text.whole_lines(holder.lineno, holder.end_lineno or 0)
            elif isinstance(holder, ast.AnnAssign):
                own = isinstance(statement, ast.ClassDef) and holder in statement.body  # a field keeps its colon
                yield Edit(text.end(holder.target), text.end(note), ": object" if own else "")

    def _annotation_holds(self, module: str, note: ast.expr) -> bool:
        """Whether everything an annotation names is there; what it imports from elsewhere is then used."""
        imports: list[Import] = []
        for node in ast.walk(note):
            if isinstance(node, ast.Name):
                found = self.package.resolve(module, node.id)
                if isinstance(found, Import):
                    if found.module.split(".")[0] in _STRIPPED_PACKAGES:
                        return False
                    imports.append(found)
                known = node.id in BUILTINS if found is None else found in self.reach.kept
                if not isinstance(found, Import) and not known:
                    return False
        self.used |= set(imports)
        return True

    def _import_edits(self, statement: ast.stmt, text: Text) -> Iterator[Edit]:
        for node in ast.walk(statement):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("paramgolf"):
                yield text.whole_lines(node.lineno, node.end_lineno or 0)

    def _dropped_methods(self, module: str, node: ast.ClassDef, text: Text) -> Iterator[Edit]:
        kept = self.reach.kept[Symbol(module, node.name)]
        left = 0
        for part in node.body:
            gone = isinstance(part, FunctionNode) and part.name not in kept
            told = isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)
            if gone or DROPPED & set(bound_names(part)):
                yield text.whole_lines(text.first_line(part), part.end_lineno or 0)
            else:
                left += not told
        if not left:
            last = text.starts[node.end_lineno or 0]
            yield Edit(last, last, "    pass\n")


def ruler(words: str) -> str:
    return f"# ---- {words} ".ljust(100, "-")


def join(blocks: list[str], style: Style) -> str:
    """Blocks with a blank line around functions and classes, one line feed between assignments."""
    out = ""
    for before, block in zip(["", *blocks], blocks, strict=False):
        if out:
            out += "\n\n" if style.spaced and (_is_large(block) or _is_large(before)) else "\n"
        out += block
    return out + "\n"


def _is_large(block: str) -> bool:
    first = next((line for line in block.splitlines() if not line.startswith("#")), "# ----")
    return first.startswith(("def ", "class ", "@", "# ----"))


def _import_key(line: str) -> str:
    return line.split()[1].lower()


def _name_key(name: str) -> tuple[int, str]:
    """isort's order: constants, classes, the rest."""
    word = name.split(" ")[0]
    return (0 if word.isupper() and len(word) > 1 else 1 if word[:1].isupper() else 2), word
