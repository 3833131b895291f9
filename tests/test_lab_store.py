"""`golf runs`: the index follows the folders, filters and sorts, and survives damage and concurrent use."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paramgolf.errors import GolfError
from paramgolf.lab.records import recipe_table
from paramgolf.lab.store import NAME, index_runs, runs_text, select
from paramgolf.runner.folder import RunFolder
from paramgolf.runner.record import FORMAT, seal
from tests.run_common import error_line, golf_here


def write_run(folder: Path, **values: Any) -> None:
    record = {
        "format": FORMAT, "recipe": "pocket", "seed": 1, "val_bpb": 2.0, "total_bytes": 1000, "steps": 5,
        "seconds": {"strict": 10.5}, "training": {"compiled": {"enabled": False}}, **values,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(json.dumps(seal(record)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    runs = tmp_path / "runs"
    for seed, bpb in ((1, 2.10), (2, 2.05), (3, 2.20)):
        write_run(runs / f"pocket-{seed}", seed=seed, val_bpb=bpb)
    write_run(runs / "study" / "trial-0", recipe="baseline", val_bpb_sliding=1.9)
    (runs / "unfinished").mkdir()
    (runs / "unfinished" / "recipe.toml").write_text("")
    return runs


def names(runs: list[dict[str, Any]]) -> list[str]:
    return [Path(facts["run"]).name for facts in runs]


def test_the_index_follows_the_folders(root: Path) -> None:
    assert set(names(index_runs(root)[0])) == {"pocket-1", "pocket-2", "pocket-3", "trial-0"}
    assert (root / NAME).is_file()
    write_run(root / "pocket-4", seed=4)
    write_run(root / "pocket-1", seed=1, val_bpb=1.123)
    shutil.rmtree(root / "pocket-2")
    runs, _ = index_runs(root)
    assert set(names(runs)) == {"pocket-1", "pocket-3", "pocket-4", "trial-0"}
    assert {facts["val_bpb"] for facts in runs if facts["run"].endswith("pocket-1")} == {1.123}
    indexed = sorted(runs, key=lambda facts: facts["run"])
    (root / NAME).unlink()
    assert sorted(index_runs(root)[0], key=lambda facts: facts["run"]) == indexed


@pytest.mark.parametrize("damage", [b"no database at all" * 100, b"", b"SQLite format 3\0" + b"\xff" * 200])
def test_a_damaged_index_is_made_anew(root: Path, damage: bytes) -> None:
    (root / NAME).write_bytes(damage)
    assert len(index_runs(root)[0]) == 4
    assert len(index_runs(root)[0]) == 4


@pytest.mark.parametrize("facts", ["{", "5", "[" * 100_000, "{},5", None, b"\xff"])
def test_an_index_with_broken_rows_is_made_anew(root: Path, facts: object) -> None:
    expected = index_runs(root)
    with contextlib.closing(sqlite3.connect(root / NAME)) as connection:
        connection.execute("UPDATE runs SET facts = ?", (facts,))
        connection.commit()
    assert index_runs(root) == expected
    with contextlib.closing(sqlite3.connect(root / NAME)) as connection:
        assert all(json.loads(text) for (text,) in connection.execute("SELECT facts FROM runs"))


@pytest.mark.parametrize("second", [15_000_000_000, -15_000_000_000])
def test_records_of_odd_times_are_listed(root: Path, second: int) -> None:
    os.utime(root / "pocket-1" / "record.json", (second, second))
    for _ in range(2):
        assert len(index_runs(root)[0]) == 4


def test_bad_records_are_named_and_the_rest_is_listed(root: Path) -> None:
    (root / "pocket-1" / "record.json").write_text("{")
    write_run(root / "pocket-2", format=FORMAT + 1)
    write_run(root / "pocket-nan", val_bpb=float("nan"))
    runs, problems = index_runs(root)
    assert len(runs) == 2
    assert any("not valid JSON" in line for line in problems) and any("update paramgolf" in line for line in problems)
    assert any("not valid JSON (the number NaN)" in line for line in problems)


def test_names_that_are_no_utf8_are_listed(root: Path) -> None:
    good, bad = root / os.fsdecode(b"good-\xff"), root / os.fsdecode(b"bad-\xff")
    write_run(good)
    write_run(bad)
    (bad / "record.json").write_text("{")
    for _ in range(2):  # read, and from the index
        runs, problems = index_runs(root)
        assert str(good) in [facts["run"] for facts in runs] and len(runs) == 5
        assert len(problems) == 1 and "bad-\\udcff" in problems[0]
    shutil.rmtree(good)
    assert len(index_runs(root)[0]) == 4


def test_deep_recipes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(f"[model.parts{'.a' * 1500}]\nx = 1\n")
    with pytest.raises(GolfError, match=r"recipe\.toml: 'model\.parts\.a\S* is nested more than 8 deep"):
        recipe_table(RunFolder(tmp_path))


def test_filters_and_sorting(root: Path) -> None:
    runs, _ = index_runs(root)
    assert names(select(runs, ["recipe=pocket"], "val_bpb")) == ["pocket-2", "pocket-1", "pocket-3"]
    assert names(select(runs, ["recipe=pocket"], "val_bpb", reverse=True)) == ["pocket-3", "pocket-1", "pocket-2"]
    assert names(select(runs, ["val_bpb<2.15", "recipe!=base*"], "seed")) == ["pocket-1", "pocket-2"]
    assert names(select(runs, ["recipe=b*"])) == ["trial-0"]
    assert names(select(runs, ["seconds.strict>=10.5", "seed>2"])) == ["pocket-3"]
    assert len(select(runs, ["training.compiled.enabled=false"])) == 4
    assert names(select(runs, [], "val_bpb_sliding"))[0] == "trial-0"  # runs without the key come last
    with pytest.raises(GolfError, match="did you mean 'val_bpb'"):
        select(runs, [], "val_bpp")
    with pytest.raises(GolfError, match="not of the form"):
        select(runs, ["recipe"])
    with pytest.raises(GolfError, match="no run has 'colour'"):
        select(runs, ["colour=red"])


def test_concurrent_listing_and_writing(root: Path) -> None:
    program = (
        "import sys; from paramgolf.lab.store import index_runs\n"
        "from tests.test_lab_store import write_run; from pathlib import Path\n"
        "root, n = Path(sys.argv[1]), sys.argv[2]\n"
        "for i in range(15): write_run(root / f'p{n}-{i}'); index_runs(root)\n"
    )
    jobs = [subprocess.Popen([sys.executable, "-c", program, str(root), str(n)]) for n in range(3)]
    assert [job.wait(120) for job in jobs] == [0, 0, 0]
    assert len(index_runs(root)[0]) == 4 + 45


def test_many_records_are_listed(tmp_path: Path) -> None:
    for i in range(300):
        write_run(tmp_path / f"r{i}", seed=i, val_bpb=3 - i / 1000)
    text = runs_text(select(index_runs(tmp_path)[0], ["seed>=100"], "val_bpb"))
    lines = text.splitlines()
    assert len(lines) == 201
    assert len({line.index("pocket") for line in lines[1:]}) == 1  # columns line up
    assert "2.7010" in lines[1]


def test_command_line(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    answer = golf_here(capfd, "runs", "--root", root, "--filter", "recipe=pocket", "--sort", "val_bpb", "--json")
    assert [facts["seed"] for facts in json.loads(answer.out)["runs"]] == [2, 1, 3]
    assert "pocket-3" in golf_here(capfd, "runs", "--root", root).out
    assert "no folder" in error_line(golf_here(capfd, "runs", "--root", tmp_path / "nothing"))
    assert "not of the form" in error_line(golf_here(capfd, "runs", "--root", root, "--filter", "x"))
