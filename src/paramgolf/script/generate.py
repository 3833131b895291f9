"""`generate(recipe)`: one self-contained training script for one recipe, made from the package's own source."""

from __future__ import annotations

import ast
import dataclasses
import json
import textwrap
from collections.abc import Callable
from typing import Any

from paramgolf.errors import GolfError
from paramgolf.recipe.sections import Recipe
from paramgolf.script.constants import Constants
from paramgolf.script.emit import Emitter, join
from paramgolf.script.facts import MAIN, facts_of, registries_of, substitutes_of, used_grids, written_of
from paramgolf.script.infer import Types
from paramgolf.script.inline import inlined
from paramgolf.script.layout import STYLES, Style, layout
from paramgolf.script.nodes import forget
from paramgolf.script.reach import Reach
from paramgolf.script.rules import IMPORTS
from paramgolf.script.sites import Sites
from paramgolf.script.source import Import, Package
from paramgolf.script.spare import without_spare
from paramgolf.script.units import Place, Units, unit_of
from paramgolf.script.values import Facts

SECTIONS = "paramgolf.recipe.sections"
MAX_LINES = 1500
_ROUNDS = 40
_WHOLE = frozenset({"ModelSection", "OptimSection", "GridSection"})  # read field by field or as a whole


def generate(recipe: Recipe, *, own_tokenizer: bool = False) -> str:
    """The script. Deterministic. Raises GolfError for a recipe that needs more than a script can do.

    With `own_tokenizer` it carries the coder of tokenizers made by this package; others need none.
    """
    check_supported(recipe)
    reach = closure(recipe, own_tokenizer=own_tokenizer)
    emitter = Emitter(reach)
    blocks = emitter.definitions(frozenset({SECTIONS}))
    emitter.used |= {Import("dataclasses", "make_dataclass", "make_dataclass"), Import("typing", "Any", "Any")}
    recipe_text = layout(section_text(recipe, reach), STYLES[-1])

    def laid_out(style: Style) -> str:
        body = join([text for block in blocks if (text := layout(block, style))], style)
        body = f'{recipe_text}\n\n{body}\n\nif __name__ == "__main__":\n    main(RECIPE)\n'
        return f"{header(recipe)}\n\n{emitter.imports(body)}\n\n\n{body}"

    text = most_readable(laid_out)
    ast.parse(text)
    forget()
    unit_of.cache_clear()
    return text


def code_bytes(recipe: Recipe, *, own_tokenizer: bool) -> int:
    """Bytes of the script of a run, 0 where `pack.count` leaves them out. What the solver or `codec = "auto"` will find
    is not known yet: the recipe's own clips and rans stand for it. Some seconds of work."""
    if recipe.pack.count == "file":
        return 0
    codec = "rans" if recipe.pack.codec == "auto" else recipe.pack.codec
    pack = dataclasses.replace(recipe.pack, fit=False, codec=codec)
    return len(generate(dataclasses.replace(recipe, pack=pack), own_tokenizer=own_tokenizer).encode())


def most_readable(laid_out: Callable[[Style], str]) -> str:
    """The text in the first style that keeps it within the limit of lines, or in the last. Later styles are shorter."""
    low, high, text = 0, len(STYLES) - 1, ""
    while low < high:
        middle = (low + high) // 2
        tried = laid_out(STYLES[middle])
        if tried.count("\n") <= MAX_LINES:
            high, text = middle, tried
        else:
            low = middle + 1
    return text or laid_out(STYLES[-1])


def closure(recipe: Recipe, *, own_tokenizer: bool) -> Reach:
    """Fold, follow what is left, learn which attributes can only be one constant, and fold again."""
    original = Package(substitutes_of(recipe, own_tokenizer=own_tokenizer))
    registries = registries_of(recipe)
    types = Types(original, registries)
    facts = facts_of(recipe)
    texts: dict[Place, str] = {}
    for symbol, text in written_of(recipe).items():
        original.add_imports(symbol.module, IMPORTS)
        texts[symbol.module, original.module(symbol.module).places[symbol.name]] = text
    known: Facts | None = None
    changed: dict[Place, str] = {}
    for _ in range(_ROUNDS):
        units = Units(original, types, facts, texts, known, changed)
        reach = Reach(original, units, types, registries)
        reach.run(MAIN)
        constants = Constants(reach, facts)
        texts, known = units.pruned(reach.kept), facts
        facts = learn(constants, facts)
        changed = rewritten(constants) if facts == known else {}
        texts |= changed
        if facts == known and not changed:
            break
    return reach


def rewritten(constants: Constants) -> dict[Place, str]:
    """Texts without what no caller needs, or with what has one caller put there."""
    sites = Sites(constants)
    return without_spare(sites) or inlined(sites)


def learn(constants: Constants, facts: Facts) -> Facts:
    """The facts and what the kept code adds to them."""
    attributes = constants.attributes()
    return dataclasses.replace(
        facts,
        values={**constants.fields(), **attributes, **facts.values},
        inline=facts.inline | {key for key in attributes.keys() - facts.values.keys() if not attributes[key]},
        parameters={**constants.parameters(), **facts.parameters},
        dead=facts.dead | constants.dead(),
        returns={**constants.returns(), **facts.returns},
        no_ops=facts.no_ops | constants.no_ops(),
    )


def header(recipe: Recipe) -> str:
    title = f"Training script of the recipe {recipe.name}" + (f" - {recipe.title}" if recipe.title else "")
    return (
        f'"""{textwrap.fill(title, 110)}\n\nGenerated by paramgolf from its own modules, for this recipe only. '
        "Run it with\n"
        "DATA_PATH=... TOKENIZER_PATH=... SEED=1337 torchrun --standalone --nproc_per_node=8 train_gpt.py\n"
        '"""'
    )


# -- the recipe ------------------------------------------------------------------------------------------------


def section_text(recipe: Recipe, reach: Reach) -> str:
    """The recipe's values, section by section."""
    rows = []
    for section_field in dataclasses.fields(recipe):
        value = getattr(recipe, section_field.name)
        if reach.reads("Recipe", section_field.name):
            rows.append(f"    {section_field.name}={_value_text(value, recipe, reach)},\n")
    return f'{_SECTION}\n\n\nRECIPE = section(\n    "Recipe",\n{"".join(rows)})'


_SECTION = '''def section(kind: str, **values: Any) -> Any:
    """A frozen record of some values of the recipe."""
    return make_dataclass(kind, list(values), frozen=True)(**values)'''


def _value_text(value: Any, recipe: Recipe, reach: Reach) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(k)}: {_value_text(v, recipe, reach)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + "".join(f"{_value_text(v, recipe, reach)}, " for v in value).rstrip(" ") + ")"
    if dataclasses.is_dataclass(value):
        kind = type(value).__name__
        parts = [literal(kind)]
        for f in dataclasses.fields(value):
            held = used_grids(recipe) if f.name == "grids" else getattr(value, f.name)
            if kind in _WHOLE or reach.reads(kind, f.name):
                parts.append(f"{f.name}={_value_text(held, recipe, reach)}")
        return f"section({', '.join(parts)})"
    return literal(value)


def literal(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def check_supported(recipe: Recipe) -> None:
    """GolfError for what a script cannot do."""
    if recipe.pack.codec == "auto":
        raise GolfError("a script needs one codec: set pack.codec to the one the run chose, e.g. pack.codec=rans")
    if recipe.pack.fit:
        raise GolfError("a script does not solve for clips: set pack.fit=false, with the clips the run found")
