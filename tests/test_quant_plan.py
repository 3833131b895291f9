"""Precision rules: order, patterns, sizes, and the payloads the published systems logged."""

from __future__ import annotations

import pytest
import torch

from paramgolf.errors import GolfError
from paramgolf.model.gpt import GPT
from paramgolf.pack.stored import payload_bytes
from paramgolf.quant.plan import plan, tensor_table
from paramgolf.recipe.load import load_recipe
from paramgolf.recipe.sections import GridSection, QuantSection, RuleSection

SHAPES = {
    "tok_emb.weight": (1024, 64),
    "skip_weights": (2, 64),
    "blocks.0.attn_scale": (64,),
    "blocks.0.attn.c_k.weight": (32, 64),
    "blocks.2.attn.c_k.weight": (32, 64),
    "blocks.3.attn.c_k.weight": (32, 64),
    "blocks.10.attn.c_k.weight": (32, 64),
    "bigram.scale": (),
}


def section(*rules: RuleSection, **grids: GridSection) -> QuantSection:
    return QuantSection(rules=rules, grids=grids or {"int6": GridSection(bits=6), "int8": GridSection()})


def stores(quant: QuantSection, num_layers: int = 11) -> dict[str, str]:
    return {name: store.name for name, store in plan(SHAPES, quant, num_layers).items()}


def test_first_fitting_rule_decides() -> None:
    chosen = stores(
        section(
            RuleSection(match="@control", store="float32"),
            RuleSection(match="*.c_k.weight&@last_layers:1|tok_emb.weight", store="float16"),
            RuleSection(max_size=100, store="float16"),
            RuleSection(store="int6"),
        )
    )
    assert chosen["skip_weights"] == chosen["blocks.0.attn_scale"] == "float32"
    assert chosen["bigram.scale"] == "float16"
    assert chosen["blocks.10.attn.c_k.weight"] == chosen["tok_emb.weight"] == "float16"
    assert chosen["blocks.3.attn.c_k.weight"] == chosen["blocks.2.attn.c_k.weight"] == "int6"


def test_small_before_control_is_the_reference_behaviour_by_order() -> None:
    chosen = stores(section(RuleSection(max_size=65_536, store="float16"), RuleSection(store="int8")))
    assert chosen["blocks.0.attn_scale"] == "float16"


def test_last_layers_counts_from_the_layer_count_and_number_patterns_do_not() -> None:
    last = section(RuleSection(match="@last_layers:2&*.c_k.weight", store="float16"), RuleSection(store="int6"))
    assert stores(last, 4)["blocks.2.attn.c_k.weight"] == "float16"
    assert stores(last, 4)["blocks.0.attn.c_k.weight"] == "int6"
    numbered = section(
        RuleSection(match="blocks.1.*.c_k.weight|blocks.3.*.c_k.weight", store="float16"), RuleSection(store="int6")
    )
    assert stores(numbered, 4)["blocks.3.attn.c_k.weight"] == "float16"
    assert stores(numbered, 4)["blocks.10.attn.c_k.weight"] == "int6"


def test_size_and_dimension_limits_are_inclusive() -> None:
    quant = section(
        RuleSection(ndim=1, store="float32"),
        RuleSection(min_size=2048, max_size=2048, store="int8"),
        RuleSection(store="int6"),
    )
    chosen = stores(quant)
    assert chosen["blocks.0.attn_scale"] == "float32"
    assert chosen["blocks.0.attn.c_k.weight"] == "int8"
    assert chosen["tok_emb.weight"] == chosen["skip_weights"] == "int6"


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        (section(RuleSection(match="nothing", store="float32")), "no rule fits tensor tok_emb.weight"),
        (section(RuleSection(store="int7")), "unknown store 'int7'"),
        (section(RuleSection(match="@last_layers:x", store="float32")), "unknown condition"),
        (section(RuleSection(store="a"), a=GridSection(bits=8, packed=True)), "packed needs bits = 6"),
        (section(RuleSection(store="a"), a=GridSection(bits=6, packed=True, low_code="full")), "packed needs"),
    ],
)
def test_bad_rules_give_one_clear_line(quant: QuantSection, message: str) -> None:
    with pytest.raises(GolfError, match=message):
        plan(SHAPES, quant, 11)


def test_defaults_without_rules() -> None:
    assert set(stores(QuantSection()).values()) == {"float32"}
    chosen = {
        n: s.name for n, s in plan({"w": (512, 512), "v": (7,)}, QuantSection(grids={"q": GridSection()}), 1).items()
    }
    assert chosen == {"w": "q", "v": "float16"}


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("baseline", [], 17_178_912),
        ("pr114", [], 22_690_080),
        ("pr107", [], 16_560_576),
        ("pr107", ["model.mlp_hidden=1500"], 16_643_736),
        ("pr137", [], 22_428_960),
        ("pr137-script", [], 23_354_658),
    ],
)
def test_payload_of_the_published_systems(name: str, overrides: list[str], expected: int) -> None:
    recipe = load_recipe(name, overrides)
    with torch.device("meta"):
        state = GPT(recipe.model, 1024).state_dict()
    shapes = {n: tuple(t.shape) for n, t in state.items()}
    assert payload_bytes(tensor_table(shapes, recipe.quant, recipe.model.num_layers)) == expected
