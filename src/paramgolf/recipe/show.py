"""Recipes as text for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paramgolf.recipe.load import SECTIONS, Resolved, origin_of, to_table
from paramgolf.recipe.sections import Recipe


def recipe_listing(recipes: Sequence[Recipe]) -> str:
    width = max(len(r.name) for r in recipes)
    rows = [f"{r.name:{width}}  {r.title}" for r in recipes]
    return "\n".join([*rows, "", "golf recipes NAME shows every value; golf run NAME runs it."])


def recipe_text(resolved: Resolved) -> str:
    """Every key of every section, its value, and the file or override that set it (nothing: the default)."""
    table = to_table(resolved.recipe)
    lines = [f"# {resolved.recipe.name}: {resolved.recipe.title}"]
    for section in SECTIONS:
        lines += ["", f"[{section}]"]
        if section == "stages":
            lines += [f"{i}: {stage}" for i, stage in enumerate(table["stages"])] or ["(none)"]
            continue
        for path, value in _flatten(table[section]):
            origin = origin_of(resolved.origin, f"{section}.{path}")
            lines.append(f"{path} = {_shown(value)}" + (f"   # {origin}" if origin else ""))
    return "\n".join(lines)


def _flatten(table: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in table.items():
        if isinstance(value, dict) and value:
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "[" + "".join(f"\n    {item}," for item in value) + ("\n]" if value else "]")
    return f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
