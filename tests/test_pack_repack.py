"""`golf pack` on a tiny run: files that fill their caps, predictions, the frontier, the ledger, refusals."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paramgolf.pack.container import describe_artifact
from paramgolf.pack.packer import load_artifact
from paramgolf.recipe.load import load_recipe
from paramgolf.runner.run import run
from paramgolf.train.clock import Clock
from tests.run_common import TINY, error_line, golf_here, prose

OVERRIDES = [
    *TINY, "model.dim=96", "model.mlp_hidden=128", "model.num_layers=3", "budget.steps=12", "pack.fit_tokens=1024",
    "quant.calibration_tokens=2048", "score.stride=0", "budget.bytes=110000", "quant.method=rtn",
]  # fmt: skip
QUICK = ["pack.fit_tokens=512", "quant.calibration_tokens=1024"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with its checkpoint; tests that write into it take a copy."""
    root = tmp_path_factory.mktemp("packed")
    (root / "text.txt").write_text(prose())
    recipe = load_recipe("pocket", OVERRIDES)
    assert run(recipe, data=str(root / "text.txt"), out=root / "run", clock=Clock(age=0.0)) is not None
    return root / "run"


@pytest.fixture(autouse=True, scope="module")
def short_check() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paramgolf.runner.repack.CHECK_TOKENS", 2048)
        patch.setattr("paramgolf.runner.repack.FRONTIER_CAPS", 2)
        yield


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def packed(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    answer = golf_here(capfd, "pack", *arguments, *QUICK, "--json")
    assert answer.code == 0, answer.err
    return json.loads(answer.out)


def test_files_fill_their_caps_and_fewer_bytes_are_coarser(finished: Path, tmp_path: Path, capfd: Any) -> None:
    results = []
    for cap in (46_000, 105_000):
        out = tmp_path / str(cap)
        result = packed(capfd, finished, "--bytes", str(cap), "-o", out)
        assert 0.998 * cap <= out.stat().st_size == result["total_bytes"] <= cap
        assert sum(result["ledger"].values()) == out.stat().st_size
        assert describe_artifact(out)["ledger"] == result["ledger"]
        original, loaded = load_artifact(finished / "model.golf"), load_artifact(out)
        assert loaded.state.keys() == original.state.keys() and loaded.tokenizer == original.tokenizer
        assert result["measured_bpb"] == pytest.approx(result["predicted_bpb"], rel=0.5, abs=0.05)
        assert result["bpb_per_kilobyte"] > 0 and result["encodes"] <= 10
        results.append(result)
    few, many = results
    assert few["predicted_bpb"] > many["predicted_bpb"] and few["bpb_per_kilobyte"] > many["bpb_per_kilobyte"]
    assert all(group["step"] > many["groups"][name]["step"] for name, group in few["groups"].items())
    bits = [sum(group["bits"] for group in result["groups"].values()) for result in results]
    assert bits[0] < bits[1]


def test_a_cap_below_the_coarsest_plan_names_the_smallest_that_does(finished: Path, tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "m.golf"
    line = error_line(golf_here(capfd, "pack", finished, "--bytes", "9000", "-o", out, *QUICK))
    assert not out.exists()
    smallest = line.rpartition("budget.bytes=")[2]
    assert packed(capfd, finished, "--bytes", smallest, "-o", out)["total_bytes"] <= int(smallest)


def test_the_frontier_is_drawn_into_the_report(finished: Path, folder: Path, capfd: Any) -> None:
    before = (folder / "report.html").read_text()
    result = packed(capfd, folder, "--bytes", "80000", "--frontier", "quant.method=rtn")
    points = result["frontier"]["points"]
    assert len(points) == 3 and [p["total_bytes"] for p in points] == sorted(p["total_bytes"] for p in points)
    assert points[0]["measured_bpb"] > points[-1]["measured_bpb"]
    html = (folder / "report.html").read_text()
    assert html.count("<svg") == before.count("<svg") + 1 and "Bytes against bits per byte" in html
    assert not re.search(r'(src|href)="http', html)
    assert sorted(p.name for p in folder.glob("*.golf")) == ["model.golf", "packed-80000.golf"]
    assert (folder / "record.json").read_bytes() == (finished / "record.json").read_bytes()


def test_checkpoints_are_found_by_folder_and_file(finished: Path, tmp_path: Path, capfd: Any) -> None:
    newest = max((finished / "checkpoints").glob("*.safetensors"))
    for index, place in enumerate((finished / "checkpoints", newest)):
        packed(capfd, place, "pack.fit=false", "quant.method=rtn", "-o", tmp_path / str(index))
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()


def test_without_the_solver_the_recipe_decides(finished: Path, tmp_path: Path, capfd: Any) -> None:
    result = packed(capfd, finished, "pack.fit=false", "quant.method=rtn", "-o", tmp_path / "m.golf")
    assert "groups" not in result and (tmp_path / "m.golf").read_bytes() == (finished / "model.golf").read_bytes()


def test_grids_of_the_published_systems_are_opened_up(finished: Path, tmp_path: Path, capfd: Any) -> None:
    words = [f"quant.grids.{name}.clip=rowmax" for name in load_recipe("pocket").quant.grids]
    result = packed(capfd, finished, "--bytes", "70000", "-o", tmp_path / "m.golf", *words)
    assert 0.998 * 70_000 <= result["total_bytes"] <= 70_000


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model.dim=64"], "not model"),
        (["budget.bytes=0"], "give --bytes"),
        (["quant.method=nothing"], "nothing"),
        (["--frontier", "pack.fit=false"], "--frontier"),
        (["-o", "{run}/model.golf"], "sealed record"),
        (["-o", "{run}/checkpoints"], "no plain file"),
    ],
)
def test_what_cannot_be_packed_is_said(folder: Path, words: list[str], told: str, capfd: Any) -> None:
    words = [word.format(run=folder) for word in words]
    assert told in error_line(golf_here(capfd, "pack", folder, *words))


def test_a_place_without_a_checkpoint_is_refused(folder: Path, tmp_path: Path, capfd: Any) -> None:
    assert "recipe.toml" in error_line(golf_here(capfd, "pack", tmp_path / "nowhere"))
    assert "float weights" in error_line(golf_here(capfd, "pack", folder / "model.golf"))
    for path in (folder / "checkpoints").iterdir():
        path.unlink()
    assert "no checkpoint" in error_line(golf_here(capfd, "pack", folder))


def test_the_report_accounts_for_every_byte(finished: Path) -> None:
    record = json.loads((finished / "record.json").read_text())
    assert sum(record["ledger"].values()) == record["artifact_bytes"] == (finished / "model.golf").stat().st_size
    assert {"tokenizer", "manifest", "container", "scales"} <= record["ledger"].keys()
    html = (finished / "report.html").read_text()
    section = html[html.index("Where the bytes are") : html.index("<h2>Time")]
    shown = [int(n.replace(",", "")) for n in re.findall(r'class="n">([\d,]+)</td>', section)]
    assert sum(shown[:-1]) == shown[-1] == record["artifact_bytes"]


def test_the_plan_learns_from_a_run_of_the_same_recipe(finished: Path, capfd: Any) -> None:
    record = json.loads((finished / "record.json").read_text())
    answer = golf_here(capfd, "plan", finished / "recipe.toml", "--runs", finished.parent, "--json")
    plan = json.loads(answer.out)
    assert plan["params"] == record["params"] and plan["steps"] == record["steps"] == 12
    assert plan["train_tokens"] == record["train_tokens"]
    assert plan["bytes_low"] <= record["total_bytes"] <= plan["bytes_high"] <= 1.05 * plan["bytes_low"]
    assert str(finished) in plan["timing"]
    assert plan["step_ms"] == pytest.approx(record["step_ms"], rel=0.3)
