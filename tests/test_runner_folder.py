"""Who may write into a run folder, and what a record can hold."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from paramgolf.errors import GolfError
from paramgolf.recipe.load import load_recipe
from paramgolf.runner import doctor
from paramgolf.runner.environment import archive_source, read_source, sources_sha256
from paramgolf.runner.folder import RunFolder, claim
from paramgolf.runner.record import canonical, plain
from tests.run_common import TINY, error_line, golf_here

NOT_UTF8 = "caf\udce9"  # the file name b"caf\xe9" as Python has it


def test_runs_that_begin_in_the_same_second_get_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("pocket")
    roots = {claim(None, recipe, resume=False, note=print)["root"] for _ in range(3)}
    assert len(roots) == 3 and all((Path(root) / "recipe.toml").is_file() for root in roots)


def test_of_runs_given_one_folder_at_once_one_has_it(tmp_path: Path) -> None:
    """And the recipe in it is that one's."""
    for attempt in range(20):
        out, gate = tmp_path / str(attempt), threading.Barrier(4)

        def begin(seed: int, out: Path = out, gate: threading.Barrier = gate) -> int | None:
            recipe = load_recipe("pocket", [f"train.seed={seed}"])
            gate.wait()
            try:
                claim(out, recipe, resume=False, note=print)
            except GolfError:
                return None
            return seed

        with ThreadPoolExecutor(4) as pool:
            began = [seed for seed in pool.map(begin, range(4)) if seed is not None]
        assert began == [load_recipe(str(out / "recipe.toml")).train.seed]


def test_a_name_that_no_recipe_file_can_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("pocket")
    recipe = replace(recipe, data=replace(recipe.data, train=NOT_UTF8))
    with pytest.raises(GolfError, match="no name in UTF-8"):
        claim(None, recipe, resume=False, note=print)
    assert list(tmp_path.iterdir()) == []


def test_a_record_holds_names_that_are_not_utf8() -> None:
    record = plain({"data": {"source": [{"name": NOT_UTF8}]}})
    assert json.dumps(record, ensure_ascii=False).encode()
    assert canonical({"name": NOT_UTF8})  # of a record from elsewhere: its seal does not hold, but can be computed


def test_a_lock_speaks_of_other_processes_only_where_there_are_some(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(BlockingIOError, match="mine"), folder.locked():
        with pytest.raises(GolfError, match="another process"), RunFolder(tmp_path).locked():
            pass
        raise BlockingIOError("mine")


def test_a_refused_resume_leaves_the_files_of_the_run_at_work(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    claim(out, load_recipe("pocket", TINY), resume=False, note=print)
    half = out / ".model.golf.abcdefgh.tmp"
    half.write_bytes(b"half")
    with RunFolder(out).locked():
        assert "another process" in error_line(golf_here(capfd, "run", "pocket", *TINY, "--out", out, "--resume"))
        assert half.exists()


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, "{", "1"])
def test_a_record_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(GolfError, match=r"record\.json"):
        RunFolder(tmp_path).read_record()


def test_the_code_kept_is_the_code_given_not_the_code_now_installed(tmp_path: Path) -> None:
    files = {"a.py": b"1", "b/c.py": b"2"}
    archive_source(tmp_path / "source.tar.xz", files)
    assert sources_sha256(read_source(tmp_path / "source.tar.xz")) == sources_sha256(files)


def test_doctor_outlives_a_broken_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('no such symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(doctor.OPTIONAL, "broken_package", "nothing")
    assert "no such symbol" in doctor.examine()["missing"]["broken_package"]
