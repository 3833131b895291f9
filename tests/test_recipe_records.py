"""The recipes of the later records: sizes as published, orders of layers, and what each changes in its parent."""

from __future__ import annotations

import tomllib
from importlib import resources

import pytest
import torch

from paramgolf.model.gpt import GPT
from paramgolf.optim.schedule import loop_passes, lr_mul
from paramgolf.pack.stored import payload_bytes
from paramgolf.quant.plan import tensor_table
from paramgolf.recipe.load import load_recipe, to_table
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
ALL = (*RECORDS, "frontier")
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


@pytest.mark.parametrize("name", ALL)
def test_every_line_of_a_recipe_changes_something(name: str) -> None:
    """A value equal to the parent's is no difference and only misleads."""
    own = tomllib.loads((resources.files("paramgolf") / "recipes" / f"{name}.toml").read_text(encoding="utf-8"))
    parent = to_table(load_recipe(own["extends"]))
    for section, values in own.items():
        if isinstance(values, dict):
            for key, value in values.items():
                if not isinstance(value, dict):
                    assert parent[section][key] != value, f"{section}.{key}"
