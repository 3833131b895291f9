"""`golf fit`: the rule, the search under both budgets, the recipe it writes, and what it refuses."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.fit_least_squares import BYTES_PER_TOKEN
from bench.fit_least_squares import fit as fit_coefficients
from bench.fit_sweep import CHECKS, TRIALS, configurations, fit_rule, name_of, pocket_by_width, recipe_of, signature
from paramgolf.errors import GolfError
from paramgolf.lab.choice import (
    AIM,
    BATCHES,
    COARSENESS,
    LEAST_STEPS,
    Budget,
    Choice,
    Search,
    Text,
    choose,
    coarser,
    file_bytes,
    model_bytes,
    shaped,
)
from paramgolf.lab.fit import PROBE_WAYS, PROBES, fit, measured_choice
from paramgolf.lab.fit_text import recipe_toml
from paramgolf.lab.sizing import Rates, Rule, Shape, Shapes, solve_rates, work
from paramgolf.recipe.load import load_recipe
from paramgolf.recipe.sections import Recipe
from tests.lab_standin import PROGRAM
from tests.run_common import error_line, golf_here, prose

BASE, RULE = load_recipe("pocket"), Rule.load()
WEB = Text(55_000_000)
# About two slow cores: seconds for each of sizing.KINDS, and seven until the first step.
SECONDS = (0.012, 0.012, 0.008, 12.0, 0.015, 9.0, 0.0005)
RATES = Rates(SECONDS, 7.0, how="made up")
ROOT = Path(__file__).parent.parent


@functools.cache
def chosen(size: int, seconds: float, text: Text = WEB) -> Choice:
    return choose(BASE, RULE, RATES, Budget(size, seconds), text)


# -- the rule --------------------------------------------------------------------------------------------------------


def test_the_expected_loss_falls_with_text_weights_and_finer_grids() -> None:
    shapes = Shapes.of([Shape(4096, 4, 192, 480, 256, 4096)])
    text = np.geomspace(1e4, 1e10, 200)
    for unique in (0.0, 1e5, 1e8):
        assert np.all(np.diff(RULE.loss(shapes, text, unique_bytes=unique)) <= 0)
    assert np.all(np.diff(RULE.loss(shapes, np.array([1e7]), np.linspace(0, 3, 20))) > 0)
    more = [RULE.loss(shapes, np.array([1e8]), unique_bytes=unique)[0] for unique in (1e5, 1e6, 1e7, 1e8)]
    assert more == sorted(more, reverse=True) and more[0] > more[-1]
    blocks = [RULE.terms(shapes, np.array([1e7]), block_weights=np.array([n]))["blocks"] for n in (1e5, 1e6, 1e7)]
    assert blocks[0] > blocks[1] > blocks[2]


def test_repeated_text_is_worth_less_and_never_more_than_so_many_passes() -> None:
    assert RULE.worth(np.array([5e5]), 1e6) == 5e5
    twice, often = RULE.worth(np.array([2e6, 1e12]), 1e6)
    assert 1.9e6 < twice < 2e6
    assert often == pytest.approx(1e6 * (1 + RULE.repeats))


def test_the_shipped_coefficients_are_those_of_the_committed_runs(tmp_path: Path) -> None:
    """Nobody may change one without the other."""
    sweep = ROOT / "results" / "fit_sweep.json"
    shipped = json.loads((ROOT / "src/paramgolf/lab/fit_rule.json").read_text())
    table = fit_rule(sweep, ROOT / TRIALS, ROOT / CHECKS, tmp_path / "rule.json", without=signature(shipped))
    for name, value in table["coefficients"].items():
        assert shipped["coefficients"][name] == pytest.approx(value, rel=1e-3), name
    assert table["evidence"]["error_bpb"] < 0.03


def test_the_fit_finds_the_coefficients_that_made_the_runs() -> None:
    """Runs drawn from a rule that differs from the beliefs give that rule's losses back."""
    numbers = {
        f.name: getattr(RULE, f.name) for f in dataclasses.fields(Rule) if isinstance(getattr(RULE, f.name), float)
    }
    truth = dataclasses.replace(RULE, text=0.25, text_power=0.45, blocks=0.5, batch=9000.0, rounding=0.02)
    rows = []
    for shape, tokens in configurations():
        one, text = Shapes.of([shape]), np.array([tokens * BYTES_PER_TOKEN[shape.vocab]])
        rounded, loss = (float(truth.loss(one, text, coarseness)[0]) for coarseness in (2.0, 0.0))
        rows.append({"shape": list(shape), "tokens": tokens, "val_bpb_float": loss, "series": "",
                     "coarseness": 2.0, "val_bpb": rounded})  # fmt: skip
    found = Rule.of(fit_coefficients(rows, BYTES_PER_TOKEN))
    assert found.rounding == pytest.approx(0.02, rel=0.05) and numbers
    for shape, tokens in ((Shape(4096, 4, 256, 640, 256, 8192), 3e6), (Shape(2048, 3, 128, 320, 512, 4096), 2e6)):
        one, text = Shapes.of([shape]), np.array([tokens * BYTES_PER_TOKEN[shape.vocab]])
        assert float(found.loss(one, text, 0.0)[0]) == pytest.approx(float(truth.loss(one, text, 0.0)[0]), abs=0.01)


def test_a_rule_that_is_not_whole_is_refused() -> None:
    with pytest.raises(GolfError, match="no rule"):
        Rule.of({"coefficients": {"floor": 1.0}, "bytes_per_token": {}})


# -- the time --------------------------------------------------------------------------------------------------------


def test_rates_are_found_again_from_steps_and_are_never_negative() -> None:
    shapes = [Shape(*model, *way) for model in (*PROBES, (4096, 4, 256, 640)) for way in PROBE_WAYS]
    timed = list(zip(shapes, (work(Shapes.of(shapes)) @ np.array(SECONDS)).tolist(), strict=True))
    rates = Rates(solve_rates(timed), 0.0, timed=tuple(timed))
    assert rates.error < 0.02 and min(rates.seconds) >= 0
    new = Shapes.of([Shape(2048, 5, 192, 480, 256, 8192)])
    assert rates.step_seconds(new)[0] == pytest.approx(float((work(new) @ np.array(SECONDS))[0]), rel=0.1)
    noisy = [(shape, seconds * (1 + 0.3 * (-1) ** i)) for i, (shape, seconds) in enumerate(timed)]
    assert min(solve_rates(noisy)) >= 0
    with pytest.raises(GolfError, match="no time"):
        solve_rates([(shapes[0], 0.0)])


# -- the search ------------------------------------------------------------------------------------------------------


@settings(max_examples=5, deadline=None)
@given(size=st.integers(50_000, 12_000_000), seconds=st.floats(30, 3000))
def test_every_choice_fits_its_cap_by_the_forecast(size: int, seconds: float) -> None:
    choice = choose(BASE, RULE, RATES, Budget(size, seconds), WEB)
    assert file_bytes(choice.recipe) == choice.best.bytes <= AIM * size
    assert choice.best.steps >= LEAST_STEPS
    for _, other in choice.alternatives:
        assert other.bytes <= AIM * size and other.loss >= choice.best.loss


def test_more_bytes_or_more_seconds_never_expect_a_worse_loss() -> None:
    sizes, times = (60_000, 250_000, 1_000_000, 1_010_000, 4_000_000), (40.0, 120.0, 240.0, 241.0, 900.0)
    for seconds in (120.0,):
        losses = [chosen(size, seconds).best.loss for size in sizes]
        assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]
    for size in (250_000,):
        losses = [chosen(size, seconds).best.loss for seconds in times]
        assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


def test_the_choice_is_the_best_of_the_grid_by_the_exact_forecast() -> None:
    """A brute-force look at a part of the grid finds nothing better."""
    search = Search(BASE, RULE, RATES, Budget(250_000, 120.0), WEB)
    best = chosen(250_000, 120.0).best
    some = np.random.default_rng(0).choice(len(search.models), 60, replace=False)
    near = np.argsort(search.bound, kind="stable")[:25]
    for model in np.concatenate([some, near]):
        found = search.exact(int(model))
        assert found is None or found.loss >= best.loss
        if found is not None:
            assert search.bound[model] <= found.loss  # so that stopping at the bound is right


def test_the_closed_form_of_a_size_is_close_to_the_forecast() -> None:
    search = Search(BASE, RULE, RATES, Budget(1_000_000, 240.0), WEB)
    sizes = model_bytes(BASE, search.models)
    for model in np.random.default_rng(1).choice(len(search.models), 15, replace=False):
        shape = search.shape(int(model))
        for column in (0, len(COARSENESS) // 2, len(COARSENESS) - 1):
            told = file_bytes(shaped(BASE, shape, COARSENESS[column], LEAST_STEPS))
            assert sizes[model, column] <= 1.03 * told
            assert shape.dim == 64 or sizes[model, column] >= 0.9 * told


def test_the_same_rates_give_the_same_choice() -> None:
    again = choose(BASE, RULE, RATES, Budget(250_000, 120.0), WEB)
    assert again == chosen(250_000, 120.0)


def test_a_faster_machine_trains_more_and_a_small_text_limits_the_vocabulary() -> None:
    fast = dataclasses.replace(RATES, seconds=tuple(s / 20 for s in SECONDS))
    slow, quick = chosen(1_000_000, 120.0), choose(BASE, RULE, fast, Budget(1_000_000, 120.0), WEB)
    assert quick.best.tokens > slow.best.tokens and quick.best.loss < slow.best.loss
    assert chosen(1_000_000, 120.0, Text(60_000)).best.shape.vocab == 512
    assert chosen(1_000_000, 120.0, Text(60_000)).best.shape.batch <= 16_384 < BATCHES[-1]
    given_one = choose(BASE, RULE, RATES, Budget(1_000_000, 120.0), Text(9_000_000, 1000, 2.4))
    assert given_one.best.shape.vocab == 1000


def test_grids_keep_their_reach() -> None:
    for grid in BASE.quant.grids.values():
        assert coarser(grid, 1.0) == grid
        for times in COARSENESS:
            other = coarser(grid, times)
            step = grid.clip_value / (2 ** (grid.bits - 1) - 1)
            assert other.clip_value / (2 ** (other.bits - 1) - 1) == pytest.approx(times * step, rel=1e-3)
            assert other.bits == 8 or other.clip_value >= 7.49


def test_probes_are_timed_then_the_choice_itself_until_it_is_known() -> None:
    asked: list[Shape] = []

    def timer(recipe: Recipe, shapes: Sequence[Shape]) -> tuple[list[tuple[Shape, float]], float, str]:
        asked.extend(shapes)
        seconds = RATES.step_seconds(Shapes.of(shapes)) * (2.0 if len(shapes) == 1 else 1.0)
        return list(zip(shapes, seconds.tolist(), strict=True)), 0.0, "3 s of steps on made-up tokens, a test"

    choice, rates = measured_choice(BASE, RULE, Budget(250_000, 120.0), WEB, timer=timer)
    assert asked[:9] == [Shape(*model, *way) for model in PROBES for way in PROBE_WAYS]
    assert 10 <= len(asked) <= 11 and rates.how == "a test" and rates.before >= 6
    # What was chosen took twice as long as the probes said, and that is believed.
    assert rates.step_seconds(Shapes.of([asked[9]]))[0] > 1.5 * RATES.step_seconds(Shapes.of([asked[9]]))[0]
    assert (
        choice.best.steps < chosen(250_000, 120.0).best.steps or choice.best.shape != chosen(250_000, 120.0).best.shape
    )


# -- the recipe and the run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "seconds"), [(250_000, 120.0), (4_000_000, 900.0)])
def test_the_written_recipe_is_the_chosen_one(tmp_path: Path, size: int, seconds: float) -> None:
    choice = chosen(size, seconds)
    path = tmp_path / "mine.toml"
    path.write_text(recipe_toml(choice, BASE, RATES, "notes"))
    read = load_recipe(str(path))
    assert read.data.train == str(Path("notes").absolute())
    same = dataclasses.replace(
        read, name=choice.recipe.name, title=choice.recipe.title, data=dataclasses.replace(read.data, train="")
    )
    assert same == choice.recipe
    assert read.name == "mine" and read.extends == "pocket" and read.budget.bytes == size
    assert f"{size:,} bytes" in read.title and "# By `golf fit`" in path.read_text()


def test_a_measured_recipe_trains(tmp_path: Path, capfd: Any) -> None:
    """Everything but the length of the run: text, real steps on this machine, choice, recipe, a run of it."""
    text = tmp_path / "text.txt"
    text.write_text(prose())
    recipe = tmp_path / "mine.toml"
    asked = ["--data", text, "--bytes", 60_000, "--seconds", 20]
    answer = golf_here(capfd, "fit", *map(str, asked), "--write", recipe, "--dry-run", "--json")
    assert answer.code == 0, answer.err
    told = json.loads(answer.out)
    assert told["recipe"] == str(recipe) and told["record"] is None and told["choice"]["bytes"] <= 60_000
    assert len(told["machine"]["timed"]) >= 10 and "timing training steps" in answer.err
    words = ["budget.seconds=0", "budget.steps=2", "score.stride=0", "ngram.levels=[]", "train.compile=off"]
    words += ["data.val_max_bytes=4000", "quant.calibration_tokens=512"]
    ran = golf_here(capfd, "run", str(recipe), *words, "--out", tmp_path / "run", "--json")
    assert ran.code == 0, ran.err
    record = json.loads(ran.out)
    assert record["steps"] == 2
    assert record["params"] == pytest.approx(told["choice"]["weights"], rel=0.1)


def made_up_timer(recipe: Recipe, shapes: Sequence[Shape]) -> tuple[list[tuple[Shape, float]], float, str]:
    return list(zip(shapes, RATES.step_seconds(Shapes.of(shapes)).tolist(), strict=True)), 0.0, "a test"


def test_the_run_is_a_process_of_its_own_and_its_failure_is_said(tmp_path: Path, capfd: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text(prose())
    said: list[str] = []
    budget = Budget(80_000, 60.0)
    result = fit(str(text), budget, out=tmp_path / "run", say=said.append, program=PROGRAM, timer=made_up_timer)
    assert result["record"]["recipe"] == "run" and (tmp_path / "run" / "record.json").is_file()
    assert result["recipe"] == str(tmp_path / "run.toml") and "chosen" in said[0]
    with pytest.raises(GolfError, match="not an empty folder"):
        fit(str(text), budget, out=tmp_path / "run", program=PROGRAM, timer=made_up_timer)
    with pytest.raises(GolfError, match="failed, as said above"):
        fit(str(text), budget, out=tmp_path / "other", program=("false",), timer=made_up_timer)
    assert "reading the text" in capfd.readouterr().err


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bytes", "0", "--seconds", "60"], "--bytes 0: not a size"),
        (["--bytes", "100000", "--seconds", "0"], "--seconds 0: not a time"),
        (["--bytes", "100000", "--seconds", "nan"], "not a time"),
        (["--bytes", "100000", "--seconds", "inf"], "not a time"),
        (["--bytes", "100000"], "seconds"),
        (["--bytes", "100000", "--seconds", "60", "--data", "nowhere.txt"], "no such file or folder: nowhere.txt"),
        (["--bytes", "100000", "--seconds", "60", "--data", "-"], "read more than once"),
        (["--bytes", "100000", "--seconds", "60", "--data", "EMPTY"], "empty"),
        (["--bytes", "100000", "--seconds", "60", "--data", "SHORT"], "too little to size a model by"),
        (["--bytes", "100000", "--seconds", "60", "--write", "recipe.json"], "ends in .toml"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, capfd: Any, words: list[str], said: str) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short\n" * 20)
    files = {"EMPTY": str(tmp_path / "empty.txt"), "SHORT": str(tmp_path / "short.txt")}
    answer = golf_here(capfd, "fit", *(files.get(word, word) for word in words), "--out", tmp_path / "run")
    assert said in error_line(answer)
    assert not (tmp_path / "run").exists()


def test_budgets_that_nothing_fits_name_what_would() -> None:
    with pytest.raises(GolfError, match=r"--bytes 3000: the smallest model .* give at least (\d+)") as caught:
        choose(BASE, RULE, RATES, Budget(3000, 240.0), WEB)
    least = int(str(caught.value).rsplit(" ", 1)[1])
    assert choose(BASE, RULE, RATES, Budget(least, 240.0), WEB).best.bytes <= least
    with pytest.raises(GolfError, match=r"--seconds 5: a run needs about \d+ s here beside its training") as caught:
        choose(BASE, RULE, RATES, Budget(1_000_000, 5.0), WEB)
    enough = float(str(caught.value).rsplit(" ", 1)[1])
    assert choose(BASE, RULE, RATES, Budget(1_000_000, enough), WEB).best.steps >= LEAST_STEPS


# -- the bench -------------------------------------------------------------------------------------------------------


def test_the_sweep_covers_every_knob_and_its_recipes_are_those_of_a_fit() -> None:
    planned = configurations()
    assert len({name_of(*one) for one in planned}) == len(planned) >= 30
    columns = list(zip(*(shape for shape, _ in planned), strict=True))
    assert all(len(set(column)) >= 3 for column in columns)
    shape, tokens = planned[0]
    recipe = recipe_of(shape, tokens, 0.5)
    assert recipe.budget.tokens == tokens and recipe.model.dim == shape.dim and not recipe.ngram.levels
    assert recipe.optim == shaped(BASE, shape, 0.5, tokens // shape.batch).optim


@pytest.mark.parametrize("size", [250_000, 1_000_000, 4_000_000])
def test_the_resized_pocket_fills_the_cap_by_its_width(size: int) -> None:
    recipe = pocket_by_width(Budget(size, 120.0))
    assert 0.7 * size < file_bytes(recipe) <= AIM * size
    assert (recipe.data, recipe.train, recipe.quant) == (BASE.data, BASE.train, BASE.quant)
