"""The main job from the outside: every recipe, shrunk by overrides only, on the built-in corpus."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from paramgolf.errors import GolfError
from paramgolf.recipe.load import load_recipe, recipe_names
from paramgolf.runner.record import SEAL, seal
from paramgolf.runner.run import run
from paramgolf.runner.summary import summary_text
from paramgolf.train.clock import Clock
from tests.run_common import TINY, error_line, golf, golf_here


def tiny(name: str, *more: str) -> Any:
    sliding = ["score.stride=16"] if load_recipe(name).score.stride else []
    return load_recipe(name, [*TINY, *sliding, *more])


# The later records learn while they are scored: they have a test of their own (test_run_records.py).
@pytest.mark.parametrize("name", [n for n in recipe_names() if not n.startswith(("record-", "frontier"))])
def test_recipe_runs_the_whole_job(name: str, tmp_path: Path) -> None:
    recipe = tiny(name)
    record = run(recipe, out=tmp_path / "run", clock=Clock(age=0.0))
    assert record is not None
    assert record["steps"] == 6  # the post-training phase of pr107 included
    assert record["training"]["recompiles"] == 0
    assert record["artifact_bytes"] == (tmp_path / "run" / "model.golf").stat().st_size
    assert sum(record["ledger"].values()) == record["artifact_bytes"]
    assert record["total_bytes"] <= recipe.budget.bytes
    assert 1.0 < record["val_bpb"] < 9.0
    assert record["bytes_from"] == "documents"
    assert ("val_bpb_sliding" in record) == bool(recipe.score.stride)
    assert record[SEAL] == seal(record)[SEAL]
    on_disk = json.loads((tmp_path / "run" / "record.json").read_text())
    assert on_disk == record
    shown = summary_text(record)
    assert f"{record['val_bpb']:.4f}" in shown and f"{record['total_bytes']:,}" in shown and "report.html" in shown
    html = (tmp_path / "run" / "report.html").read_text()
    assert "<svg" in html
    assert not re.search(r"<script|<link|(src|href)=.https?:|@import|url\(http", html)  # self-contained


def test_a_finished_run_is_left_alone_and_an_occupied_folder_refused(tmp_path: Path) -> None:
    recipe = tiny("pocket")
    first = run(recipe, out=tmp_path / "run", clock=Clock(age=0.0))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    assert run(recipe, out=tmp_path / "run", resume=True) == first
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    with pytest.raises(GolfError, match="already holds a run"):
        run(recipe, out=tmp_path / "run")
    with pytest.raises(GolfError, match=r"train\.seed differ"):
        run(tiny("pocket", "train.seed=5"), out=tmp_path / "run", resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(GolfError, match="holds other files"):
        run(recipe, out=tmp_path / "other")


def test_windows_side_by_side_are_scored_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe("pocket", [*TINY, "score.stride=64"])
    record = run(recipe, out=tmp_path / "run", clock=Clock(age=0.0))
    assert record is not None and "val_bpb_sliding" not in record and record["val_bpb_ngram"] > 0
    assert capfd.readouterr().err.count("scoring the file") == 1


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(tiny("pocket"), out=tmp_path / name, clock=Clock(age=0.0))
    run(tiny("pocket", "train.seed=2"), out=tmp_path / "c", clock=Clock(age=0.0))
    a, b, c = ((tmp_path / name / "model.golf").read_bytes() for name in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["budget.bytes=20000"], ["budget.bytes=20000 is too small", "set budget.bytes="]),
        (["budget.steps=0"], ["nothing ends the training"]),
        (["optim.matrix=moun"], ["did you mean 'muon'"]),
        (["pack.codec=brotly"], ["did you mean 'brotli'"]),
        (["model.parts.smear_gat.x=1"], ["did you mean 'smear_gate'"]),
        (["model.num_heads=5"], ["not a multiple"]),
        (["data.train=/no/such/file.txt"], ["/no/such/file.txt"]),
        (["data.tokenizer=/no/such.model"], ["/no/such.model"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(overrides: list[str], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(GolfError) as caught:
        run(tiny("pocket", *overrides), out=tmp_path / "run", clock=Clock(age=0.0))
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "run" / "model.golf").exists()


def test_command_line(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    answer = golf("run", "pocket", *TINY, "--out", out, "--json")
    assert answer.code == 0, answer.err
    record = json.loads(answer.out)  # stdout holds exactly one object
    assert record["recipe"] == "pocket"
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    scored = golf_here(capfd, "score", out, "--data", text, "--json")
    assert json.loads(scored.out)["scored_bytes"] == len(text.read_bytes())
    sampled = golf_here(capfd, "sample", out, "def ", "--tokens", "8", "--seed", "3", "--json")
    assert json.loads(sampled.out)["prompt"] == "def "
    inspected = json.loads(golf_here(capfd, "inspect", out, "--json").out)
    assert sum(inspected["ledger"].values()) == inspected["bytes"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["score", "/no/such/model.golf", "--data", "x"],
        ["inspect", "/etc/hostname"],
        ["sample", "/etc"],
        ["recipes", "nothing"],
    ],
)
def test_errors_are_one_line_and_code_2(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    answer = golf_here(capfd, *arguments)
    assert error_line(answer) and answer.err.count("\n") == 1
