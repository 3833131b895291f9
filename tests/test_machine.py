"""The history of a machine's runs, what a slow run says, `golf doctor --bench`, and the optional trackers."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import pytest
from torch import nn

from paramgolf.errors import GolfError
from paramgolf.recipe.load import load_recipe
from paramgolf.runner.machine import SpeedWatch, _file, benches, history, machine_key, workload
from paramgolf.runner.machine_bench import MEASURES, bench, bench_text
from paramgolf.train.callbacks import StepInfo
from paramgolf.train.trackers import Tracker
from tests.run_common import TINY, error_line, golf_here, prose


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAMGOLF_CACHE", str(tmp_path / "cache"))


def steps(watch: SpeedWatch, milliseconds: float, count: int = 60, first: int = 1) -> None:
    for i in range(count):
        elapsed = (i + 1) * milliseconds / 1e3
        watch.on_step(StepInfo(first + i, 3.0, 1.0, 0.9, 100 * i, elapsed, strict=elapsed + 7), 0.1, nn.Linear(1, 1))


def ran(milliseconds: float, *overrides: str) -> tuple[SpeedWatch, list[str]]:
    said: list[str] = []
    watch = SpeedWatch(load_recipe("pocket", list(overrides)), 1, said.append)
    steps(watch, milliseconds)
    return watch, said


def test_a_run_slower_than_its_history_says_so_at_once() -> None:
    for milliseconds in (100.0, 102.0, 98.0):
        watch, said = ran(milliseconds)
        assert said == []
        assert watch.conclude(101.0, 60)["slow"] is False
    near, said = ran(108.0)
    assert said == [] and not near.slow
    slow, said = ran(125.0)
    assert len(said) == 1 and "25 % more than the 100.0 ms of its last 3 runs" in said[0]
    facts = slow.conclude(125.0, 60)
    assert facts["slow"] and facts["usual_ms"] == pytest.approx(100.0) and facts["runs_before"] == 3
    assert facts["machine"] == machine_key()


def test_said_within_the_first_steps() -> None:
    ran(100.0)[0].conclude(100.0, 60)
    said: list[str] = []
    watch = SpeedWatch(load_recipe("pocket"), 1, said.append)
    steps(watch, 400.0, count=12)
    assert said  # of a run of hundreds of steps


def test_only_runs_of_the_same_kind_count() -> None:
    ran(100.0, "model.dim=384")[0].conclude(100.0, 60)
    assert ran(200.0)[1] == []
    other_seed = load_recipe("pocket", ["train.seed=5", "train.log_every=1"])
    assert workload(other_seed, 2) == workload(load_recipe("pocket"), 2) != workload(other_seed, 1)


def test_the_history_is_what_plans_read_and_survives_damage() -> None:
    watch, _ = ran(100.0)
    watch.conclude(103.0, 60)
    with _file(machine_key()).open("ab") as stream:
        stream.write(b'{"workload": 3}\n[1]\n\xff\xfe not a line\n{"workload": "' + b"x" * 50)
    threads = watch._threads
    (speed,) = history(load_recipe("pocket"), threads=threads)
    assert (speed.early_ms, speed.step_ms, speed.steps) == (pytest.approx(100.0), 103.0, 60)
    assert speed.setup_seconds == pytest.approx(7.0)


def test_too_short_and_resumed_runs_leave_no_history() -> None:
    said: list[str] = []
    short = SpeedWatch(load_recipe("pocket"), 1, said.append)
    steps(short, 100.0, count=5)
    assert short.conclude(100.0, 5) == {}
    resumed = SpeedWatch(load_recipe("pocket"), 1, said.append)
    steps(resumed, 100.0, first=500)
    assert resumed.conclude(100.0, 560)["runs_before"] == 0
    assert ran(100.0)[0].before == []


def test_bench_measures_and_compares_with_itself() -> None:
    first = bench(seconds=0.05, compiling=False)
    assert first["measured_before"] == 0 and not first["slow"]
    values = {name: row["now"] for name, row in first["measures"].items()}
    assert set(values) == set(MEASURES) and values["compile_seconds"] is None
    assert all(value > 0 for name, value in values.items() if name != "compile_seconds")
    assert "measured for the first time" in bench_text(first)
    lines = _file(machine_key())
    row = json.loads(lines.read_text())
    row["bench"]["memory_gbytes"] *= 100  # it once was a much faster machine
    lines.write_text(json.dumps(row) + "\n")
    second = bench(seconds=0.05, compiling=False)
    assert second["measures"]["memory_gbytes"]["slow"] and second["slow"]
    assert "slower than it was before" in bench_text(second)
    assert len(benches()) == 2


def test_a_run_records_its_speed_and_feeds_a_tracker(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(prose())
    module = tmp_path / "wandb.py"  # stands in for the service's client: the same calls, kept in a file
    module.write_text(
        textwrap.dedent(f"""
        import json, pathlib
        out = pathlib.Path({str(tmp_path / "sent.jsonl")!r})
        class Run:
            def log(self, numbers, step): out.open("a").write(json.dumps([step, numbers]) + "\\n")
            def finish(self): out.open("a").write("[\\"finished\\", {{}}]\\n")
        def init(project, name, dir, config):
            assert project == "paramgolf" and config["train"]["seed"] == 1337
            return Run()
    """)
    )
    sys.path.insert(0, str(tmp_path))
    try:
        words = [w for w in TINY if "budget.steps" not in w]
        answer = golf_here(
            capfd, "run", "pocket", "--data", tmp_path / "text.txt", "--out", tmp_path / "run", "--track", "wandb",
            *words, "budget.steps=420", "train.log_every=20", "model.num_layers=1", "train.batch_tokens=64",
            "--json",
        )  # fmt: skip
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("wandb", None)
    assert answer.code == 0, answer.err
    record = json.loads(answer.out)
    assert record["speed"]["early_ms"] > 0 and record["speed"]["slow"] is False
    sent = [json.loads(line) for line in (tmp_path / "sent.jsonl").read_text().splitlines()]
    log = [json.loads(line) for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    assert [step for step, _ in sent] == [*(row["step"] for row in log), "finished"]
    assert [numbers["loss"] for _, numbers in sent[:-1]] == [row["loss"] for row in log]


def test_a_tracker_that_fails_is_dropped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    (tmp_path / "trackio.py").write_text("def init(**k): raise OSError('no network\\nat all')\n")
    sys.path.insert(0, str(tmp_path))
    try:
        tracker = Tracker("trackio", tmp_path, {}, 1, said.append)
        for step in (1, 2):
            tracker.on_step(StepInfo(step, 3.0, 1.0, 0.9, 10, 0.1), 0.1, nn.Linear(1, 1))
        tracker.close()
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("trackio", None)
    assert said == ["note: trackio is left out from here on: no network"]
    with pytest.raises(GolfError, match="did you mean 'tensorboard'"):
        Tracker("tensorbord", tmp_path, {}, 1, said.append)
    refused = golf_here(capfd, "run", "pocket", "--track", "mlflow", "--out", tmp_path / "run")
    assert "no such tracker" in error_line(refused) and not (tmp_path / "run").exists()


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    said: list[str] = []
    tracker = Tracker("tensorboard", tmp_path, {}, 1, said.append)
    tracker.on_step(StepInfo(1, 3.0, 1.0, 0.9, 10, 0.1, grad_norm=1.0), 0.1, nn.Linear(1, 1))
    tracker.close()
    assert said == [] and list((tmp_path / "tensorboard").glob("events*"))
