"""Reading f-strings of Python 3.12 (PEP 701: any quotes inside the braces) with an older parser.

Each f-string is replaced by an empty string over as many lines, so that everything else keeps its line number.
"""

from __future__ import annotations

import re

_WORD = re.compile(r"[A-Za-z_]\w*")
_QUOTE = re.compile(r"'''|\"\"\"|'|\"")
_PREFIXES = {"", "f", "r", "b", "u", "fr", "rf", "br", "rb"}


def blank_fstrings(text: str) -> str:
    """`text` with every f-string emptied. Raises ValueError when a string does not end."""
    out: list[str] = []
    i = 0
    while i < len(text):
        word = _WORD.match(text, i)
        prefix = word.group().lower() if word else ""
        start = i + len(prefix) if prefix in _PREFIXES else i
        quote = _QUOTE.match(text, start)
        if quote and (prefix in _PREFIXES):
            end = _string_end(text, quote.end(), quote.group(), "f" in prefix, 0)
            plain = text[i:end]
            out.append("'''" + "\n" * plain.count("\n") + "'''" if "f" in prefix else plain)
            i = end
        elif word:
            out.append(word.group())
            i = word.end()
        elif text[i] == "#":
            end = text.find("\n", i)
            end = len(text) if end < 0 else end
            out.append(text[i:end])
            i = end
        else:
            out.append(text[i])
            i += 1
    return "".join(out)


def _string_end(text: str, i: int, quote: str, is_f: bool, depth: int) -> int:
    """Index after the closing quote of a string whose first character is at `i`."""
    if depth > 20:
        raise ValueError("f-strings nested too deeply")
    while i < len(text):
        if text.startswith(quote, i):
            return i + len(quote)
        if text[i] == "\\":
            i += 2
        elif is_f and text[i] == "{" and not text.startswith("{{", i):
            i = _braces_end(text, i + 1, depth)
        else:
            i += 2 if is_f and text.startswith("{{", i) else 1
    raise ValueError("a string does not end")


def _braces_end(text: str, i: int, depth: int) -> int:
    """Index after the brace that closes the replacement field whose content starts at `i`."""
    level = 1
    while i < len(text):
        quote = _QUOTE.match(text, i)
        if quote:
            back = re.search(r"[A-Za-z]*$", text[max(0, i - 2) : i])
            prefix = back.group().lower() if back else ""
            i = _string_end(text, quote.end(), quote.group(), prefix in ("f", "fr", "rf"), depth + 1)
            continue
        level += (text[i] == "{") - (text[i] == "}")
        i += 1
        if level == 0:
            return i
    raise ValueError("a brace of an f-string is not closed")
