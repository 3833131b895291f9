"""From a name or a TOML file and `section.key=value` overrides to a checked `Recipe`.

Recipes inherit (`extends = "baseline"`); every value remembers which file set it, so that
`golf recipes NAME` can show where it comes from. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import TypeAdapter, ValidationError

from paramgolf.errors import GolfError
from paramgolf.recipe.sections import Recipe
from paramgolf.registry import close_match

Table = dict[str, Any]
SECTIONS = {f.name: f for f in dataclasses.fields(Recipe) if f.name not in ("name", "title", "extends")}
_ADAPTER: TypeAdapter[Recipe] = TypeAdapter(Recipe)
DEEPEST = 8  # tables and lists inside one another; ours have 4
LONGEST_CHAIN = 50  # recipes that extend each other
_LEAST = 1e-9  # below it the weight of a token that was not seen is lost in a sum of float64


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A recipe and, for each dotted key that something set, the file or override that set it last."""

    recipe: Recipe
    origin: dict[str, str]


def recipe_names() -> list[str]:
    """The recipes that ship with the package."""
    folder = resources.files("paramgolf") / "recipes"
    return sorted(p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml"))


def load_recipe(name: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe called `name` (or the TOML file at that path) with overrides like `model.dim=256` applied."""
    return resolve(str(name), overrides).recipe


def resolve(name: str, overrides: Iterable[str] = ()) -> Resolved:
    """Like `load_recipe`, with the origin of every value that is not a default."""
    table, origin = _read_chain(name, ())
    for override in overrides:
        path, value = parse_override(override)
        _set(table, path, value, override)
        _came(origin, path, f"override {override}")
    return Resolved(from_table(table, origin), origin)


def from_table(table: Mapping[str, Any], origin: Mapping[str, str] | None = None) -> Recipe:
    """Check a plain table and make the recipe; the error names the key, the value and where it was set."""
    check_depth(table, "recipe")
    try:
        recipe = _ADAPTER.validate_python(dict(table))
    except ValidationError as error:
        raise GolfError(_explain(error, origin or {})) from None
    _check_grids(recipe)
    _check_levels(recipe)
    _check_plain(recipe.model.parts, "model.parts")
    return recipe


def _check_grids(recipe: Recipe) -> None:
    """Rules and QAT may only name grids that the recipe defines."""
    grids = list(recipe.quant.grids)
    for rule in recipe.quant.rules:
        if rule.store not in ("float16", "float32", *grids):
            raise GolfError(
                f"quant.rules: unknown store '{rule.store}'{close_match(rule.store, [*grids, 'float16', 'float32'])}"
            )
    for key, grid in (("qat", recipe.quant.qat), ("post_qat", recipe.quant.post_qat)):
        if grid not in ("", "export", *grids):
            raise GolfError(f"quant.{key}: unknown grid '{grid}'{close_match(grid, [*grids, 'export'])}")
    coarse = recipe.quant.coarse_grid
    if (coarse or recipe.quant.coarse_fraction) and coarse not in grids:
        raise GolfError(f"quant.coarse_grid: unknown grid '{coarse}'{close_match(coarse, grids)}")


def _check_levels(recipe: Recipe) -> None:
    """No level of the n-gram cache may make a token impossible."""
    for level in recipe.ngram.levels:
        if max(level.strength, level.discount) < _LEAST:
            raise GolfError(
                f"ngram.levels, order {level.order}: with strength and discount both 0, or next to it, a token that "
                "was not seen would be impossible; raise one of them"
            )


def check_depth(table: Mapping[str, Any], where: str) -> None:
    """GolfError for tables nested deeper than any recipe's; what is walked by recursion later is checked here."""
    rest: list[tuple[str, Any, int]] = [("", table, 0)]
    while rest:
        key, node, depth = rest.pop()
        if depth > DEEPEST:
            raise GolfError(f"{where}: '{_short(key)}' is nested more than {DEEPEST} deep; write it flatter")
        pairs = node.items() if isinstance(node, Mapping) else enumerate(node)
        rest += [(f"{key}.{k}".lstrip("."), v, depth + 1) for k, v in pairs if isinstance(v, Mapping | list | tuple)]


def _check_plain(value: Any, key: str) -> None:
    """The settings of components are checked here only as far as every record and artifact must hold them."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_plain(inner, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _check_plain(inner, f"{key}.{index}")
    elif not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        raise GolfError(f"recipe key {_short(key)} = {_short(str(value))}: give a finite number, a truth value or text")


def to_table(recipe: Recipe) -> Table:
    """Plain tables, lists, strings and numbers; `from_table(to_table(r)) == r`."""
    plain = dataclasses.asdict(recipe)
    for key in ("stages",):
        plain[key] = list(plain[key])
    plain["quant"]["rules"] = list(plain["quant"]["rules"])
    return plain


def to_toml(recipe: Recipe) -> str:
    """The fully resolved recipe as TOML: every value written out."""
    return tomli_w.dumps(to_table(recipe) | {"extends": ""})


def parse_override(text: str) -> tuple[list[str], Any]:
    """`model.dim=256` -> (["model", "dim"], 256). Values are TOML; anything else is a string. `stages=[]` drops the
    stages of a recipe."""
    key, equals, raw = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path) or (len(path) < 2 and path != ["stages"]):  # the one list that is no section
        raise GolfError(f"override '{text}' is not of the form section.key=value, e.g. model.dim=256")
    try:
        table = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        return path, raw.strip()
    if len(table) > 1:
        raise GolfError(f"override '{_short(text)}' goes on after its value; give one override for each key")
    return path, table["value"]


def _read_chain(name: str, seen: tuple[str, ...]) -> tuple[Table, dict[str, str]]:
    """The tables of `name` and of everything it extends, merged, parents first."""
    if name in seen:
        raise GolfError(f"recipe '{name}' extends itself through {' -> '.join((*seen, name))}; break the circle")
    if len(seen) >= LONGEST_CHAIN:
        raise GolfError(f"recipe '{seen[0]}' extends more than {LONGEST_CHAIN} others in a row; merge some of them")
    label, text = _read_text(name)
    try:
        own = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise GolfError(f"recipe {label} is not valid TOML: {error}; mend the file") from None
    check_depth(own, label)
    parent = str(own.get("extends", ""))
    table: Table = {}
    origin: dict[str, str] = {}
    if parent:
        if _is_path(parent) and _is_path(name):
            parent = os.path.abspath(Path(name).parent / parent)
        table, origin = _read_chain(parent, (*seen, name))
    own.setdefault("name", Path(label).stem)
    for path, value in _leaves(own):
        _set(table, list(path), value, f"{label}: {'.'.join(path)}")
        _came(origin, path, label)
    return table, origin


def _came(origin: dict[str, str], path: Sequence[str], source: str) -> None:
    """Note where a value came from; of a table that it replaces nothing is left."""
    key = ".".join(path)
    for old in [name for name in origin if name.startswith(f"{key}.")]:
        del origin[old]
    origin[key] = source


def origin_of(origin: Mapping[str, str], key: str) -> str:
    """What set a dotted key, by itself or with the table that holds it; "" = nothing did."""
    while key not in origin and "." in key:
        key = key.rpartition(".")[0]
    return origin.get(key, "")


def _is_path(name: str) -> bool:
    """Whether a recipe is named by its file; `extends` then names files beside it."""
    return name.endswith(".toml") or "/" in name


def _read_text(name: str) -> tuple[str, str]:
    if _is_path(name):
        try:
            return Path(name).name, Path(name).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise GolfError(f"cannot read recipe file {name}: {reason}; give a name from `golf recipes`") from None
    if name not in recipe_names():
        raise GolfError(f"no recipe '{name}'{close_match(name, recipe_names())}")
    return f"{name}.toml", (resources.files("paramgolf") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")


def _leaves(table: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def _set(table: Table, path: Sequence[str], value: Any, where: str) -> None:
    """Set a dotted key, refusing names that no section has."""
    _check_path(path, where)
    node: Any = table
    for depth, key in enumerate(path[:-1]):
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise GolfError(f"{where}: '{'.'.join(path[: depth + 1])}' holds a value, not a table of keys")
    node[path[-1]] = value


def _check_path(path: Sequence[str], where: str) -> None:
    top = [f.name for f in dataclasses.fields(Recipe)]
    if path[0] not in top:
        raise GolfError(f"{where}: unknown section '{path[0]}'{close_match(path[0], top)}")
    section = SECTIONS.get(path[0])
    if section is None or len(path) < 2:
        return
    if path[0] == "stages":
        raise GolfError(f"{where}: stages is a list of tables; write it in a recipe file as [[stages]]")
    known = [f.name for f in dataclasses.fields(section.default_factory)]  # type: ignore[arg-type]
    if path[1] not in known:
        raise GolfError(f"{where}: unknown key '{path[0]}.{path[1]}'{close_match(path[1], known)}")


def _explain(error: ValidationError, origin: Mapping[str, str]) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    message = first["msg"][:1].lower() + first["msg"][1:]
    where = origin_of(origin, key)
    shown = f" = {_short(repr(first['input']))}" if isinstance(first["input"], str | int | float | bool) else ""
    return f"recipe key {key}{shown}: {message}" + (f" (set by {_short(where)})" if where else "")


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
