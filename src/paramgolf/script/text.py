"""Places of syntax nodes in a text, and edits of it."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Edit:
    start: int
    end: int
    text: str


def apply(text: str, edits: Iterable[Edit]) -> str:
    """All edits that do not lie in an earlier one; offsets are in UTF-8 bytes."""
    data, out, at = text.encode(), bytearray(), 0
    for edit in sorted(edits, key=lambda e: (e.start, -e.end)):
        if edit.start < at:
            continue
        out += data[at : edit.start] + edit.text.encode()
        at = edit.end
    return (out + data[at:]).decode()


class Text:
    """Places of nodes in a text, as byte offsets."""

    def __init__(self, text: str) -> None:
        self.data = text.encode()
        self.lines = self.data.split(b"\n")
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line) + 1)

    def start(self, node: Any) -> int:
        return int(self.starts[node.lineno - 1] + node.col_offset)

    def end(self, node: Any) -> int:
        return int(self.starts[node.end_lineno - 1] + node.end_col_offset)

    def of(self, node: Any) -> str:
        return self.data[self.start(node) : self.end(node)].decode()

    def line(self, number: int) -> str:
        """Line `number` (from 1)."""
        return self.lines[number - 1].decode()

    def first_line(self, statement: ast.stmt) -> int:
        """Where a statement begins, its decorators and the comment lines above it included."""
        number = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
        while number > 1 and self.line(number - 1).strip().startswith("#"):
            number -= 1
        return number

    def whole_lines(self, first: int, last: int, text: str = "") -> Edit:
        """Replace lines first .. last."""
        return Edit(self.starts[first - 1], self.starts[last], text)

    def dedented(self, first: int, last: int) -> str:
        lines = (self.line(number) for number in range(first, last + 1))
        return "".join(f"{line[4:] if line.startswith('    ') else line}\n" for line in lines)
