"""The folder that `golf submit` writes: what belongs together, the cap, and nothing half-written."""

from __future__ import annotations

import base64
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pytest

from paramgolf.errors import GolfError
from paramgolf.recipe.load import load_recipe, to_toml
from paramgolf.runner.environment import source_sha256
from paramgolf.runner.record import seal
from paramgolf.submit.audit.audit import audit
from paramgolf.submit.package import CAP, Author, known_author, packed_script, read_runs, submit
from tests.run_common import error_line, golf_here

DATA = {
    "tokenizer": {"sha256": "00", "reversible": False},
    "train": {"tokens": 9, "shards": []}, "val": {"tokens": 9, "shards": []},
}  # fmt: skip


def write_run(root: Path, seed: int, **changes: Any) -> Path:
    """A finished run's folder with a sealed record, as the runner leaves it."""
    root.mkdir(parents=True)
    recipe = load_recipe("pr114", [f"train.seed={seed}"])
    (root / "recipe.toml").write_text(to_toml(recipe))
    rows = [{"step": step, "tokens": 9 * step, "loss": 7.0 - step / 10, "elapsed": step / 10} for step in (1, 10, 20)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = {
        "format": 1, "paramgolf": "0.1.0", "recipe": "pr114", "seed": seed, "data": DATA,
        "sha256": {"source": source_sha256()}, "peers": {}, "paths": {"artifact": "a", "report": "r"},
        "environment": {"gpus": [], "cpu": "a CPU", "cpu_count": 2, "torch": "2.9"}, "cap_bytes": 0, "code_bytes": 0,
        "training": {"world": 1, "train_seconds": 2.0, "stop_reason": "steps"}, "steps": 20, "step_ms": 100.0,
        "val_loss": 2.0 + seed / 1000, "val_bpb": 1.2 + seed / 1000, "val_loss_sliding": 1.95 + seed / 1000,
        "val_bpb_sliding": 1.15 + seed / 1000, "stride": 64, "val_loss_float": 1.99, "val_bpb_float": 1.19,
        "windows": "exact", "artifact_bytes": 15_000_000, "ledger": {"tokenizer": 9_000}, "codec": "zlib",
        "params": 21_778_504, "scored_tokens": 1000, "scored_bytes": 2400, "peak_memory_bytes": 1 << 30,
        "seconds": {"strict": 4.0, "score": 3.0}, "total_bytes": 15_000_000, "train_tokens": 180,
    } | changes  # fmt: skip
    (root / "record.json").write_text(json.dumps(seal(record)))
    return root


def test_three_seeds_make_a_folder_without_violations(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(seed), seed) for seed in (3, 1, 2)]
    made = submit(runs, tmp_path / "entry", author=Author("A. Name", "aname"), name="An entry")
    facts = json.loads((tmp_path / "entry" / "submission.json").read_text())
    assert facts["seeds"] == [1, 2, 3]
    assert facts["val_bpb"] == pytest.approx(1.152)
    assert facts["val_bpb_std"] == pytest.approx(0.001)
    assert facts["bytes_code"] == (tmp_path / "entry" / "train_gpt.py").stat().st_size == made["code_bytes"]["plain"]
    assert facts["bytes_total"] == 15_000_000 - 9_000 + facts["bytes_code"]
    readme = (tmp_path / "entry" / "README.md").read_text()
    assert f"{made['code_bytes']['compressed']:,}" in readme
    assert "train_seed2.log" in made["files"]
    found = audit(tmp_path / "entry")
    assert found.violations == 0, found.findings


def test_over_the_cap_is_refused_and_says_by_how_much(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 1, artifact_bytes=CAP + 9_000)
    with pytest.raises(GolfError, match=r"over 16,000,000") as refused:
        submit([run], tmp_path / "entry")
    code = int(str(refused.value).split("(")[1].split(" ")[0].replace(",", ""))
    assert f"{code:,} over 16,000,000" in str(refused.value)
    assert not (tmp_path / "entry").exists()


def test_runs_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", 1)
    same_seed = write_run(tmp_path / "b", 1)
    other_data = write_run(tmp_path / "c", 2, data=DATA | {"train": {"tokens": 8}})
    with pytest.raises(GolfError, match="each seed"):
        read_runs([first, same_seed])
    with pytest.raises(GolfError, match="data"):
        read_runs([first, other_data])
    record = json.loads((first / "record.json").read_text())
    (first / "record.json").write_text(json.dumps(record | {"val_bpb": 1.0}))
    with pytest.raises(GolfError, match="sealed"):
        read_runs([first])


@pytest.mark.parametrize("line", ['{"step": 3}', "{", '{"step": 1, "tokens": 2, "elapsed": NaN, "loss": 3}'])
def test_a_line_of_the_log_that_is_no_step_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], line: str
) -> None:
    run = write_run(tmp_path / "run", 1)
    with (run / "train.jsonl").open("a") as log:
        log.write(f"{line}\n")
    refused = error_line(golf_here(capfd, "submit", run, "--out", tmp_path / "entry"))
    assert f"{run / 'train.jsonl'}, line 4" in refused and "get the file again" in refused
    assert not (tmp_path / "entry").exists()


def test_a_recipe_that_only_extends_another_is_submitted_like_the_whole_one(tmp_path: Path) -> None:
    short, whole = write_run(tmp_path / "short", 1), write_run(tmp_path / "whole", 1)
    (short / "recipe.toml").write_text('extends = "pr114"\nname = "pr114"\n[train]\nseed = 1\n')
    submit([short], tmp_path / "entry")
    readme = (tmp_path / "entry" / "README.md").read_text()
    run = read_runs([whole])[0]
    assert run.table == read_runs([short])[0].table | {"extends": ""}
    assert f"data order `{run.table['data']['order']}`" in readme and "[]" not in readme


@pytest.mark.parametrize(("program", "name"), [("printf 'Jos\\351\\n'", "Jos\ufffd"), ("exec sleep 60", "unknown")])
def test_a_name_that_git_cannot_tell_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, name: str
) -> None:
    (tmp_path / "git").write_text(f"#!/bin/sh\n{program}\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert known_author(patience=0.5) == Author(name, name)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 1)
    (tmp_path / "entry").mkdir()
    (tmp_path / "entry" / "mine.txt").write_text("mine")
    with pytest.raises(GolfError, match="exists already"):
        submit([run], tmp_path / "entry")
    assert [p.name for p in (tmp_path / "entry").iterdir()] == ["mine.txt"]


def test_packed_script_holds_the_plain_one() -> None:
    plain = b"print('hello')\n" * 100
    packed = packed_script(plain).decode()
    held = packed.split('b85decode("')[1].split('"')[0]
    assert lzma.decompress(base64.b85decode(held)) == plain
    spoken: list[str] = []
    exec(packed, {"__file__": "train_gpt.py", "print": spoken.append})
    assert spoken == ["hello"] * 100
