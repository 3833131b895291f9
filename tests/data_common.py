"""What the tests of data have in common: English to prepare, and a recipe's table for it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from paramgolf.data import builtin, split
from paramgolf.recipe.sections import DataSection

SMALL = DataSection(vocab_size=300)


@lru_cache
def topics() -> list[bytes]:
    """Some hundred kB of English in some 75 documents."""
    return list(dict.fromkeys(bytes(d.data) for d in builtin.documents() if d.name.startswith("pydoc/")))


def write(path: Path, documents: list[bytes]) -> Path:
    path.write_bytes(split.join(documents))
    return path
