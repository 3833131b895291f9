"""How an artifact is meant to learn while it is scored: what its manifest says of it, and words that change that."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from paramgolf.errors import GolfError
from paramgolf.recipe.load import from_table, parse_override
from paramgolf.recipe.sections import NgramSection, Recipe, TiltSection, TttSection


def manifest_part(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """What an artifact's manifest keeps: the values that differ from the defaults, nothing for what is off."""
    parts: dict[str, dict[str, Any]] = {}
    if recipe.ttt.kind != "none":
        parts["ttt"] = _changed(recipe.ttt)
    if recipe.tilt.orders:
        parts["tilt"] = _changed(recipe.tilt)
    if recipe.ngram.levels:
        parts["ngram"] = {"levels": [dataclasses.asdict(level) for level in recipe.ngram.levels]}
    return parts


def _changed(section: TttSection | TiltSection) -> dict[str, Any]:
    values = dataclasses.asdict(section)
    return {f.name: values[f.name] for f in dataclasses.fields(section) if values[f.name] != f.default}


def chosen(section: TttSection, wanted: bool) -> TttSection:
    """The section to score with: of kind "none" where that is not `wanted`, by adapters where an artifact leaves it
    open."""
    if not wanted:
        return dataclasses.replace(section, kind="none")
    return dataclasses.replace(section, kind="lora") if section.kind == "none" else section


def ngram_of(manifest: Mapping[str, Any]) -> NgramSection:
    """The n-gram cache that an artifact asks for; no levels if it does not."""
    part = manifest.get("ngram")
    return from_table({"name": "artifact", "ngram": dict(part) if isinstance(part, dict) else {}}).ngram


def check_used(words: Iterable[str], ttt: bool) -> None:
    """GolfError for a word about test-time training where there is none."""
    for word in words:
        key = word.partition("=")[0].strip()
        if key.startswith("ttt.") and not ttt:
            raise GolfError(f"--set {key} has no effect without --ttt; add it")


def settings_of(manifest: Mapping[str, Any], words: Iterable[str] = ()) -> tuple[TttSection, TiltSection]:
    """The sections of an artifact with `words` like "ttt.lr=0.01" or "tilt.orders=[16,8]" applied; GolfError for other
    words and for values out of range."""
    table: dict[str, Any] = {"name": "artifact"}
    for name in ("ttt", "tilt"):
        part = manifest.get(name)
        table[name] = dict(part) if isinstance(part, dict) else {}
    for word in words:
        path, value = parse_override(word)
        if path[0] not in ("ttt", "tilt") or len(path) != 2:
            raise GolfError(f"--set {word}: only ttt.* and tilt.* can be set for a score; the rest is in the artifact")
        table[path[0]][path[1]] = value
    recipe = from_table(table)
    return recipe.ttt, recipe.tilt
