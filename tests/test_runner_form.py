"""Records, logs and frontiers of a run folder that say anything at all, well sealed: one line, never a traceback."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paramgolf.errors import GolfError
from paramgolf.lab import report, store
from paramgolf.lab.compare import compare, open_groups
from paramgolf.lab.verify import findings_text, verify
from paramgolf.recipe.load import load_recipe
from paramgolf.runner.folder import RunFolder
from paramgolf.runner.form import SHOWN, check_record, log_point, read_frontier
from paramgolf.runner.record import seal
from paramgolf.runner.report import frontier_svg, write_report
from paramgolf.runner.run import run
from paramgolf.runner.summary import summary_text
from paramgolf.train.clock import Clock
from tests.run_common import TINY, error_line, golf_here

GONE = object()
HOSTILE = [
    GONE, None, True, 0, -1, 1e308, float("nan"), 2**70, "x", "\ud800", "<b>", [], [None], {}, {"a": None}, {"a": "x"},
    [{"sha256": 3}],
]  # fmt: skip
PROOF = {
    "proved_bpb": 2.0, "val_bpb_same_windows": 1.9, "overhead": 0.05, "file_bytes": 250, "text_bytes": 1000,
    "model_bytes": 900, "documents": 3, "data": "here", "validation": True, "seq_len": 64, "stride": 64, "lanes": 4,
    "peers": {"xz -9e": {"bytes": 400, "bpb": 3.2}},
}  # fmt: skip
FIT = {"groups": {"mlp": {"bits": 5, "step": 0.7, "bytes": 300, "loss": 0.01}}, "nats_per_kilobyte": 0.001}
CONDITIONS = ["val_text", "train_text", "scored_bytes", "bytes_from", "cap_bytes", "pack.count"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a proof and chosen grids in its record."""
    out = tmp_path_factory.mktemp("form") / "run"
    run(load_recipe("pocket", [*TINY, "score.stride=16"]), out=out, clock=Clock(age=0.0))
    (out / "train.jsonl").unlink()  # a curve takes a while to draw
    write(out, json.loads((out / "record.json").read_text()) | {"proof": PROOF, "fit": FIT})
    return out


def write(folder: Path, record: dict[str, Any]) -> None:
    (folder / "record.json").write_text(json.dumps(seal(record)))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a record; of a list only its first."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with `new` at a path."""
    if not path:
        return new
    inner = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    inner[path[0]] = replaced(inner[path[0]], path[1:], new)
    inner = {key: one for key, one in inner.items() if one is not GONE}
    return inner if isinstance(value, dict) else list(inner.values())


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_no_sealed_record_makes_a_program_stumble(finished: Path, data: st.DataObject) -> None:
    record = json.loads((finished / "record.json").read_text())
    path = data.draw(st.sampled_from(list(places(record))))
    forged = replaced(record, path, data.draw(st.sampled_from(HOSTILE)))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "runs", "run")
        shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("checkpoints"))
        write(folder, forged)

        def own() -> dict[str, Any]:
            return RunFolder(folder).read_record() or {}

        for program in (
            lambda: compare(open_groups([str(finished), str(folder)]), allow=CONDITIONS),
            lambda: report.write_report([str(folder)], Path(scratch, "report.html")),
            lambda: write_report(RunFolder(folder), own(), "a run"),
            lambda: summary_text(own()),
            lambda: findings_text(verify(folder)),
            lambda: store.runs_text(store.index_runs(folder.parent)[0]),
        ):
            try:
                program()
            except GolfError as error:
                assert "\n" not in str(error) and str(error)


def test_the_untouched_record_has_its_form(finished: Path) -> None:
    record = json.loads((finished / "record.json").read_text())
    assert check_record(record, finished, SHOWN) is record
    write_report(RunFolder(finished), record, "a run")
    assert "mlp" in (finished / "report.html").read_text()


def test_what_is_wrong_is_named(finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    record = json.loads((finished / "record.json").read_text())
    for number, (key, new, words) in enumerate([
        ("seconds", {"train": "long"}, "seconds.train: input should be a valid number"),
        ("val_bpb", 1e300, "val_bpb: input should be less"),
        ("val_bpb", float("nan"), "not valid JSON (the number NaN)"),
        ("seconds", {"train": 1.0}, "seconds: input should have 'strict'"),
        ("recipe", GONE, "has no 'recipe'"),
        ("stride", GONE, "has no 'stride'"),
    ]):  # fmt: skip
        folder = tmp_path / str(number)
        shutil.copytree(finished, folder)
        write(folder, replaced(record, (key,), new))
        line = error_line(golf_here(capfd, "compare", finished, folder))
        assert words in line and str(folder / "record.json") in line and "get the file again" in line


@pytest.mark.parametrize("table", ["train = 3", "data = []", "x = " + "[" * 5000, "budget = 'x'"])
def test_a_recipe_of_another_form_is_named(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], table: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "recipe.toml").write_text(table)
    assert "recipe.toml" in error_line(golf_here(capfd, "compare", finished, folder))
    assert "recipe.toml" in error_line(golf_here(capfd, "report", folder, "-o", tmp_path / "r.html"))


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "3", "null", "[" * 100_000, '{"step": 1, "tokens": 2, "elapsed": 3}']
    + [f'{{"step": 1, "tokens": 2, "elapsed": 3, "loss": {loss}}}' for loss in ("NaN", "[]", '"x"', "-1e99", "null")]
    + [f'{{"step": {10**400}, "tokens": 2, "elapsed": 3, "loss": 1}}', b"\xff\xfe{"],
)
def test_a_line_that_is_no_step_is_left_out(line: str | bytes) -> None:
    assert log_point(line) is None
    assert log_point('{"step": 1, "tokens": 2, "elapsed": 3, "loss": 4.5, "more": []}') == (1.0, 2.0, 3.0, 4.5)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"points": []}', '{"float_bpb": 1, "chosen_bytes": 2, "points": [{"total_bytes": "x"}]}']
)
def test_a_frontier_of_another_form_is_not_drawn(tmp_path: Path, text: str) -> None:
    (tmp_path / "frontier.json").write_text(text)
    assert frontier_svg(read_frontier(tmp_path / "frontier.json")) == ""
