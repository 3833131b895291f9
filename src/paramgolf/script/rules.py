"""The precision rules of a recipe written out as the function that a script asks for the store of a tensor."""

from __future__ import annotations

import json

from paramgolf.recipe.sections import Recipe, RuleSection
from paramgolf.script.source import Import

# What the written function uses, beside what its module has.
IMPORTS = (
    Import("fnmatch", "fnmatchcase", "fnmatchcase"),
    Import("math", "", "math"),
    Import("paramgolf.model.names", "is_control", "is_control"),
)


def store_function(recipe: Recipe) -> str:
    """`plain.pack.store_of` for one recipe: the same answers as `quant.plan.fits`, rule by rule."""
    lines = [
        "def store_of(name: str, shape: tuple[int, ...], recipe: Recipe) -> str:",
        '    """How a tensor is stored."""',
    ]
    for rule in recipe.quant.rules:
        condition = _condition(rule, recipe.model.num_layers)
        if not condition:
            return "\n".join([*lines, f'    return "{rule.store}"']) + "\n"
        lines += [f"    if {condition}:", f'        return "{rule.store}"']
    return "\n".join([*lines, "    raise LookupError(name)"]) + "\n"


NAMED_GRIDS = "def named_grids(recipe: Recipe) -> Mapping[str, GridSection]:\n    return recipe.quant.grids\n"


def _condition(rule: RuleSection, num_layers: int) -> str:
    parts = []
    if rule.min_size:
        parts.append(f"math.prod(shape) >= {rule.min_size}")
    if rule.max_size:
        parts.append(f"math.prod(shape) <= {rule.max_size}")
    if rule.ndim:
        parts.append(f"len(shape) == {rule.ndim}")
    globs = [alternative.strip() for alternative in rule.match.split("|")]
    if len(globs) > 1 and not any(set(glob) & set("@&") for glob in globs):
        parts.append(f"any(fnmatchcase(name, pattern) for pattern in ({', '.join(map(quoted, globs))}))")
    elif rule.match != "*":
        ways = [" and ".join(_term(t.strip(), num_layers) for t in glob.split("&")) for glob in globs]
        either = " or ".join(ways)
        parts.append(f"({either})" if len(ways) > 1 and parts else either)
    return " and ".join(parts)


def _term(term: str, num_layers: int) -> str:
    if term == "@control":
        return "is_control(name)"
    if term.startswith("@last_layers:"):
        return f"layer_of(name) >= {num_layers - int(term.partition(':')[2])}"
    return f"fnmatchcase(name, {quoted(term)})"


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
