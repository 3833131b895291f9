"""`golf verify`: every kind of change to a run folder is named; an untouched folder is not accused."""

from __future__ import annotations

import json
import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paramgolf.errors import GolfError
from paramgolf.lab.verify import verify
from paramgolf.recipe.load import load_recipe
from paramgolf.runner.environment import read_source, source_sha256, sources_sha256
from paramgolf.runner.record import FORMAT, SEAL, seal
from paramgolf.runner.run import run
from paramgolf.train.clock import Clock
from tests.run_common import TINY, Answer, error_line, golf_here


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "run"
    run(load_recipe("pocket", [*TINY, "score.stride=16"]), out=out, clock=Clock(age=0.0))
    return out


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy, ignore=shutil.ignore_patterns("checkpoints"))
    return copy


def mismatches(folder: Path, **settings: Any) -> set[str]:
    return {check.name for check in verify(folder, **settings).mismatches}


def edit(folder: Path, change: Callable[[dict[str, Any]], None], *, sealed: bool = True) -> None:
    """Change the record; `sealed` as a forger would, who seals it again."""
    record = json.loads((folder / "record.json").read_text())
    change(record)
    record = seal(record) if sealed else record
    (folder / "record.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_an_untouched_run_verifies_with_its_score(finished: Path) -> None:
    findings = verify(finished, score=True)
    assert [check for check in findings.checks if not check.ok and "code" not in check.name] == []
    names = {check.name for check in findings.checks}
    assert {"val_bpb", "val_bpb_sliding", "scored_bytes", "params", "sum of the ledger", "validation text"} <= names


def test_a_changed_log_line(folder: Path) -> None:
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[2] = lines[2].replace('"loss": ', '"loss": 1')
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    assert mismatches(folder) == {"sha256 of train.jsonl"}


def test_a_changed_weight(folder: Path) -> None:
    flip(folder / "model.golf", 5000)
    assert "sha256 of model.golf" in mismatches(folder)
    assert "model.golf" in mismatches(folder)  # its own checksum


def test_a_changed_recipe(folder: Path) -> None:
    path = folder / "recipe.toml"
    path.write_text(path.read_text().replace("matrix_lr = ", "matrix_lr = 1"))
    assert mismatches(folder) == {"sha256 of recipe.toml"}
    path.write_text(path.read_text().replace("seed = 1337", "seed = 7"))
    assert mismatches(folder) == {"sha256 of recipe.toml", "seed"}


def test_every_byte_of_the_record_counts(folder: Path) -> None:
    path = folder / "record.json"
    original = path.read_bytes()
    (folder / "source.tar.xz").unlink()  # takes a tenth of a second to hash each time
    for at in range(0, len(original), 37):
        flip(path, at)
        try:
            assert mismatches(folder), f"byte {at} of the record changed unseen"
        except GolfError as error:
            assert "record" in str(error)  # no JSON, or another format, any more
        path.write_bytes(original)
    path.write_bytes(original + b" ")
    assert mismatches(folder) == {"bytes of record.json"}
    edit(folder, lambda record: record.update(val_bpb=1.0), sealed=False)
    assert mismatches(folder) == {"seal of record.json"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: r.update(params=r["params"] + 1), {"params"}),
        (lambda r: r.update(artifact_bytes=r["artifact_bytes"] - 1), {"artifact_bytes"}),
        (lambda r: r.update(total_bytes=r["total_bytes"] - 9), {"total_bytes"}),
        (lambda r: r["ledger"].update(scales=r["ledger"]["scales"] - 1), {"ledger", "sum of the ledger"}),
        (lambda r: r["data"].update(val_documents_in_train=3), {"no validation document in training"}),
        (
            lambda r: r["data"]["train"]["shards"].append(r["data"]["val"]["shards"][0]),
            {"no shard in both training and validation", "data.json, train"},
        ),
        (lambda r: r.update(cap_bytes=1000), {"byte cap", "within the cap"}),
        (lambda r: r.update(seed=True), {"seed"}),
        (lambda r: r.pop("data"), {"data passport"}),
        (lambda r: r.update(ledger=[1, 2]), {"model.golf"}),
        (lambda r: r.update(ledger="x"), {"model.golf"}),
        (
            lambda r: r.update(sha256=3),
            {"sha256 of recipe.toml", "sha256 of train.jsonl", "sha256 of model.golf", "code in source.tar.xz"},
        ),
    ],
)
def test_a_sealed_lie_is_caught_by_the_files(
    folder: Path, change: Callable[[dict[str, Any]], None], named: set[str]
) -> None:
    edit(folder, change)
    assert mismatches(folder) == named


def test_a_better_score_sealed_again_is_caught_by_scoring(folder: Path) -> None:
    edit(folder, lambda record: record.update(val_bpb=record["val_bpb"] - 0.001))
    assert mismatches(folder) == set()  # no file says otherwise
    assert mismatches(folder, score=True) == {"val_bpb"}


def test_other_validation_text_is_not_scored(folder: Path) -> None:
    edit(folder, lambda record: record["data"]["val"].update(sha256="0" * 64))
    findings = verify(folder, score=True)
    assert {check.name for check in findings.mismatches} == {"validation text", "data.json, val"}
    assert "val_bpb" not in {check.name for check in findings.checks}


def test_without_the_text_the_score_is_unknown(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAMGOLF_CACHE", str(tmp_path / "empty"))
    findings = verify(folder, score=True)
    assert not findings.mismatches
    unknown = [check.name for check in findings.checks if check.ok is None and "code" not in check.name]
    assert unknown == ["score"]


def test_a_changed_byte_of_the_code(folder: Path) -> None:
    """Anywhere in the archive, or repacked with one byte of one file changed."""
    path = folder / "source.tar.xz"
    original = path.read_bytes()
    for at in range(0, len(original), len(original) // 12):
        flip(path, at)
        assert mismatches(folder), f"byte {at} of the code changed unseen"
        path.write_bytes(original)
    unpacked = lzma.decompress(original)
    changed = unpacked.replace(b"def score(", b"def scare(", 1)
    assert changed != unpacked
    path.write_bytes(lzma.compress(changed))
    assert mismatches(folder) == {"code in source.tar.xz"}
    for wrong in (b"no archive", lzma.compress(b"\0" * (65 << 20)), original + b"more", original[:-9]):
        path.write_bytes(wrong)
        assert mismatches(folder) == {"source.tar.xz"}
    path.unlink()
    assert mismatches(folder) == set()  # a run of an older version


def test_files_that_differ_from_the_installed_code_are_named(folder: Path) -> None:
    path = folder / "source.tar.xz"
    unpacked = lzma.decompress(path.read_bytes())
    path.write_bytes(lzma.compress(unpacked.replace(b"def findings_text(", b"def findings_line(", 1)))
    edit(folder, lambda record: record["sha256"].update(source=sources_sha256(read_source(path))))
    assert mismatches(folder) == set()
    (named,) = (c for c in verify(folder, source=True).mismatches)
    assert "1 files differ: lab/verify.py" in named.detail


def test_another_code_is_a_remark_unless_asked_for(folder: Path) -> None:
    (folder / "source.tar.xz").unlink()
    edit(folder, lambda record: record["sha256"].update(source=source_sha256()))
    assert mismatches(folder, source=True) == set()
    edit(folder, lambda record: record["sha256"].update(source="0" * 64))
    assert mismatches(folder) == set()
    assert mismatches(folder, source=True) == {"sha256 of the installed code"}


@pytest.mark.parametrize("name", ["train.jsonl", "model.golf", "recipe.toml"])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"sha256 of {name}" in mismatches(folder)


def test_command_line(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good = golf_here(capfd, "verify", folder, "--json")
    assert good.code == 0
    assert json.loads(good.out)["ok"] is True
    flip(folder / "train.jsonl", 20)
    bad = golf_here(capfd, "verify", folder)
    assert bad.code == 1
    assert "MISMATCH  sha256 of train.jsonl" in bad.out
    assert bad.err.count("\n") == 1 and "sha256 of train.jsonl" in bad.err
    edit(folder, lambda record: record.update(format=FORMAT + 1))
    assert "update paramgolf" in error_line(golf_here(capfd, "verify", folder))
    for content in ("", "[]", "{}", '{"format": true}', "[" * 100_000, "\xff"):
        (folder / "record.json").write_text(content, encoding="latin-1")
        assert "record.json" in error_line(golf_here(capfd, "verify", folder))
    assert "no record.json" in error_line(golf_here(capfd, "verify", tmp_path / "nothing"))


def test_without_scoring_torch_is_not_loaded(finished: Path) -> None:
    program = (
        "import sys; from paramgolf.lab.verify import verify\n"
        f"assert not verify({str(finished)!r}).mismatches; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, env={**os.environ})
    assert Answer(done.returncode, "", done.stderr.decode()) == Answer(0, "", "")


def test_the_seal_is_the_hash_of_the_rest(finished: Path) -> None:
    record = json.loads((finished / "record.json").read_text())
    assert record[SEAL] == seal(record)[SEAL]
