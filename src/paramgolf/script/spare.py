"""Parameters that a kept function does not read, and fields that nobody reads: they leave with their arguments."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from paramgolf.script.constants import Key
from paramgolf.script.fold import is_harmless
from paramgolf.script.nodes import FunctionNode, content_of
from paramgolf.script.sites import Brackets, Site, Sites, parameters_of
from paramgolf.script.source import Symbol
from paramgolf.script.text import Edit, Text, apply
from paramgolf.script.units import Place


class Written:
    """The text of a unit with its brackets, and the edits that it gets."""

    def __init__(self, text: str) -> None:
        self.text, self.brackets, self.edits = Text(text), Brackets(text), list[Edit]()


def without_spare(sites: Sites) -> dict[Place, str]:
    """The texts that change, without spare parameters, fields and arguments."""
    units, written = sites.reach.units, dict[Symbol, Written]()
    for key in sites.known:
        names = _spare(key, sites)
        if not names:
            continue
        homes = {symbol: units.unit(symbol) for symbol in (key[0], *(site.home for site in sites.known[key]))}
        for symbol, unit in homes.items():
            if symbol not in written:
                written[symbol] = Written(unit.text)
        edits = list(_declaration(key, names, sites, written[key[0]]))
        changes = [(written[key[0]], edits)]
        for site in sites.known[key]:
            home = written[site.home]
            elements = home.brackets.elements(home.text.end(site.call.func))
            given = _given(key, site, sites)
            gone = [place for place, name in enumerate(given) if name in names]
            if len(given) != len(_filled(elements, home.text)):  # a comma that parts no arguments
                break
            changes.append((home, list(_removed(elements, gone, home.text))))
        else:
            for home, found in changes:
                home.edits += found
    texts = {symbol: apply(home.text.data.decode(), home.edits) for symbol, home in written.items() if home.edits}
    return {units.place(symbol): text for symbol, text in texts.items()}


def _names(key: Key, sites: Sites) -> tuple[list[str], list[str]]:
    node = sites.constants.function(key)
    return (list(sites.constants.fields_of(key[0])), []) if node is None else parameters_of(node, bool(key[1]))


def _given(key: Key, site: Site, sites: Sites) -> list[str]:
    """The parameter of every argument, in the order of the text."""
    positional, _ = _names(key, sites)
    names = list(zip(site.call.args, positional, strict=False))
    found: list[tuple[ast.expr, str]] = [*names, *((k.value, k.arg or "") for k in site.call.keywords)]
    return [name for _, name in sorted(found, key=lambda pair: (pair[0].lineno, pair[0].col_offset))]


def _spare(key: Key, sites: Sites) -> set[str]:
    node, constants = sites.constants.function(key), sites.constants
    positional, keyword = _names(key, sites)
    if node is None:
        kept = constants.read | constants.replaced | {name for _, name in constants.stores}
        names = {name for name in positional if name not in kept} if not _is_nested(key[0], sites) else set()
    else:
        read = content_of(node).loads
        names = {name for name in (*positional, *keyword) if name not in read}
    for site in sites.known[key]:
        for value, name in [
            *zip(site.call.args, positional, strict=False),
            *((k.value, k.arg) for k in site.call.keywords),
        ]:
            if not all(is_harmless(part) for part in ast.walk(value)):
                names.discard(name or "")
    return names


def _is_nested(symbol: Symbol, sites: Sites) -> bool:
    """Whether a dataclass has more of a constructor than its fields."""
    node = sites.reach.units.node(symbol)
    assert isinstance(node, ast.ClassDef)
    made = [part for part in node.body if isinstance(part, FunctionNode) and part.name == "__post_init__"]
    return bool(made) or "init=False" in ast.unparse(node)


def _declaration(key: Key, names: set[str], sites: Sites, home: Written) -> Iterator[Edit]:
    node, text = sites.constants.function(key), home.text
    if node is None:
        owner = sites.reach.units.node(key[0])
        assert isinstance(owner, ast.ClassDef)
        left = [
            part for part in owner.body if not (isinstance(part, ast.AnnAssign) and ast.unparse(part.target) in names)
        ]
        for part in owner.body:
            if part not in left:
                first, last = text.first_line(part), part.end_lineno or 0
                yield text.whole_lines(first, last, "" if left or part is not owner.body[0] else "    pass\n")
        return
    after = text.data.index(node.name.encode(), text.start(node) + 3) + len(node.name.encode())
    elements = home.brackets.elements(after)
    words = [text.data[start:end].split(b":")[0].split(b"=")[0].strip().decode() for start, end in elements]
    gone = [place for place, word in enumerate(words) if word in names]
    keyword = {a.arg for a in node.args.kwonlyargs}
    if "*" in words and keyword and keyword <= names:
        gone.append(words.index("*"))
    yield from _removed(elements, sorted(gone), text)


def _removed(elements: list[tuple[int, int]], gone: list[int], text: Text) -> Iterator[Edit]:
    """The elements of a bracket without some of them."""
    filled = _filled(elements, text)
    if not gone:
        return
    if len(gone) == len(filled):
        yield Edit(elements[0][0], elements[-1][1], "")
        return
    leading = next(place for place in range(len(filled)) if place not in gone)
    if leading:
        start = elements[leading][0]
        start += len(text.data[start:]) - len(text.data[start:].lstrip())
        yield Edit(elements[0][0], start, "")
    for place in gone:
        if place > leading:
            yield Edit(elements[place][0] - 1, elements[place][1], "")


def _filled(elements: list[tuple[int, int]], text: Text) -> list[tuple[int, int]]:
    """Without the nothing after a last comma, or in an empty bracket."""
    return [element for element in elements if text.data[element[0] : element[1]].strip()]
