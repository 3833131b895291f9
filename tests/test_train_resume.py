"""Killed and resumed without loss: SIGKILL at random moments, SIGTERM in order, damaged and missing checkpoints."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from paramgolf.data.dataset import Dataset
from paramgolf.recipe.sections import Recipe
from paramgolf.train.callbacks import Callback
from paramgolf.train.checkpoint import Store
from paramgolf.train.clock import Clock
from paramgolf.train.signals import Interrupted
from tests.train_common import QUANT, Log, context, last_weights, make_dataset, run_child, same, tiny, train, weights

# Everything that has state: stages, QAT switch, average, Adam and Muon moments, post-training phase.
BUSY: dict[str, Any] = {
    "budget": {"steps": 40},
    "train": {"checkpoint_every_steps": 3},
    "stages": [{"at": 0.4, "seq_len": 16, "batch_tokens": 128}],
    "quant": QUANT | {"qat": "export", "qat_start": 0.6, "post_qat": "export", "post_qat_frac": 0.1},
    "average": {"kind": "ema", "decay": 0.8},
    "optim": {"matrix": "normuon", "grad_clip": 0.5},
}


class Slow(Callback):
    """Makes a step take long enough to be interrupted in the middle of a run."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_step(self, info: Any, fraction: float, model: Any) -> None:
        time.sleep(self.seconds)


class At(Callback):
    """Sends this process a signal at a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step(self, info: Any, fraction: float, model: Any) -> None:
        if info.step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("data"))


def start(recipe: Recipe, dataset: Dataset, out: Path, *, callbacks: list[Callback], resume: bool) -> Any:
    options = {"callbacks": callbacks, "resume": resume}
    process = context().Process(target=run_child, args=(recipe, dataset.root, out, options))
    process.start()
    return process


def test_killed_at_random_moments_and_resumed_is_byte_identical(dataset: Dataset, tmp_path: Path) -> None:
    recipe = tiny(**BUSY)
    straight = weights(train(recipe, dataset, tmp_path / "straight"))
    out, moments = tmp_path / "killed", random.Random(int(time.time()))
    kills = 0
    for attempt in range(12):
        process = start(recipe, dataset, out, callbacks=[Slow(0.02)], resume=attempt > 0)
        # the first kill waits for a checkpoint, so that at least one resume has something to lose
        while attempt == 0 and process.is_alive() and not list(out.glob("checkpoints/*.safetensors")):
            time.sleep(0.01)
        process.join(moments.uniform(0.0, 0.8) if kills < 3 else None)
        if not process.is_alive():
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0 and kills >= 1
    assert same(straight, last_weights(out))
    steps = [json.loads(line)["step"] for line in (out / "train.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41)), "the log has every step once"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_ends_with_its_code(
    dataset: Dataset, tmp_path: Path, number: signal.Signals
) -> None:
    recipe = tiny(**BUSY | {"train": {"checkpoint_every_steps": 0}})
    out = tmp_path / "run"
    process = start(recipe, dataset, out, callbacks=[At(7, number)], resume=False)
    process.join(60)
    assert process.exitcode == 128 + number
    message = (out / "error-0.txt").read_text()
    assert number.name in message and "--resume" in message
    stopped = Store(out / "checkpoints").newest(print)
    assert stopped is not None and stopped.step == 8, "the step that was running is finished and kept"
    resumed = train(recipe, dataset, out, resume=True)
    assert resumed.result.resumed_from == 8
    assert same(weights(train(recipe, dataset, tmp_path / "straight")), weights(resumed))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_resumed_run_is_exact_in_both_types(dataset: Dataset, tmp_path: Path, dtype: str) -> None:
    """In bfloat16 the fused kernels run where the CPU has them."""
    recipe = tiny(budget={"steps": 8}, train={"dtype": dtype}, average={"kind": "swa", "every": 2, "start_lr_mul": 0.9})
    with pytest.raises(Interrupted):
        train(recipe, dataset, tmp_path / "run", callbacks=[At(5, signal.SIGTERM)])
    resumed = train(recipe, dataset, tmp_path / "run", resume=True)
    straight = train(recipe, dataset, tmp_path / "straight")
    assert resumed.result.resumed_from == 6 and resumed.result.dtype == dtype
    assert same(weights(resumed), weights(straight))


def test_a_damaged_newest_checkpoint_falls_back_and_says_so(dataset: Dataset, tmp_path: Path) -> None:
    recipe, out = tiny(**BUSY), tmp_path / "run"
    process = start(recipe, dataset, out, callbacks=[At(14, signal.SIGKILL)], resume=False)
    process.join(60)
    newest = Store(out / "checkpoints").paths()[0]
    assert newest.name == "step-000000012.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    log = Log()
    resumed = train(recipe, dataset, out, resume=True, callbacks=[log])
    assert resumed.result.resumed_from == 9
    assert any("step-000000012" in note and "one before" in note for note in log.notes)
    assert same(weights(train(recipe, dataset, tmp_path / "straight")), weights(resumed))


def test_nothing_to_resume_starts_afresh_and_says_so(dataset: Dataset, tmp_path: Path) -> None:
    log = Log()
    result = train(tiny(budget={"steps": 2}), dataset, tmp_path / "run", resume=True, callbacks=[log]).result
    assert result.resumed_from == 0 and result.steps == 2
    assert any("afresh" in note for note in log.notes)


def test_a_finished_training_is_only_loaded(dataset: Dataset, tmp_path: Path) -> None:
    recipe = tiny(**BUSY | {"budget": {"steps": 10}})
    first = train(recipe, dataset, tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run" / "checkpoints").iterdir()}
    again = train(recipe, dataset, tmp_path / "run", resume=True)
    assert same(weights(first), weights(again)) and not again.model.training
    assert again.result.stop_reason == "steps" and again.result.post_qat == first.result.post_qat
    assert again.result.train_seconds == first.result.train_seconds
    assert before == {p: p.read_bytes() for p in (tmp_path / "run" / "checkpoints").iterdir()}


def test_resuming_counts_the_time_already_spent(dataset: Dataset, tmp_path: Path) -> None:
    recipe = tiny(budget={"steps": 0, "seconds": 100.0}, train={"checkpoint_every_steps": 1})
    out = tmp_path / "run"
    process = start(recipe, dataset, out, callbacks=[Slow(0.1), At(3, signal.SIGKILL)], resume=False)
    process.join(60)
    clock = Clock(99.5)  # this process has lived long: with what the first one spent, the budget is used up
    result = train(recipe, dataset, out, resume=True, clock=clock).result
    assert result.stop_reason == "seconds" and result.steps <= 30
    assert clock.strict() > 99.5 + 0.2


def test_a_checkpoint_of_another_model_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    train(tiny(budget={"steps": 1}), dataset, tmp_path / "run")
    with pytest.raises(Exception, match="another model"):
        train(tiny(budget={"steps": 2}, model={"mlp_hidden": 96}), dataset, tmp_path / "run", resume=True)


def test_checkpoints_by_time(dataset: Dataset, tmp_path: Path) -> None:
    recipe = tiny(budget={"steps": 6}, train={"checkpoint_every": 0.05})
    saved: list[int] = []

    class Watch(Slow):
        def on_step(self, info: Any, fraction: float, model: Any) -> None:
            super().on_step(info, fraction, model)
            saved.append(len(list((tmp_path / "run" / "checkpoints").glob("step-*"))))

    train(recipe, dataset, tmp_path / "run", callbacks=[Watch(0.06)])
    assert saved[0] == 0 and saved[-1] == 2
