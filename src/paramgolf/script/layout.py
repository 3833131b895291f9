"""How the script's text is laid out: what of comments and docstrings stays, and lines filled up to their limit."""

from __future__ import annotations

import ast
import io
import keyword
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass

from paramgolf.script.nodes import FunctionNode
from paramgolf.script.text import Text, apply
from paramgolf.script.tighten import tighten

WIDTH = 120
_MARKS = re.compile(r"[ \t]*# (?:fmt: (?:skip|off|on)|noqa|type: ignore).*$")
_RULER = re.compile(r"\s*# -- .* -+")
_OPENING, _CLOSING = ("(", "[", "{"), (")", "]", "}")
_BARE = re.compile(r"(?<![\w)\]])\([A-Za-z_][\w.]*\)")
_SKIPPED = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


@dataclass(frozen=True)
class Style:
    """What is kept or done: first lines of docstrings, comments, lines filled, values put where they are used once,
    neighbouring assignments and fields on one line, blank lines inside definitions and between them."""

    docstrings: bool
    comments: bool
    filled: bool
    short: bool = False
    merged: bool = False
    airy: bool = True
    spaced: bool = True


# From the most readable to the shortest; the first that fits the limit of lines is taken.
STYLES = (
    Style(True, True, False),
    Style(True, True, True),
    Style(False, True, True),
    Style(False, False, True),
    Style(False, False, True, short=True),
    Style(False, False, True, short=True, airy=False),
    Style(False, False, True, short=True, merged=True, airy=False),
    Style(False, False, True, short=True, merged=True, airy=False, spaced=False),
)


def layout(text: str, style: Style) -> str:
    """`text` (whole statements) without marks for tools, with at most one blank line in a row."""
    text = _shortened_docstrings(text, style.docstrings)
    text = "\n".join(_MARKS.sub("", line).rstrip() for line in text.splitlines() if not _RULER.fullmatch(line))
    if not style.comments:
        text = _without_comments(text)
    if _BARE.search(text):
        text = _without_bare_brackets(text)
    if style.filled:
        text = _filled(text)
    text = tighten(text, short=style.short, merged=style.merged)
    if style.short:
        text = _filled(text)
    lines: list[str] = []
    for line in text.splitlines():
        line = line.rstrip()
        if not line and (not style.airy or not lines or not lines[-1] or lines[-1].endswith(":")):
            continue
        lines.append(line)
    while lines and not lines[-1]:
        lines.pop()
    return "\n".join(lines)


def _shortened_docstrings(text: str, kept: bool) -> str:
    """Docstrings as their first line, where that is a whole sentence or two, or not at all."""
    edits, place = [], Text(text)
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, FunctionNode | ast.ClassDef) or ast.get_docstring(node, clean=False) is None:
            continue
        docstring, words = node.body[0], (ast.get_docstring(node) or "").split("\n\n")[0]
        column = " " * docstring.col_offset
        line = f'{column}"""{words}"""\n' if kept and "\n" not in words else ""
        if not line and len(node.body) == 1:
            line = f"{column}pass\n"
        edits.append(place.whole_lines(docstring.lineno, docstring.end_lineno or 0, line))
    return apply(text, edits)


def _tokens(text: str) -> list[tokenize.TokenInfo]:
    return list(tokenize.generate_tokens(io.StringIO(text + "\n").readline))


def _without_comments(text: str) -> str:
    lines = text.split("\n")
    gone: set[int] = set()
    for token in _tokens(text):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
            if not lines[row - 1]:
                gone.add(row - 1)
    return "\n".join(line for number, line in enumerate(lines) if number not in gone)


def _without_bare_brackets(text: str) -> str:
    """`(name)` without the brackets that a decided expression has left around it."""
    tokens, lines = _tokens(text), text.split("\n")
    gone: list[tuple[int, int]] = []
    for place, token in enumerate(tokens):
        before = tokens[place - 1] if place else token
        called = before.string in _CLOSING or (before.type == tokenize.NAME and not keyword.iskeyword(before.string))
        if token.string == "(" and not called:
            end = place + 1
            while tokens[end].type == tokenize.NAME and tokens[end + 1].string == ".":
                end += 2
            name, close = tokens[end], tokens[end + 1]
            plain = name.type == tokenize.NAME and not keyword.iskeyword(name.string)
            if plain and close.string == ")" and token.start[0] == close.start[0]:
                gone += [token.start, close.start]
    for row, column in sorted(gone, reverse=True):
        lines[row - 1] = lines[row - 1][:column] + lines[row - 1][column + 1 :]
    return "\n".join(lines)


def _filled(text: str) -> str:
    """Statements that go over several lines on one line, or on as few as the width allows."""
    lines = text.split("\n")
    out: list[str] = []
    at = 0
    for first, last, tokens in _statements(text):
        out += lines[at:first]
        broken = lines[first : last + 1]
        plain = all(t.type != tokenize.COMMENT and t.start[0] == t.end[0] for t in tokens)
        long = last > first or len(broken[0]) > WIDTH
        out += _fill(tokens, broken[0]) if long and plain else broken
        at = last + 1
    return "\n".join(out + lines[at:])


def _statements(text: str) -> Iterator[tuple[int, int, list[tokenize.TokenInfo]]]:
    """(first line, last line, tokens) of every logical line, lines from 0."""
    held: list[tokenize.TokenInfo] = []
    for token in _tokens(text):
        if token.type in _SKIPPED:
            if token.type == tokenize.NEWLINE and held:
                yield held[0].start[0] - 1, held[-1].end[0] - 1, held
                held = []
        elif held or token.type != tokenize.COMMENT:
            held.append(token)


def _fill(tokens: list[tokenize.TokenInfo], first_line: str) -> list[str]:
    indent = len(first_line) - len(first_line.lstrip())
    pieces = _pieces(tokens)
    further = indent + (8 if pieces[-1][0].endswith(":") else 4)
    lines: list[str] = []
    while pieces:
        margin = further if lines else indent
        count = _that_fit(pieces, margin)
        lines.append(" " * margin + "".join(text for text, _ in pieces[:count]).strip())
        pieces = pieces[count:]
    return lines


def _that_fit(pieces: list[tuple[str, int]], margin: int) -> int:
    """How many pieces go on a line: all, or up to the outermost break that leaves it at least half full."""
    length, best, best_depth = margin, 0, 1 << 30
    for place, (text, depth) in enumerate(pieces):
        length += len(text)
        if length - (len(text) - len(text.rstrip())) > WIDTH:
            return max(best, 1)
        half = length > WIDTH // 2
        if place + 1 < len(pieces) and (half or not best) and depth <= best_depth:
            best, best_depth = place + 1, depth if half else 1 << 30
    return len(pieces)


def _pieces(tokens: list[tokenize.TokenInfo]) -> list[tuple[str, int]]:
    """The statement on one line, cut where it may be broken; with each piece the bracket depth after it."""
    pieces: list[tuple[str, int]] = []
    text, depth = "", 0
    for place, token in enumerate(tokens):
        following = tokens[place + 1] if place + 1 < len(tokens) else None
        if _is_spare_comma(tokens, place):
            continue
        text += token.string
        depth += (token.string in _OPENING) - (token.string in _CLOSING)
        if following is None:
            break
        closing, opening = following.string in _CLOSING, token.string in _OPENING
        if token.end[0] == following.start[0]:
            text += " " * (following.start[1] - token.end[1])
        elif not opening and not closing and following.string not in (".", ",", ":"):
            text += " "
        word = following.string in ("and", "or", "if", "else", "for")
        strings = token.type == following.type == tokenize.STRING
        if depth and not closing and (opening or token.string == "," or word or strings):
            pieces.append((text, depth))
            text = ""
    return [*pieces, (text, 0)]


def _is_spare_comma(tokens: list[tokenize.TokenInfo], place: int) -> bool:
    """A comma at the end of a line before the bracket that closes a call, a signature or a longer collection."""
    if tokens[place].string != "," or place + 1 == len(tokens) or tokens[place + 1].string not in _CLOSING:
        return False
    if tokens[place].end[0] == tokens[place + 1].start[0]:
        return False
    depth, commas = 0, 0
    for back in range(place - 1, -1, -1):
        string = tokens[back].string
        if string in _CLOSING:
            depth += 1
        elif string in _OPENING and depth:
            depth -= 1
        elif string in _OPENING:
            before = tokens[back - 1] if back else None
            called = before is not None and (before.type == tokenize.NAME or before.string in (")", "]"))
            keyword = before is not None and before.string in ("in", "return", "and", "or", "not", "if", "else")
            return commas > 0 or string == "{" or (string == "[" and not called) or (called and not keyword)
        elif string == "," and depth == 0:
            commas += 1
    return False
