"""The verdicts of bench/claims.py follow from intervals, and every arm is a recipe that can be loaded."""

from __future__ import annotations

from typing import Any

import pytest

from bench.claims import ARMS, CLAIMS, RECIPE, Claim, measured, table
from paramgolf.recipe.load import load_recipe, to_table

pytest.importorskip("scipy")


def test_every_arm_is_another_recipe_and_every_claim_has_its_arms() -> None:
    base = to_table(load_recipe(RECIPE))
    tables = [to_table(load_recipe(RECIPE, words)) for words in ARMS.values()]
    assert tables[0] == base and all(t != base for t in tables[1:])
    assert {claim.better for claim in CLAIMS} | {claim.worse for claim in CLAIMS} == set(ARMS)


def runs(better: list[float], worse: list[float]) -> dict[str, dict[str, Any]]:
    rows = {f"base {i}": v for i, v in enumerate(better, 1)} | {f"no clip {i}": v for i, v in enumerate(worse, 1)}
    return {k: {"val_bpb": v + 0.02, "val_bpb_sliding": v, "val_bpb_float": v + 0.01} for k, v in rows.items()}


@pytest.mark.parametrize(
    ("worse", "equal", "verdict"),
    [
        ([2.010, 2.012, 2.011], False, "holds"),
        ([1.990, 1.992, 1.991], False, "does not hold here: the opposite"),
        ([2.010, 1.990, 2.001], False, "not shown"),
        ([2.0005, 2.001, 1.9995], True, "holds: equal within 0.005"),
        ([2.030, 2.031, 2.032], True, "does not hold here"),
        ([2.004, 2.009, 2.001], True, "not shown"),
        ([2.01], False, "one seed: not determined"),
    ],
)
def test_verdicts(worse: list[float], equal: bool, verdict: str) -> None:
    claim = Claim("x", "y", "base", "no clip", equal=equal)
    found = measured(claim, runs([2.0] * len(worse), worse), 0.95)
    assert found is not None and found["verdict"] == verdict


def test_the_table_shows_what_there_is() -> None:
    text = table({"runs": runs([2.0, 2.0, 2.0], [2.010, 2.012, 2.011])})
    assert "| clip 0.3 better than none | best of 0 to 1.0 (PR 114), no figure | +0.0110 (" in text
    assert text.count("not run") == len(CLAIMS) - 1
