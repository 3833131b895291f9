"""Names to components. A registry line is data: `name -> "module:attribute"`, imported at first use.

So the recipe can be checked without importing torch, and a name is found with one grep.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from paramgolf.errors import GolfError


def close_match(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'pocket'?"` when a known name is close, else the list of what there is."""
    known = sorted(known)
    hits = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean '{hits[0]}'?" if hits else f"; known: {', '.join(known)}"


class Registry(Mapping[str, Any]):
    """A read-only table of lazily imported components of one kind."""

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        self.kind = kind
        self._entries = entries

    def __getitem__(self, name: str) -> Any:
        target = self._entries.get(name)
        if target is None:
            raise GolfError(f"unknown {self.kind} '{name}'{close_match(name, self._entries)}")
        module, _, attribute = target.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def check(self, name: str) -> str:
        """`name` if it is registered (nothing is imported), else a GolfError with the nearest name."""
        if name not in self._entries:
            raise GolfError(f"unknown {self.kind} '{name}'{close_match(name, self._entries)}")
        return name

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
