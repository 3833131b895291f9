"""`golf sweep` and `golf ablate`: the search finds a known answer, survives interruptions, and never trains on what it
is judged by."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paramgolf.data.dataset import Dataset
from paramgolf.data.tokenizer import Tokenizer
from paramgolf.errors import GolfError
from paramgolf.lab.ablate import ablate, ablate_text
from paramgolf.lab.space import read_words
from paramgolf.lab.storage import shown
from paramgolf.lab.study import sweep_text
from paramgolf.lab.sweep import plan_sweep, sweep
from paramgolf.lab.tuning import hold_back, tuning_data
from paramgolf.recipe.load import load_recipe
from tests.lab_standin import PROGRAM, RECIPE
from tests.run_common import TINY, error_line, golf, golf_here, one_thread, prose

pytest.importorskip("optuna")
ROOT = Path(__file__).parent.parent
OVER = ["optim.matrix_lr=0.005..0.08:log", "model.mlp_hidden=384,480,576"]


def standin_sweep(out: Path, *words: str, **settings: Any) -> dict[str, Any]:
    settings = {"trials": 6, "on": "validation", "program": PROGRAM, **settings}
    return sweep(plan_sweep(RECIPE, list(words) or OVER, steps=20, out=out, **settings))


# -- what is varied ------------------------------------------------------------------------------------------------


def test_words_are_ranges_lists_or_settings() -> None:
    axes, fixed = read_words(RECIPE, [*OVER, "train.batch_tokens=2048", "model.num_layers=2..6:step=2"])
    assert fixed == ["train.batch_tokens=2048"]
    lr, hidden, layers = axes
    assert (lr.low, lr.high, lr.log, lr.integer) == (0.005, 0.08, True, False)
    assert hidden.choices == (384, 480, 576) and hidden.own == 480
    assert layers.integer and layers.points(3) == [4, 2, 6]
    assert lr.points(3) == pytest.approx([lr.own, 0.005, 0.02, 0.08])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("optim.matrix_lrr=1..2", "did you mean"),
        ("optim.matrix_lr=0.04..0.01", "LOW..HIGH"),
        ("optim.matrix_lr=0..0.01:log", "above 0"),
        ("optim.matrix_lr=a..b", "LOW..HIGH"),
        ("model.mlp_hidden=480,0", "greater than or equal to 1"),
        ("quant.qat=export,int3", "unknown grid"),
        ("optim.matrix_lr=0.02", "nothing to vary"),
        ("model.dim=1.." + "9" * 400, "LOW..HIGH"),
        ("optim.matrix_lr=-1e308..1e308", "LOW..HIGH"),
        ("optim.matrix_lr=0..inf", "LOW..HIGH"),
        ("optim.matrix_lr=0..1:step=nan", "LOW..HIGH"),
        ("optim.matrix_lr=0..1:step=inf", "LOW..HIGH"),
        ("optim.matrix_lr=0..1:step=1e-320", "next to 0"),
        ("optim.matrix_lr=0..1:step=0", "next to 0"),
        ("optim.matrix_lr=0..1:step=2", "at most HIGH - LOW"),
        ("model.mlp_hidden=384..480:step=0.5", "whole"),
        ("model.mlp_hidden=384.5..480", "whole"),
    ],
)
def test_a_wrong_range_is_refused_before_any_run(tmp_path: Path, word: str, said: str) -> None:
    with pytest.raises(GolfError, match=said):
        plan_sweep(RECIPE, [word], out=tmp_path / "s")
    assert not (tmp_path / "s").exists()


# -- what a trial is judged on -------------------------------------------------------------------------------------


def test_the_split_is_part_of_the_training_text_and_not_trained_on(tmp_path: Path) -> None:
    text = prose()
    documents = [text[i : i + 1200] for i in range(0, len(text), 1200)]
    documents += [documents[3]]  # a copy must not be trained on either
    (tmp_path / "text.txt").write_text("\x1e\n".join(documents) + "\n")
    section = load_recipe("pocket", [*TINY, f"data.train={tmp_path}/text.txt"]).data
    whole_folder = tmp_path / "cache"
    made = Dataset.open(tuning_data(section, whole_folder))
    assert tuning_data(section, whole_folder) == made.root  # found again
    assert made.val_text is not None and made.val_bytes is not None
    held = made.val_text.read_text().removesuffix("\n").split("\x1e\n")
    trained = made.tokenizer.decode(np.concatenate(made.train_tokens())).decode()
    assert held and all(document in documents for document in held)
    assert not any(document in trained for document in held)
    assert made.val_bytes == sum(map(len, held))
    reported = [p for p in whole_folder.iterdir() if not p.name.startswith("tuning")]
    real_val = next(p for p in reported if (p / "val.txt").is_file()) / "val.txt"
    assert not set(held) & set(real_val.read_text().removesuffix("\n").split("\x1e\n"))


def test_text_of_one_document_gives_its_end() -> None:
    shared = os.environ.get("PARAMGOLF_SHARED")
    if not shared:
        pytest.skip("PARAMGOLF_SHARED is not set: no tokenizer")
    tokenizer = Tokenizer.load(next(Path(shared, "tokenizers").glob("*1024*.model")))
    tokens = np.concatenate([[tokenizer.bos_id], tokenizer.encode(prose())]).astype(np.uint16)
    held, kept = hold_back(tokens, tokenizer, 10_000)
    assert len(held) + len(kept) == len(tokens) + 1  # a start of its own
    assert (tokens[-len(held) + 1 :] == held[1:]).all()


# -- the search ----------------------------------------------------------------------------------------------------


def test_a_sweep_finds_the_best_and_goes_on(tmp_path: Path) -> None:
    first = standin_sweep(tmp_path / "s", trials=8, workers=2)
    assert len(first["trials"]) == 8
    again = standin_sweep(tmp_path / "s", trials=14, workers=2)
    numbers = [row["number"] for row in again["trials"]]
    assert len(numbers) == 14 and len(set(numbers)) == 14
    best = again["best"]
    assert best["value"] <= first["best"]["value"]
    assert best["value"] == min(row["value"] for row in again["trials"] if row["value"] is not None)
    assert set(again["importance"]) == {"optim.matrix_lr", "model.mlp_hidden"}
    recipe = load_recipe(str(tmp_path / "s" / "best.toml"))
    assert recipe.optim.matrix_lr == best["params"]["optim.matrix_lr"]
    assert recipe.budget.steps == 20 and recipe.budget.seconds == 0
    assert "trial" in sweep_text(again) and "importance" in sweep_text(again)
    with pytest.raises(GolfError, match="differs in over"):
        standin_sweep(tmp_path / "s", "optim.matrix_lr=0.01..0.02")


def test_limits_on_bytes(tmp_path: Path) -> None:
    result = standin_sweep(tmp_path / "s", "model.mlp_hidden=384,432,480,576", sampler="grid", max_bytes=450_000)
    assert len(result["trials"]) == 4  # the whole grid
    assert result["best"]["params"] == {"model.mlp_hidden": 432}
    assert [r["params"]["model.mlp_hidden"] for r in result["trials"] if not r["feasible"]] == [480, 576]


def test_greedy_keeps_the_best_of_each_key(tmp_path: Path) -> None:
    words = ["model.mlp_hidden=384,576", "optim.matrix_lr=0.01,0.02"]
    result = standin_sweep(tmp_path / "s", *words, greedy=True, trials=30)
    assert result["best"]["params"] == {"model.mlp_hidden": 480, "optim.matrix_lr": 0.02}  # 480 is the recipe's own
    assert len(result["trials"]) == 3 + 2  # 0.016 (the recipe's own) was tried with the first key
    assert len(standin_sweep(tmp_path / "s", *words, greedy=True, trials=30)["trials"]) == 5  # nothing is repeated


def test_a_hopeless_trial_is_stopped_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_STANDIN_SECONDS", "1.2")
    result = standin_sweep(tmp_path / "s", "optim.matrix_lr=0.02,0.021,0.022,0.023,2", sampler="grid")
    pruned = [row for row in result["trials"] if row["state"] == "pruned"]
    assert [row["params"]["optim.matrix_lr"] for row in pruned] == [2]
    assert all(row["why"] == "pruned" for row in pruned)


def test_trials_that_all_fail_end_the_sweep(tmp_path: Path) -> None:
    with pytest.raises(GolfError, match=r"4 trials failed and none ended well.*too small"):
        standin_sweep(tmp_path / "s", *OVER, "budget.bytes=500", trials=20)


# -- interruptions -------------------------------------------------------------------------------------------------

SCRIPT = """
import sys; from pathlib import Path
from tests.test_lab_sweep import standin_sweep
standin_sweep(Path(sys.argv[1]), trials=int(sys.argv[2]), workers=2, storage=sys.argv[3])
"""


def start(out: Path, trials: int, storage: str = "", seconds: float = 2.0) -> subprocess.Popen[bytes]:
    environment = one_thread() | {"LAB_STANDIN_SECONDS": str(seconds), "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    command = [sys.executable, "-c", SCRIPT, str(out), str(trials), storage]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)


def wait_for(folder: Path, pattern: str, count: int = 1) -> None:
    end = time.monotonic() + 60
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < end, f"no {pattern} in {folder}"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_sweep_loses_nothing(tmp_path: Path, number: int) -> None:
    out = tmp_path / "s"
    job = start(out, 5)
    wait_for(out, "trial-*/train.jsonl", 2)
    job.send_signal(number)
    _, error = job.communicate(timeout=60)
    assert job.returncode != 0, error
    if number == signal.SIGINT:
        assert not list(out.glob("trial-*/record.json")) and b"KeyboardInterrupt" in error
    else:
        time.sleep(2.5)  # what the dead process had started ends by itself
    result = standin_sweep(out, trials=5, workers=2)
    assert len(result["trials"]) == 5
    assert all(row["state"] in ("complete", "pruned") for row in result["trials"])


# -- storage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("nosuch://x/y", "--storage nosuch://x/y"),
        ("postgresql+psycopg://u:secret@127.0.0.1:1/x", "cannot be reached"),
        ("sqlite:////nowhere/at/all.db", "cannot be reached"),
    ],
)
def test_a_storage_that_is_gone_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], storage: str, said: str
) -> None:
    out = tmp_path / "s"
    answer = golf_here(capfd, "sweep", "pocket", "--over", OVER[0], "--storage", storage, "--out", out)
    line = error_line(answer)
    assert said in line and "secret" not in line


def test_a_damaged_journal_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study.journal").write_text('{"op_code": 0, "worker_id"\nxx\n{"op_code": 99}\n')
    line = error_line(golf_here(capfd, "sweep", "pocket", "--over", OVER[0], "--out", tmp_path))
    assert "damaged" in line
    folder = error_line(golf_here(capfd, "sweep", "pocket", "--over", OVER[0], "--storage", tmp_path))
    assert "is a folder" in folder
    assert shown("postgresql://me:pw@host/x") == "postgresql://me:***@host/x"


def test_a_locked_database_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    url = f"sqlite:///{tmp_path}/study.db?timeout=0.2"
    standin_sweep(tmp_path / "s", trials=1, storage=url)
    with contextlib.closing(sqlite3.connect(tmp_path / "study.db", isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        line = error_line(golf_here(capfd, "sweep", RECIPE, "--over", OVER[0], "--storage", url, "--out", tmp_path))
    assert "cannot be reached" in line and "locked" in line


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[str]:
    """A real server on a free port of the loopback interface."""
    pytest.importorskip("psycopg")
    if not shutil.which("initdb") or not shutil.which("postgres"):
        pytest.skip("no PostgreSQL server is installed")
    home = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip())
    user: dict[str, Any] = {"user": "postgres"} if os.getuid() == 0 else {}
    try:
        if user:
            shutil.chown(home, "postgres")
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": home, **user}
        made = subprocess.run(["initdb", "-D", home / "db", "-U", "golf", "-A", "trust", "-N"], check=False, **quiet)
        if made.returncode:
            pytest.skip("initdb does not work here")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = ["postgres", "-D", str(home / "db"), "-p", str(port), "-k", str(home), "-h", "127.0.0.1", "-F"]
        server = subprocess.Popen(command, **quiet)
        try:
            for _ in range(100):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield f"postgresql+psycopg://golf@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)  # its fast shutdown
            server.wait(30)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def test_two_machines_share_a_study_on_postgresql(tmp_path: Path, postgres: str) -> None:
    jobs = [start(tmp_path / f"machine{i}", 9, postgres, 0.1) for i in range(2)]
    errors = [job.communicate(timeout=120)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], errors
    runs = [len(list((tmp_path / f"machine{i}").glob("trial-*/record.json"))) for i in range(2)]
    assert min(runs) >= 1  # both took part
    result = standin_sweep(tmp_path / "machine0", trials=9, storage=postgres)
    assert 9 <= len(result["trials"]) <= 12  # each machine may have had one more under way
    assert len({row["run"] for row in result["trials"]}) == len(result["trials"])


# -- components off ------------------------------------------------------------------------------------------------


def test_ablation_says_what_a_component_is_worth(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"seeds": 4, "out": tmp_path / "a", "steps": 20, "on": "validation", "program": PROGRAM}
    result = ablate(RECIPE, [], own=["optim.matrix_lr=0.04"], only=["averaging"], workers=2, **settings)
    rows = {row["variant"]: row for row in result["rows"]}
    assert list(rows) == ["as it is", "no averaging", "optim.matrix_lr=0.04"]
    assert rows["no averaging"]["worse_by"] == pytest.approx(0.01, abs=0.0005)
    assert rows["optim.matrix_lr=0.04"]["worse_by"] > 0.3
    assert "no averaging" in ablate_text(result)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("record.json")}
    assert len(before) == 12
    ablate(RECIPE, [], own=["optim.matrix_lr=0.04"], only=["averaging"], **settings)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("record.json")} == before
    with pytest.raises(GolfError, match="holds a run of another recipe"):
        ablate(RECIPE, ["model.mlp_hidden=481"], own=[], only=["averaging"], **settings)
    with pytest.raises(GolfError, match="no such component"):
        ablate(RECIPE, [], own=[], only=["bigram"], **settings)
    with pytest.raises(GolfError, match="changes nothing"):
        ablate(RECIPE, [], own=["optim.matrix_lr=0.016"], only=[], **settings)


def test_a_real_trial_end_to_end(tmp_path: Path) -> None:
    text = prose()
    documents = [text[i : i + 1200] for i in range(0, len(text), 1200)]
    (tmp_path / "text.txt").write_text("\x1e\n".join(documents) + "\n")
    words = [w for w in TINY if "budget" not in w] + ["model.num_layers=2", f"data.train={tmp_path}/text.txt"]
    environment = one_thread() | {"PARAMGOLF_CACHE": str(tmp_path / "cache")}
    answer = golf(
        "sweep", "pocket", "--over", "optim.matrix_lr=0.01,0.02", *words, "--steps", "3", "--trials", "1",
        "--out", tmp_path / "s", "--json", env=environment,
    )  # fmt: skip
    assert answer.code == 0, answer.err
    result = json.loads(answer.out)
    assert result["best"], answer.err
    record = json.loads((tmp_path / "s" / "trial-0000" / "record.json").read_text())
    assert result["best"]["value"] == record["val_bpb"]
    assert record["data"]["split"] == "held back from the training text"
    assert record["steps"] == 3 and record["bytes_from"] == "documents"
    assert not (tmp_path / "s" / "trial-0000" / "checkpoints").exists()
