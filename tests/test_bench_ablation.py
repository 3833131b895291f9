"""The table of components: every one is a recipe that can be trained, and the numbers follow from pairs of runs."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import ablation, pace
from bench.ablation import Component, Results, load_series, measured, tables, with_tables
from paramgolf.dist import Dist
from paramgolf.errors import GolfError
from paramgolf.model.gpt import GPT
from paramgolf.optim.groups import build_optimizers
from paramgolf.recipe.load import load_recipe, to_table
from paramgolf.recipe.sections import Recipe
from paramgolf.runner.run import check
from paramgolf.score.ttt.adapt import check_ttt
from paramgolf.train.modes import ModeSwitch

pytest.importorskip("scipy")

SERIES = load_series()
PAGE = Path(__file__).parents[1] / "docs" / "techniques.md"
RESULTS = Path(__file__).parents[1] / "results" / "ablation.json"
VOCAB = 96


def shrunk(recipe: Recipe) -> Recipe:
    """The same switches on 3 heads of 32 channels."""
    model = dataclasses.replace(recipe.model, dim=96, mlp_hidden=64)
    return dataclasses.replace(recipe, model=model)


def test_the_average_step_counts_stages_and_loops_for_their_part() -> None:
    recipe = load_recipe(
        "pocket",
        [
            "model.loop_layers=[1, 2]", "model.loop_extra=2", "schedule.loop_at=[0.25, 0.75]",
            "stages=[{at = 0.5, batch_tokens = 2048}]",
        ],
    )  # fmt: skip

    def of(part: Recipe) -> float:
        return part.train.batch_tokens * (1 + part.model.loop_extra)

    assert pace.step_seconds(recipe, of) == 4096 * (0.25 * 1 + 0.25 * 2) + 2048 * (0.25 * 2 + 0.25 * 3)
    assert pace.step_seconds(load_recipe("pocket"), of) == 4096
    assert pace.changes_the_step(["optim.matrix=normuon"]) and pace.changes_the_step(["model.parts={}"])
    assert not pace.changes_the_step(["optim.matrix_lr=1.0", "model.init=orthogonal_zero", "data.order=packed"])


@pytest.mark.parametrize("component", SERIES.components, ids=lambda c: c.name)
def test_a_component_is_another_recipe_that_trains(component: Component) -> None:
    """Checked as `golf run` checks it; then, tiny, one step of every mode that training goes through."""
    recipe = load_recipe(SERIES.recipe, [*SERIES.common, "budget.seconds=60", *component.set])
    check(recipe)
    check_ttt(recipe.ttt, recipe.score.seq_len or recipe.train.seq_len)
    own, base = to_table(recipe), to_table(load_recipe(SERIES.recipe, [*SERIES.common, "budget.seconds=60"]))
    assert (own != base) == bool(component.set)
    small = shrunk(recipe)
    model = GPT(small.model, VOCAB)
    model.init_weights(1)
    optimizers, modes = build_optimizers(model, small.optim, Dist()), ModeSwitch(model, small)
    ids = torch.randint(2, VOCAB, (1, 33), generator=torch.Generator().manual_seed(1))
    for state in modes.states:
        modes.set(state)
        loss = model(ids[:, :-1], ids[:, 1:])
        optimizers.zero_grad()
        loss.backward()
        optimizers.step(1.0, 0.9)
        assert torch.isfinite(model(ids[:, :-1], ids[:, 1:])) and float(loss.detach()) < 6


def test_names_are_unique_and_scores_known() -> None:
    names = [component.name for component in SERIES.components]
    assert len(set(names)) == len(names)
    assert {c.score for c in SERIES.components} <= {*ablation.KEYS, ablation.GAP}


def run(overrides: tuple[str, ...], seed: int, bpb: float, **more: Any) -> dict[str, Any]:
    return {
        "set": list(overrides), "setting": ["budget.seconds=60"], "seed": seed, "val_bpb": bpb,
        "val_bpb_ngram": bpb - 0.1, "val_bpb_float": bpb - 0.01, **more,
    }  # fmt: skip


def results(tmp_path: Path, *runs: dict[str, Any]) -> Results:
    made = Results(tmp_path / "ablation.json")
    made.runs.extend(runs)
    ratios = {json.dumps(SERIES.components[0].set): 1.03}
    made.data["paces"] = {json.dumps(["budget.seconds=60"]): {"seconds": 0.1, "ratios": ratios}}
    return made


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    xsa = SERIES.components[0]
    found = results(
        tmp_path,
        *(run((), seed, 2.0 + seed / 10) for seed in (1, 2, 3)),
        *(run(xsa.set, seed, 2.0 + seed / 10 - gain) for seed, gain in ((1, 0.01), (2, 0.012))),
        run(xsa.set, 3, 0.0) | {"failed": "code 2"},
    )
    told = measured(xsa, found, ["budget.seconds=60"])
    assert told is not None and told.low is not None and told.high is not None
    assert (told.seeds, told.difference, told.step_ms) == (2, pytest.approx(-0.011), pytest.approx(3.0))
    assert told.low < -0.011 < told.high and told.cached == pytest.approx(-0.011)
    assert measured(xsa, found, ["budget.seconds=240"]) is None
    text = tables(SERIES, found)
    assert "| BPB, 60 s |" in text and "-0.0110 (" in text and "| +3.0 | 0 |" in text
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")}
    assert bars == {8}  # every line has the seven cells of its head


def test_what_quantisation_costs_and_scores_of_one_run(tmp_path: Path) -> None:
    gap, ttt = Component("a", "", ("quant.method=rtn",), "gap"), Component("b", "", ("ttt.kind=lora",), "val_bpb_ttt")
    found = results(
        tmp_path,
        run((), 1, 2.0),
        run(gap.set, 1, 3.0, val_bpb_float=2.97),  # trained worse, which is not the quantiser's fault
        run(ttt.set, 1, 2.5, val_bpb_ttt=2.4),
    )
    for component, difference in ((gap, 0.02), (ttt, -0.1)):
        told = measured(component, found, ["budget.seconds=60"])
        assert told is not None and told.difference == pytest.approx(difference) and told.low is None


def test_runs_are_done_once_and_failures_kept(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def golf(words: list[str]) -> dict[str, Any]:
        asked.append(words)
        if "model.dim=8" in words:
            raise RuntimeError("python -m paramgolf run ended with code 2")
        return {"val_bpb": 2.0, "unknown": 1}

    setting, slow = ["budget.seconds=60"], ("model.dim=8",)
    for _ in range(2):
        made = results(tmp_path)
        made.data["paces"][json.dumps(setting)]["ratios"][json.dumps(slow)] = 1.5
        made.runs[:] = Results(tmp_path / "ablation.json").runs
        for overrides in ((), slow):
            made.do(golf, overrides, setting, 1)
    told = [[*setting, "budget.seconds=0", f"budget.steps={n}", "train.seed=1"] for n in (600, 400)]
    assert asked == [told[0], [*told[1], *slow]]
    kept = Results(tmp_path / "ablation.json").runs
    assert [(r.get("failed"), r.get("val_bpb"), "unknown" in r) for r in kept] == [
        (None, 2.0, False),
        ("code 2", None, False),
    ]


def test_unknown_components_and_pages_without_marks_are_refused() -> None:
    with pytest.raises(GolfError, match="no component 'XSSA'"):
        ablation.chosen(SERIES, ["XSSA"])
    with pytest.raises(GolfError, match="no place for the tables"):
        with_tables("# Techniques\n", "| a |")
    assert ablation.chosen(SERIES, ["XSA, all layers"]).components == SERIES.components[:1]


def test_the_page_shows_what_the_files_say() -> None:
    page = PAGE.read_text(encoding="utf-8")
    made = with_tables(page, tables(SERIES, Results(RESULTS)))
    assert page == made, "python -m bench.ablation --table --page docs/techniques.md writes it anew"
