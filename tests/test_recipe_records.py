"""The later records: sizes as published, orders of layers. All recipes: what each changes in its parent, and why."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from paramgolf.model.gpt import GPT
from paramgolf.optim.schedule import loop_passes, lr_mul
from paramgolf.pack.stored import payload_bytes
from paramgolf.quant.plan import tensor_table
from paramgolf.recipe.load import load_recipe, recipe_names, to_table
from paramgolf.train.budget import all_shapes, shape_at
from paramgolf.train.modes import check_switches

RECORDS = ("record-1.1458", "record-1.1228", "record-1.0856", "record-1.0611", "record-1.0565")
PARAMS = {
    "record-1.1458": 22_368_841,
    "record-1.1228": 26_993_756,
    "record-1.0856": 35_943_512,
    "record-1.0611": 35_945_671,
    "record-1.0565": 35_945_671,
}
PAYLOADS = {"record-1.0856": 36_079_792, "record-1.0611": 36_083_230, "record-1.0565": 36_083_230}


def built(name: str) -> GPT:
    recipe = load_recipe(name)
    with torch.device("meta"):
        return GPT(recipe.model, recipe.data.vocab_size)


@pytest.mark.parametrize("name", RECORDS)
def test_parameters_as_published(name: str) -> None:
    assert sum(p.numel() for p in built(name).parameters()) == PARAMS[name]


@pytest.mark.parametrize("name", PAYLOADS)
def test_uncompressed_payload_as_published(name: str) -> None:
    recipe, model = load_recipe(name), built(name)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert payload_bytes(tensor_table(shapes, recipe.quant, recipe.model.num_layers)) == PAYLOADS[name]


def test_executed_layers_as_published() -> None:
    loop45, loop35 = built("record-1.0856").order, built("record-1.0611").order
    assert (loop45.layers[: loop45.encoder], loop45.layers[loop45.encoder :]) == (
        (0, 1, 2, 3, 4, 5, 4), (5, 4, 5, 6, 7, 8, 9, 10),
    )  # fmt: skip
    assert (loop35.layers[: loop35.encoder], loop35.layers[loop35.encoder :]) == (
        (0, 1, 2, 3, 4, 5, 3, 4), (5, 3, 4, 5, 6, 7, 8, 9, 10),
    )  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_the_challenge_rules_hold_and_the_switches_fit(name: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.budget.seconds, recipe.budget.bytes, recipe.budget.clock) == (600.0, 16_000_000, "challenge")
    assert recipe.pack.count == "challenge" and recipe.train.batch_tokens == 786_432
    check_switches(recipe)
    assert all(shape.step_tokens == recipe.train.batch_tokens for shape in all_shapes(recipe))


def test_the_schedule_of_the_best_record() -> None:
    section = load_recipe("record-1.0611").schedule
    factors = [lr_mul(section, step=9, elapsed=f * 600, budget_seconds=600) for f in (0.0, 0.1, 0.575, 0.99)]
    assert factors == pytest.approx([1.0, 1.0, 0.5, 0.1])
    assert [loop_passes(section, 2, f) for f in (0.34, 0.35)] == [0, 2]
    grown = load_recipe("record-1.0565")
    assert [shape_at(grown, f).seq_len for f in (0.0, 0.09, 0.1, 0.69, 0.7)] == [1024, 1024, 2048, 2048, 3072]


# What differs from the parent, in the files and in docs/recipes.md.


def own_lines(name: str) -> tuple[str, dict[str, Any]]:
    """The recipe that `name` extends and, as the loader merges them, the values of its file by dotted key."""
    own = tomllib.loads((resources.files("paramgolf") / "recipes" / f"{name}.toml").read_text(encoding="utf-8"))
    parent = own.pop("extends", "")
    del own["title"]
    return parent, dict(leaves(own))


def leaves(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Lists (rules, levels, stages) and empty tables (a part as it is) are values: they replace the parent's whole."""
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def looked_up(recipe: str, key: str) -> Any:
    """The resolved value, defaults filled in; nothing where a part or a grid is not there."""
    value: Any = to_table(load_recipe(recipe))
    for part in key.split("."):
        if part not in value:
            return None
        value = value[part]
    return value


@pytest.mark.parametrize("name", [name for name in recipe_names() if own_lines(name)[0]])
def test_every_line_of_a_recipe_changes_something(name: str) -> None:
    """A value equal to the parent's is no difference and only misleads."""
    parent, own = own_lines(name)
    assert [key for key in own if looked_up(name, key) == looked_up(parent, key)] == []


def documented(name: str) -> tuple[str, dict[str, tuple[str, str]]]:
    """The parent that docs/recipes.md names for a recipe, and the value and the reason of each key in its table."""
    page = Path(__file__).parents[1] / "docs" / "recipes.md"
    parts = page.read_text(encoding="utf-8").split("\n### ")[1:]
    (part,) = (part for part in parts if part.startswith(f"`{name}`"))
    heading = re.fullmatch(r"`[^`]+`(?:, over `([^`]+)`)?", part.splitlines()[0])
    assert heading, part.splitlines()[0]
    rows: dict[str, tuple[str, str]] = {}
    for line in part.split("\n## ")[0].splitlines():
        if line.startswith("| `"):
            keys, value, why = (cell.strip() for cell in line.strip("|").split(" | "))
            names = re.findall(r"`([^`]+)`", keys)
            values = value.split(", ") if len(names) > 1 else [value]
            assert len(values) == len(names), line
            assert not set(names) & set(rows), line
            rows |= {key: (text, why) for key, text in zip(names, values, strict=True)}
    return heading[1] or "", rows


def says(text: str, value: Any) -> bool:
    """Whether a cell states the value. Numbers may be 786,432 or 1/31; parts and lists of tables go in words."""
    if isinstance(value, bool):
        return text == str(value).lower()
    if isinstance(value, int | float):
        above, _, below = text.replace(",", "").partition("/")
        return float(above) / float(below or 1) == pytest.approx(value, rel=1e-12)
    if isinstance(value, str):
        return text == value
    if value and not isinstance(value[0], dict):
        return bool(tomllib.loads(f"value = {text.strip('`')}")["value"] == value)
    return bool(text)


@pytest.mark.parametrize("name", recipe_names())
def test_every_line_of_a_recipe_has_its_reason_in_the_docs(name: str) -> None:
    parent, own = own_lines(name)
    named, rows = documented(name)
    assert named == parent
    assert sorted(rows) == sorted(own)
    assert [key for key, (text, why) in rows.items() if not (says(text, own[key]) and why)] == []
