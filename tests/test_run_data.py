"""What `golf run` takes and what the other faces of the command line show."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import typer

import paramgolf
from paramgolf.cli import app
from paramgolf.recipe.load import recipe_names
from tests.run_common import TINY, error_line, golf_here, prose

CapFd = pytest.CaptureFixture[str]
SHORT = [*TINY, "budget.steps=2", "score.stride=0", "pack.codec=zlib"]
ROOT = Path(__file__).parents[1]


def run(capfd: CapFd, tmp_path: Path, *arguments: str | Path) -> dict[str, object]:
    answer = golf_here(capfd, "run", "pocket", *SHORT, *arguments, "--out", tmp_path / "run", "--json")
    assert answer.code == 0, answer.err
    return dict(json.loads(answer.out))


def test_a_text_file(capfd: CapFd, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(prose())
    record = run(capfd, tmp_path, "--data", text)
    data = record["data"]
    assert isinstance(data, dict)
    assert data["train"]["bytes"] + data["val"]["bytes"] <= len(prose())
    assert record["scored_bytes"] == data["val"]["bytes"] > 0
    saved = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())
    assert saved["data"]["train"] == str(text), "the folder knows what it was trained on"


def test_a_passport_that_says_other_bytes_is_refused(capfd: CapFd, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(prose()[:60_000])
    made = golf_here(capfd, "data", "prepare", tmp_path / "text.txt", "--vocab-size", "300", "--out", tmp_path / "data")
    assert made.code == 0, made.err
    path = tmp_path / "data" / "passport.json"
    passport = json.loads(path.read_text())
    passport["val"]["bytes"] *= 2
    path.write_text(json.dumps(passport))
    out = ("--out", tmp_path / "run")
    refused = error_line(golf_here(capfd, "run", "pocket", *SHORT, "data.vocab_size=300", "--data", path.parent, *out))
    assert f"says {passport['val']['bytes']} bytes of validation text" in refused
    assert not (tmp_path / "run").exists()


def test_a_folder_with_validation_text(capfd: CapFd, tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    text = prose()
    (folder / "a.txt").write_text(text[:20_000])
    (folder / "deep" / "b.jsonl").write_text(json.dumps({"text": text[20_000:40_000]}) + "\n")
    (folder / "my_val.txt").write_text(text[40_000:43_000])
    (folder / "picture.png").write_bytes(b"\x89PNG")
    record = run(capfd, tmp_path, "--data", folder)
    assert record["scored_bytes"] == 3000
    data = record["data"]
    assert isinstance(data, dict)
    assert (
        data["train"]["documents"] == 2
        and data["train"]["bytes"] == 40_000
        and data["skipped_files"] == ["picture.png"]
    )


def test_jsonl_with_a_field_of_its_own(capfd: CapFd, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    text = prose()
    rows.write_text("".join(json.dumps({"body": text[i : i + 500]}) + "\n" for i in range(0, 50_000, 500)))
    record = run(capfd, tmp_path, "--data", rows, "data.text_field=body", "data.val_max_bytes=3000")
    data = record["data"]
    assert isinstance(data, dict)
    assert data["train"]["documents"] + data["val"]["documents"] == 100
    assert data["split"] == "document hash"


def test_standard_input(capfd: CapFd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    piped = io.TextIOWrapper(io.BytesIO(prose().encode()))
    monkeypatch.setattr(sys, "stdin", piped)
    record = run(capfd, tmp_path, "--data", "-")
    assert isinstance(record["scored_bytes"], int) and record["scored_bytes"] > 0


def test_progress_goes_to_stderr_and_the_result_to_stdout(capfd: CapFd, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(prose())
    answer = golf_here(capfd, "run", "pocket", *SHORT, "--data", text, "--out", tmp_path / "run")
    assert answer.code == 0
    assert "scoring the file" in answer.err
    for announced in ("step 1 ", "step 2 ", "packing", "scoring the trained weights"):
        assert announced in answer.err and announced not in answer.out
    assert "bits per byte" in answer.out and "model.golf" in answer.out
    assert "\x1b" not in answer.out + answer.err, "no colours where there is no terminal"


def test_seconds_and_bytes_set_the_budget(capfd: CapFd, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(prose())
    record = run(
        capfd, tmp_path, "--data", text, "budget.steps=0", "--seconds", "0.5", "--bytes", "77000",
        "budget.clock=challenge",
    )  # fmt: skip
    training = record["training"]
    assert isinstance(training, dict) and training["stop_reason"] == "seconds"
    assert record["cap_bytes"] == 77_000
    budget = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())["budget"]
    assert budget["seconds"] == 0.5 and budget["bytes"] == 77_000


def test_recipes(capfd: CapFd) -> None:
    listing = golf_here(capfd, "recipes")
    assert listing.code == 0 and all(re.search(rf"^{name} ", listing.out, re.M) for name in recipe_names())
    shown = golf_here(capfd, "recipes", "pr107", "--from-env", "MLP_HIDDEN=1400 EVAL_STRIDE=32 RUN_ID=x torchrun t.py")
    assert shown.code == 0
    assert re.search(r"^mlp_hidden = 1400 +# override", shown.out, re.M)
    assert re.search(r"^stride = 32 +# override", shown.out, re.M)
    assert re.search(r"^grad_clip = 0.3 +# pr107.toml", shown.out, re.M)
    assert "RUN_ID" in shown.err and "left out" in shown.err
    table = json.loads(golf_here(capfd, "recipes", "pr114", "--json").out)
    assert table["recipe"]["train"]["batch_tokens"] == 786_432
    assert table["origin"]["train.batch_tokens"] == "pr114.toml"


def test_doctor(capfd: CapFd) -> None:
    answer = golf_here(capfd, "doctor", "--json")
    facts = json.loads(answer.out)
    assert answer.code == 0 and facts["cpu_count"] >= 1 and facts["device"] in ("cpu", "cuda")
    text = golf_here(capfd, "doctor").out
    assert facts["cpu"] in text and "compiler" in text


def commands() -> list[str]:
    root = typer.main.get_command(app)
    names = []
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        below = getattr(command, "commands", None)
        names += [f"{name} {sub}" for sub in below] if below else [name]
    return names


@pytest.mark.parametrize("command", commands())
def test_help_has_an_example_that_is_understood(capfd: CapFd, command: str) -> None:
    answer = golf_here(capfd, *command.split(), "--help")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", answer.out)
    assert answer.code == 0 and answer.err == ""
    assert f"Example: golf {command}" in " ".join(plain.split()), plain


@pytest.mark.full
def test_the_wheel_holds_everything_and_runs(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {f"paramgolf/recipes/{name}.toml" for name in recipe_names()} <= inside
    templates = {p.name for p in (ROOT / "src/paramgolf/runner/templates").iterdir()}
    assert {f"paramgolf/runner/templates/{name}" for name in templates} <= inside
    assert "paramgolf/py.typed" in inside and not any("test" in name or "__pycache__" in name for name in inside)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--no-deps", "--no-index", str(wheel)], check=True, cwd=tmp_path)
    packages = Path(str(typer.__file__)).parents[1]  # the dependencies, from where these tests have them
    path = tmp_path / "path"
    path.mkdir()
    for entry in packages.iterdir():
        if "paramgolf" not in entry.name:
            (path / entry.name).symlink_to(entry)
    environment = {**os.environ, "PYTHONPATH": str(path)}
    golf = tmp_path / "venv" / "bin" / "golf"
    listing = subprocess.run([golf, "recipes"], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert listing.returncode == 0, listing.stderr
    assert all(name in listing.stdout for name in recipe_names())
    where = subprocess.run(
        [python, "-c", "import paramgolf; print(paramgolf.__file__)"],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert str(tmp_path / "venv") in where.stdout
    out = tmp_path / "run"
    made = subprocess.run(
        [golf, "run", "pocket", *SHORT, "--out", out, "--json"], env=environment, cwd=tmp_path, capture_output=True,
        text=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["paramgolf"] == paramgolf.__version__
    assert (out / "report.html").is_file()
