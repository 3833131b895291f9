"""`golf compare` on run folders: grouping, pairing, refusals, warnings, and the numbers it prints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from paramgolf.cli_output import emit
from paramgolf.errors import GolfError
from paramgolf.lab.compare import compare, open_groups
from paramgolf.lab.compare_text import compare_text
from paramgolf.lab.jobs import Job, Stop, run_job
from paramgolf.recipe.load import load_recipe, to_table
from paramgolf.runner.folder import RunFolder
from paramgolf.runner.record import FORMAT, seal
from tests.run_common import error_line, golf_here

scipy_stats = pytest.importorskip("scipy.stats")
OLD = {1: 1.2205, 2: 1.2211, 3: 1.2201, 4: 1.2214}
NEW = {1: 1.2105, 2: 1.2109, 3: 1.2099, 4: 1.2116}


def write_run(folder: Path, seed: int, bpb: float, *overrides: str, **values: Any) -> Path:
    recipe = load_recipe("pocket", [f"train.seed={seed}", *overrides])
    record = {
        "format": FORMAT, "recipe": "pocket", "seed": seed, "val_bpb": bpb, "scored_bytes": 24_000,
        "scored_tokens": 10_000, "bytes_from": "documents", "cap_bytes": 1_000_000,
        "sha256": {"artifact": f"{folder.name}"},
        "data": {
            "source": [{"sha256": "s"}], "tokenizer": {"sha256": "t"},
            "train": {"shards": [{"sha256": "a"}]}, "val": {"shards": [{"sha256": "b"}], "sha256": "v"},
        },
        **values,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(seal(record)))
    (folder / "recipe.toml").write_text(tomli_w.dumps(to_table(recipe)))
    return folder


def test_a_run_at_work_is_not_removed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    (folder.root / "recipe.toml").write_text("x = 1")
    with folder.locked(), pytest.raises(GolfError, match="another process is running in it"):
        run_job(Job("pocket", (), folder.root, program=("true",)), stop=Stop())
    assert (folder.root / "recipe.toml").is_file()


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for seed in OLD:
        write_run(tmp_path / "old" / f"old-{seed}", seed, OLD[seed])
        write_run(tmp_path / "new" / f"new-{seed}", seed, NEW[seed], "model.mlp_hidden=1400")
    return tmp_path


def only(result: dict[str, Any]) -> dict[str, Any]:
    (test,) = result["comparisons"]
    return test


def test_paired_by_seed(runs: Path) -> None:
    result = compare(open_groups([f"{runs}/old/*", f"{runs}/new"]), margin_nats=0.005)
    test = only(result)
    margin = 0.005 / (math.log(2) * 2.4)
    expected = scipy_stats.ttest_rel([OLD[s] - margin for s in OLD], [NEW[s] for s in OLD], alternative="greater")
    assert test["paired_seeds"] == [1, 2, 3, 4]
    assert test["t"]["p"] == pytest.approx(expected.pvalue, rel=1e-9)
    assert test["improvement"] == pytest.approx(sum(OLD.values()) / 4 - sum(NEW.values()) / 4)
    assert test["improvement_nats"] == pytest.approx(test["improvement"] * math.log(2) * 2.4)
    assert test["permutation"]["smallest"] == 1 / 16
    assert test["better_by_margin"] and test["runs_still_needed"] == 0
    assert "yes" in compare_text(result) and "smallest possible 0.0625" in compare_text(result)


def test_other_seeds_give_welch(runs: Path) -> None:
    write_run(runs / "third" / "x-8", 8, 1.2108)
    write_run(runs / "third" / "x-9", 9, 1.2112)
    test = only(compare(open_groups([f"{runs}/old", f"{runs}/third"])))
    assert (test["t"]["method"], test["paired_seeds"]) == ("Welch t", [])
    assert test["permutation"]["arrangements"] == 15


def test_against_a_published_number(runs: Path) -> None:
    test = only(compare(open_groups([str(p) for p in sorted((runs / "new").iterdir())]), against=1.2194, alpha=0.05))
    margin = 0.005 / (math.log(2) * 2.4)
    expected = scipy_stats.ttest_1samp([1.2194 - bpb for bpb in NEW.values()], margin, alternative="greater")
    assert test["t"]["p"] == pytest.approx(expected.pvalue, rel=1e-9)
    assert test["candidate"].startswith("pocket")


def test_unquoted_patterns_group_by_recipe(runs: Path) -> None:
    words = [str(p) for p in [*sorted((runs / "old").iterdir()), *sorted((runs / "new").iterdir())]]
    groups = open_groups(words)
    assert [len(group.runs) for group in groups] == [4, 4]
    assert only(compare(groups))["paired_seeds"] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("key", "overrides", "values"),
    [
        ("scored_bytes", [], {"scored_bytes": 23_999}),
        ("bytes_from", [], {"bytes_from": "table"}),
        ("cap_bytes", [], {"cap_bytes": 2_000_000}),
        ("budget.seconds", ["budget.seconds=1234"], {}),
        ("budget.steps", ["budget.steps=77"], {}),
        ("pack.count", ["pack.count=challenge"], {}),
    ],
)
def test_other_conditions_are_refused_by_name(
    runs: Path, key: str, overrides: list[str], values: dict[str, Any]
) -> None:
    write_run(runs / "odd" / "odd-1", 1, 1.2, *overrides, **values)
    groups = open_groups([f"{runs}/old", f"{runs}/odd"])
    with pytest.raises(GolfError, match=f"they differ in {key}: .*--allow {key}"):
        compare(groups)
    assert compare(groups, allow=[key])["allowed"] == [key]


def test_other_validation_and_training_text_is_refused(runs: Path) -> None:
    data = json.loads((runs / "old" / "old-1" / "record.json").read_text())["data"]
    write_run(runs / "v" / "v-1", 1, 1.2, data={**data, "val": {**data["val"], "sha256": "w"}})
    write_run(runs / "t" / "t-1", 1, 1.2, data={**data, "source": [{"sha256": "other"}]})
    for folder, key in (("v", "val_text"), ("t", "train_text")):
        with pytest.raises(GolfError, match=f"differ in {key}"):
            compare(open_groups([f"{runs}/old", f"{runs}/{folder}"]))


def test_the_best_of_several_seeds_is_said(runs: Path) -> None:
    best = compare(open_groups([str(runs / "old" / "old-1"), str(runs / "new" / "new-3")]))
    assert best["groups"][1]["notes"][0].startswith("WARNING: this is the best of 4 seeds")
    assert "3 more seeds of the recipe are left out: 2, 3, 4" in best["groups"][0]["notes"][0]
    assert "WARNING" in compare_text(best)
    assert only(best)["t"]["p"] is None and "not determined" in compare_text(best)
    whole = compare(open_groups([f"{runs}/old", f"{runs}/new"]))
    assert [group["notes"] for group in whole["groups"]] == [[], []]


def test_a_copy_of_a_run_is_no_second_run(runs: Path) -> None:
    write_run(runs / "new" / "copy", 4, NEW[4], "model.mlp_hidden=1400", sha256={"artifact": "new-4"})
    (group,) = open_groups([f"{runs}/new"])
    assert len(group.runs) == 4 and "left out" in group.notes[0]


def test_several_candidates_are_corrected(runs: Path) -> None:
    for seed in NEW:
        write_run(runs / "third" / f"x-{seed}", seed, NEW[seed] + 0.001 * seed, "model.mlp_hidden=1300")
    result = compare(open_groups([f"{runs}/old", f"{runs}/new", f"{runs}/third"]))
    smallest = min(result["comparisons"], key=lambda test: test["t"]["p"])
    assert smallest["p_holm"] == pytest.approx(2 * smallest["t"]["p"])
    assert "Holm" in compare_text(result)


@pytest.mark.parametrize("word", ["inf", "1e308"])
@pytest.mark.parametrize("name", ["against", "margin"])
def test_numbers_that_are_none_to_compute_with(
    runs: Path, name: str, word: str, capfd: pytest.CaptureFixture[str]
) -> None:
    answer = golf_here(capfd, "compare", f"{runs}/old", f"{runs}/new", f"--{name}", word, "--json")
    assert f"--{name} {float(word)} is no number to compute with" in error_line(answer)


def test_a_result_that_is_no_json_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(GolfError, match="leave --json out"):
        emit({"bpb": math.inf}, True, "inf")
    emit({"bpb": math.inf}, False, "inf")
    assert capfd.readouterr().out == "inf\n"


def test_command_line(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    answer = golf_here(capfd, "compare", f"{runs}/old/*", f"{runs}/new/*", "--json")
    assert json.loads(answer.out)["comparisons"][0]["better_by_margin"] is True
    assert "paired by seeds" in golf_here(capfd, "compare", f"{runs}/old", f"{runs}/new").out
    assert "nothing to be compared" in error_line(golf_here(capfd, "compare", f"{runs}/old"))
    assert "no finished run" in error_line(golf_here(capfd, "compare", f"{runs}/none*", f"{runs}/new"))
    assert "has no val_bpb_sliding" in error_line(
        golf_here(capfd, "compare", f"{runs}/old", f"{runs}/new", "--metric", "val_bpb_sliding")
    )
    assert "known are" in error_line(golf_here(capfd, "compare", f"{runs}/old", f"{runs}/new", "--allow", "x"))
    record = runs / "new" / "new-1" / "record.json"
    record.write_text(record.read_text().replace("1.2105", "1.2005"))
    assert "golf verify" in error_line(golf_here(capfd, "compare", f"{runs}/old", f"{runs}/new"))
