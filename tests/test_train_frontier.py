"""Training with every component of the later records on: the loop switch, compiling, resuming, several processes."""

from __future__ import annotations

import functools
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from paramgolf.data.dataset import Dataset
from paramgolf.errors import GolfError
from paramgolf.model.gpt import GPT
from paramgolf.optim.schedule import decay_mul, loop_passes
from paramgolf.recipe.sections import ScheduleSection
from paramgolf.runner.run import check
from paramgolf.train.callbacks import Callback
from paramgolf.train.modes import ModeSwitch
from paramgolf.train.signals import Interrupted
from tests.test_train_resume import At
from tests.train_common import QUANT, make_dataset, run_child, same, spawn_ranks, tiny, train, weights

EVERYTHING: dict[str, Any] = {
    "model": {
        "num_layers": 4, "activation": "leaky_relu2", "rope_dims": 8, "ln_scale": True, "qk_gain": 5.0,
        "skip_gates": True, "lanes_from": 3, "loop_layers": [1, 2], "loop_extra": 2, "embed_dim": 24,
        "document_mask": True, "init": "orthogonal_zero",
        "parts": {
            "bigram_hash": {"buckets": 31, "dim": 4}, "smear_gate2": {}, "value_embed": {"dim": 6}, "xsa": {},
            "attn_gate": {"factor": 1.0, "scale": 0.5},
        },
    },
    "optim": {
        "matrix": "muoneq_r", "grad_clip": 0.3, "weight_decay": 0.1, "embed_weight_decay": 0.1,
        "exchange": "reduce_scatter",
    },
    "schedule": {
        "warmdown_frac": 0.85, "min_lr": 0.1, "loop_at": [0.3, 0.6], "decay_taper_at": 0.5, "decay_taper_to": 0.5,
    },
    "stages": [{"at": 0.4, "seq_len": 16, "batch_tokens": 128}],
    "quant": QUANT | {"qat": "export", "qat_start": 0.7, "post_qat": "export", "post_qat_frac": 0.2},
    "average": {"kind": "ema", "decay": 0.8},
    "budget": {"steps": 10},
}  # fmt: skip


class Orders(Callback):
    """How many layers ran in each step."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_step(self, info: Any, fraction: float, model: Any) -> None:
        self.seen.append(len(model.order.layers))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("data"))


def with_(**changes: dict[str, Any]) -> dict[str, Any]:
    return EVERYTHING | {key: EVERYTHING.get(key, {}) | value for key, value in changes.items()}


def test_nothing_compiles_at_the_loop_switch_and_warm_up_leaves_no_trace(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(GPT, "compile_regions", functools.partialmethod(GPT.compile_regions, backend="eager"))
    orders = Orders()
    recipe = tiny(**with_(train={"compile": "on"}, schedule={"warmup_steps": 3}))
    compiled = train(recipe, dataset, tmp_path / "compiled", callbacks=[orders])
    assert compiled.result.compiled["enabled"] and compiled.result.recompiles == 0
    assert orders.seen == [4, 4, 4, 6, 6, 8, 8, 8, 8, 8]
    assert len(compiled.model.order.layers) == 8, "scored with every pass"
    plain = train(tiny(**EVERYTHING), dataset, tmp_path / "plain")
    assert same(weights(compiled), weights(plain)), "neither compiling nor warming up changes anything"


def test_resumed_in_the_middle_is_the_same(dataset: Dataset, tmp_path: Path) -> None:
    recipe = tiny(**EVERYTHING)
    straight = train(recipe, dataset, tmp_path / "straight")
    with pytest.raises(Interrupted):
        train(recipe, dataset, tmp_path / "run", callbacks=[At(5, signal.SIGTERM)])
    resumed = train(recipe, dataset, tmp_path / "run", resume=True)
    assert resumed.result.resumed_from == 6
    assert same(weights(resumed), weights(straight))


def test_two_processes_equal_one(dataset: Dataset, tmp_path: Path) -> None:
    recipe = tiny(**EVERYTHING)
    train(recipe, dataset, tmp_path / "one")
    assert spawn_ranks(2, run_child, recipe, dataset.root, tmp_path / "two", {"callbacks": []}) == [0, 0]
    one, two = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "train.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 10
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-4


def test_loops_begin_together_or_one_by_one() -> None:
    together, each = ScheduleSection(loop_at=(0.35,)), ScheduleSection(loop_at=(0.5, 0.65))
    assert [loop_passes(together, 2, f) for f in (0.0, 0.34, 0.35, 1.0)] == [0, 0, 2, 2]
    assert [loop_passes(each, 2, f) for f in (0.0, 0.49, 0.5, 0.65, 1.0)] == [0, 0, 1, 2, 2]


@pytest.mark.parametrize("at", [[], [0.2, 0.3, 0.4], [0.6, 0.5]])
def test_a_loop_table_that_does_not_fit_is_refused(at: list[float]) -> None:
    recipe = tiny(**with_(schedule={"loop_at": at}))
    with pytest.raises(GolfError, match=r"schedule\.loop_at"):
        ModeSwitch(GPT(recipe.model, 384), recipe)


def test_packed_rows_need_document_masks() -> None:
    recipe = tiny(data={"order": "packed"})
    with pytest.raises(GolfError, match=r"model\.document_mask=true"):
        check(recipe)  # before any data is read
    with pytest.raises(GolfError, match=r"model\.document_mask=true"):
        ModeSwitch(GPT(recipe.model, 384), recipe)


def test_packed_rows_train_like_the_documents_they_hold(dataset: Dataset, tmp_path: Path) -> None:
    """Eight rows of a step in one pass or one by one, resumed or not: the same weights but for rounding."""
    packed = {"order": "packed"}
    recipe = tiny(**with_(data=packed, train={"micro_batch_tokens": 4096}))
    straight = train(recipe, dataset, tmp_path / "straight")
    assert straight.result.tokens == 4 * 256 + 6 * 128
    single = train(tiny(**with_(data=packed, train={"micro_batch_tokens": 32})), dataset, tmp_path / "single")
    for name, tensor in weights(straight).items():
        torch.testing.assert_close(tensor, weights(single)[name], rtol=0, atol=2e-3)
    with pytest.raises(Interrupted):
        train(recipe, dataset, tmp_path / "run", callbacks=[At(5, signal.SIGTERM)])
    assert same(weights(train(recipe, dataset, tmp_path / "run", resume=True)), weights(straight))


def test_the_decay_tapers() -> None:
    section = ScheduleSection(decay_taper_at=0.7, decay_taper_to=0.5)
    found = [decay_mul(section, f) for f in (0.0, 0.7, 0.85, 1.0)]
    assert found == pytest.approx([1.0, 1.0, 0.75, 0.5])
    assert decay_mul(ScheduleSection(), 1.0) == 1.0
