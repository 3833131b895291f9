"""The loop: exact warm-up, budgets, stages, QAT, averaging, post-training QAT, divergence, logs."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from paramgolf.data.dataset import Dataset
from paramgolf.errors import GolfError
from paramgolf.model.gpt import GPT
from paramgolf.quant.grid import Grid
from paramgolf.recipe.sections import GridSection
from paramgolf.runner.phases import Phases
from paramgolf.train.assemble import hold_out
from paramgolf.train.callbacks import JsonLines, PlainProgress, StepInfo, last_strict
from paramgolf.train.clock import Clock
from paramgolf.train.qat import GridPoint, QatSwitch, weight_grids
from paramgolf.train.runtime import restore_rng, rng_state, seed_all
from paramgolf.train.step import micro_sizes
from tests.train_common import QUANT, VOCAB, Log, make_dataset, same, tiny, train, weights


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("data"))


def rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]


def test_training_learns_and_is_reproducible(dataset: Dataset, tmp_path: Path) -> None:
    recipe = tiny(budget={"steps": 30})
    first = train(recipe, dataset, tmp_path / "a")
    second = train(recipe, dataset, tmp_path / "b")
    losses = [row["loss"] for row in rows(tmp_path / "a")]
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.15)
    assert losses[-1] < losses[0] - 1.0
    assert losses == [row["loss"] for row in rows(tmp_path / "b")]
    assert same(weights(first), weights(second))
    assert not first.model.training
    assert first.result.steps == 30 and first.result.tokens == 30 * 256 and first.result.stop_reason == "steps"
    other = train(tiny(budget={"steps": 30}, train={"seed": 2}), dataset, tmp_path / "c")
    assert not same(weights(first), weights(other)), "the seed drives initialisation and order"


def test_warm_up_changes_nothing(dataset: Dataset, tmp_path: Path) -> None:
    """Weights, optimizer state, loader and random states are restored: the same run bit for bit, over all stages."""
    shared = {
        "stages": [{"at": 0.5, "seq_len": 16, "batch_tokens": 128}],
        "quant": QUANT | {"qat": "export", "qat_start": 0.4},
        "average": {"kind": "ema", "decay": 0.8},
    }
    outputs, randoms = [], []
    for steps in (0, 5):
        out = tmp_path / str(steps)
        output = train(tiny(schedule={"warmup_steps": steps}, **shared), dataset, out)
        assert output.result.warmup_steps == steps
        outputs.append((weights(output), [(row["loss"], row["grad_norm"]) for row in rows(out)]))
        randoms.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert outputs[0][1] == outputs[1][1]
    assert same(outputs[0][0], outputs[1][0])
    assert randoms[0] == randoms[1]


def test_micro_batches_of_uneven_size_give_the_same_gradient(dataset: Dataset, tmp_path: Path) -> None:
    whole = train(tiny(budget={"steps": 3}), dataset, tmp_path / "whole")
    split = train(tiny(budget={"steps": 3}, train={"micro_batch_tokens": 96}), dataset, tmp_path / "split")
    for one, other in zip(rows(tmp_path / "whole"), rows(tmp_path / "split"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    assert whole.result.tokens == split.result.tokens


@pytest.mark.parametrize(
    ("count", "most", "sizes"), [(7, 3, [3, 2, 2]), (9, 4, [3, 3, 3]), (8, 8, [8]), (0, 3, []), (7, 0, [1] * 7)]
)
def test_rows_are_split_evenly(count: int, most: int, sizes: list[int]) -> None:
    assert micro_sizes(count, most) == sizes


def test_stages_and_qat_switch_when_they_should(dataset: Dataset, tmp_path: Path) -> None:
    recipe = tiny(
        budget={"steps": 8},
        schedule={"warmdown_iters": 0},
        stages=[{"at": 0.5, "seq_len": 16, "batch_tokens": 128, "lr_mul": 0.25}],
        quant=QUANT | {"qat": "int6", "qat_start": 0.75},
    )
    seen: list[bool] = []

    class Watch(Log):
        def on_step(self, info: StepInfo, fraction: float, model: GPT) -> None:
            seen.append(model.blocks[0].mlp.fc.grid is not None)

    output = train(recipe, dataset, tmp_path / "run", callbacks=[Watch()])
    log = rows(tmp_path / "run")
    assert np.diff([0] + [row["tokens"] for row in log]).tolist() == [256] * 4 + [128] * 4
    assert [row["lr_mul"] for row in log] == [1.0] * 4 + [0.25] * 4
    assert seen == [False] * 6 + [True] * 2
    assert output.model.blocks[0].mlp.fc.grid is None, "handed over without fake quantisation"


def test_a_token_budget_is_never_exceeded(dataset: Dataset, tmp_path: Path) -> None:
    result = train(tiny(budget={"steps": 0, "tokens": 1000}), dataset, tmp_path / "run").result
    assert (result.tokens, result.stop_reason) == (768, "tokens")


@pytest.mark.parametrize("clock", ["strict", "challenge"])
def test_a_time_budget_holds_with_its_reserve(dataset: Dataset, tmp_path: Path, clock: str) -> None:
    budget = {"steps": 0, "seconds": 3.0, "clock": clock}
    watch = Clock(1.0 if clock == "strict" else 50.0)  # as if starting up had taken so long
    recipe = tiny(budget=budget, schedule={"warmdown_frac": 0.5})
    output = train(recipe, dataset, tmp_path / "run", reserve_seconds=0.7, clock=watch)
    spent = watch.spent("strict" if clock == "strict" else "challenge")
    assert output.result.stop_reason == "seconds" and output.result.steps > 3
    assert 1.5 < spent <= 2.35, "ends before 3.0 - 0.7, and not much before"
    assert rows(tmp_path / "run")[-1]["lr_mul"] < 0.3, "the final decay ends where training does"


def test_an_exhausted_budget_still_takes_one_step(dataset: Dataset, tmp_path: Path) -> None:
    result = train(tiny(budget={"steps": 0, "seconds": 1.0}), dataset, tmp_path / "run", clock=Clock(99.0)).result
    assert (result.steps, result.stop_reason) == (1, "seconds")


def test_divergence_names_the_step_and_keeps_the_last_good_checkpoint(dataset: Dataset, tmp_path: Path) -> None:
    recipe = tiny(optim={"embed_lr": 1e30, "scalar_lr": 1e30}, train={"checkpoint_every_steps": 1})
    with pytest.raises(GolfError, match=r"diverged at step \d+: .*lower optim"):
        train(recipe, dataset, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("*.safetensors"):
        from paramgolf.train.checkpoint import read

        assert all(torch.isfinite(t).all() for t in read(path).part("model").values())


def test_a_used_folder_is_not_overwritten(dataset: Dataset, tmp_path: Path) -> None:
    train(tiny(budget={"steps": 1}), dataset, tmp_path / "run")
    with pytest.raises(GolfError, match="--resume"):
        train(tiny(budget={"steps": 1}), dataset, tmp_path / "run")


def test_the_average_is_what_the_optimizers_average_says(dataset: Dataset, tmp_path: Path) -> None:
    raw = train(tiny(), dataset, tmp_path / "raw")
    kept = train(tiny(average={"kind": "ema", "decay": 0.9}), dataset, tmp_path / "ema")
    assert kept.result.average["used"]
    assert not same(weights(raw), weights(kept))
    assert [r["loss"] for r in rows(tmp_path / "raw")] == [r["loss"] for r in rows(tmp_path / "ema")]


@pytest.mark.parametrize(("decay", "better"), [(0.999, False), (0.5, None)])
def test_the_average_is_selected_on_held_out_training_text(
    dataset: Dataset, tmp_path: Path, decay: float, better: bool | None
) -> None:
    log = Log()
    recipe = tiny(budget={"steps": 12}, average={"kind": "ema", "decay": decay, "select": "train"})
    average = train(recipe, dataset, tmp_path / "run", callbacks=[log]).result.average
    assert average["used"] == (average["average_loss"] < average["raw_loss"])
    assert better is None or average["used"] == better, "an average of mostly the initial weights is worse"
    assert any("held-out training text" in note for note in log.notes)


def test_held_out_tokens_are_not_trained_on() -> None:
    stream = np.arange(50_000, dtype=np.uint16)
    kept, held = hold_out([stream[:100], stream[100:]], 64)
    assert held is not None and len(held) == 500
    assert np.array_equal(np.concatenate([*kept, held]), stream)
    assert hold_out([stream[:100]], 64)[1] is None, "too little to spare any"


def test_the_post_training_phase_moves_towards_the_grid(dataset: Dataset, tmp_path: Path) -> None:
    quant = QUANT | {"post_qat": "export", "post_qat_frac": 0.4, "post_qat_lr": 1e-3}
    output = train(tiny(budget={"steps": 10}, quant=quant), dataset, tmp_path / "run")
    assert output.result.post_qat["steps"] == 4 and output.result.steps == 10
    log = rows(tmp_path / "run")
    assert [row["step"] for row in log] == list(range(1, 11))
    assert [row["tokens"] for row in log] == [256 * n for n in range(1, 11)], "the data goes on"
    assert [row["lr_mul"] for row in log[6:]] == [1.0] * 4


def test_grid_point_gives_quantised_weights_and_their_gradient_then_the_originals() -> None:
    recipe = tiny(quant=QUANT)
    model = GPT(recipe.model, 300)
    model.init_weights(3)
    grids = weight_grids(model, recipe, "export")
    assert "blocks.0.mlp.fc.weight" in grids and "blocks.0.attn.q_gain" not in grids
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.randint(0, 300, (2, 16))
    with GridPoint(model, grids)():
        for name, grid in grids.items():
            expected = grid.dequantize(*grid.quantize(before[name]))
            assert torch.allclose(model.get_parameter(name), expected, rtol=0, atol=1e-7)
        model(ids, ids).backward()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    twin = GPT(recipe.model, 300)
    twin.load_state_dict({n: g.fake_quantize(before[n]) if (g := grids.get(n)) else t for n, t in before.items()})
    twin(ids, ids).backward()
    for (name, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_export_qat_uses_each_tensors_own_grid() -> None:
    quant = {
        "grids": {"int6": {"bits": 6}, "int8": {"bits": 8}},
        "rules": [
            {"match": "@control", "store": "float32"},
            {"match": "*.c_k.weight", "store": "int8"},
            {"match": "*.proj.weight", "store": "float16"},
            {"store": "int6"},
        ],
        "qat": "export",
    }
    recipe = tiny(quant=quant)
    model = GPT(recipe.model, 300)
    switch = QatSwitch(model, recipe)
    attention = model.blocks[1].attn
    assert attention.c_k.grid == Grid(GridSection(bits=8)) and attention.c_q.grid == Grid(GridSection(bits=6))
    assert attention.proj.grid is None
    assert attention.c_q.grid is model.blocks[0].attn.c_q.grid, "one object, so compiled blocks share their graph"
    switch.set(False)
    assert attention.c_k.grid is None
    assert switch.states == [True]


def test_random_states_survive_json() -> None:
    seed_all(5)
    np.random.standard_normal(1)  # leaves a cached second value
    tensors, numbers = rng_state()
    expected = (random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.rand(2).tolist())
    seed_all(6)
    restore_rng(tensors, json.loads(json.dumps(numbers)))
    found = (random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.rand(2).tolist())
    assert found == expected


def test_the_log_is_cut_where_a_run_resumes(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    log = JsonLines(path, every=2)
    for step in range(1, 8):
        log.on_step(StepInfo(step, 1.0, 1.0, 0.9, step, 0.1 * step, strict=9.0 + step), 0.5, torch.nn.Identity())
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 4, 6]
    path.write_text(path.read_text() + '{"step": 8, "lo')  # torn by a kill
    again = JsonLines(path, every=2, resumed_step=5)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 4]
    assert last_strict(path) == 15.0  # killed now, the time of step 6 is still spent
    again.on_step(StepInfo(6, 2.0, 1.0, 0.9, 6, 0.6), 0.5, torch.nn.Identity())
    again.close()
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(1, 1.0), (2, 1.0), (4, 1.0), (6, 2.0)]


def test_a_terminal_that_is_gone_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    broken = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stderr", broken)
    PlainProgress(every=1).note("lost")
    Phases().note("lost")
    with contextlib.suppress(BrokenPipeError):
        broken.close()


def test_plain_progress_says_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    progress = PlainProgress(every=2)
    for step in (1, 2, 3, 4):
        progress.on_step(StepInfo(step, 2.5, 1.0, 0.9, 1000 * step, 1.0 * step), step / 10, torch.nn.Identity())
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and len(lines) == 3
    assert lines[-1] == "step 4  loss 2.5000  40 %  1,000 tok/s  0:06 left"


def test_the_size_is_forecast_when_half_of_the_budget_is_gone(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[float] = []

    def forecast(_: torch.nn.Module) -> str:
        asked.append(fraction)
        return "1,000 bytes"

    progress, model = PlainProgress(every=1, forecast=forecast), torch.nn.Module()
    for step, fraction in enumerate([0.1, 0.49, 0.5, 0.51, 0.9], start=1):
        progress.on_step(StepInfo(step, 2.0, 1.0, 0.9, step, float(step)), fraction, model)
    assert asked == [0.5]
    lines = capsys.readouterr().err.splitlines()
    assert [line.endswith("1,000 bytes") for line in lines] == [False, False, True, True, True]
