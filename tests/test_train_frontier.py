"""Training with every component of the later records on: the loop switch, compiling, resuming, several processes."""

from __future__ import annotations

import functools
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from paramgolf.data.dataset import Dataset
from paramgolf.data.loader import Loader
from paramgolf.data.sources import SEPARATOR
from paramgolf.errors import GolfError
from paramgolf.model.documents import BOS_ID
from paramgolf.model.gpt import GPT
from paramgolf.optim.schedule import decay_mul, loop_passes
from paramgolf.pack.packer import load_model, pack_model
from paramgolf.recipe.sections import ScheduleSection
from paramgolf.runner.run import check
from paramgolf.train.callbacks import Callback
from paramgolf.train.modes import ModeSwitch, check_documents
from paramgolf.train.signals import Interrupted
from tests.run_common import losses
from tests.test_train_resume import At
from tests.train_common import QUANT, VOCAB, make_dataset, run_child, same, spawn_ranks, tiny, train, weights

EVERYTHING: dict[str, Any] = {
    "data": {"order": "packed"},
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


# What excludes something of the above takes its place.
OTHER_NAMES = ["lanes", "parallel"]
OTHERS: list[dict[str, Any]] = [
    {},
    {
        "data": {"order": "coprime"},
        "model": {
            "lanes_from": -1, "parallel_from": 2,
            "parts": {
                "bigram_hash": {"buckets": 31, "dim": 4}, "smear_gate": {}, "value_embed": {"dim": 6}, "xsa": {},
                "attn_gate": {"source": "query"},
            },
        },
        "optim": {"matrix": "normuon"},
        "average": {"kind": "swa", "every": 2, "start_lr_mul": 0.9},
    },
]  # fmt: skip


class Orders(Callback):
    """How many layers ran in each step."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_step(self, info: Any, fraction: float, model: Any) -> None:
        self.seen.append(len(model.order.layers))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Of many short documents, so that rows hold the ends of some."""
    made = make_dataset(tmp_path_factory.mktemp("data"), SEPARATOR.decode())
    assert int((made.train_tokens()[0] == BOS_ID).sum()) > 200
    return made


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


@pytest.mark.parametrize("changes", OTHERS, ids=OTHER_NAMES)
def test_resumed_in_the_middle_is_the_same(dataset: Dataset, tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = tiny(**with_(**changes))
    straight = train(recipe, dataset, tmp_path / "straight")
    with pytest.raises(Interrupted):
        train(recipe, dataset, tmp_path / "run", callbacks=[At(5, signal.SIGTERM)])
    resumed = train(recipe, dataset, tmp_path / "run", resume=True)
    assert resumed.result.resumed_from == 6
    assert same(weights(resumed), weights(straight))


def test_resumed_in_the_phase_after_training_is_the_same(dataset: Dataset, tmp_path: Path) -> None:
    """That phase goes by the modes at the end of training: packed rows cut at the last length, quantisation on. Clipped
    grids show it: rounding what is rounded already moves their weights again."""
    clipped = EVERYTHING["quant"] | {"grids": {"int6": {"bits": 6, "clip": "sdclip", "clip_value": 2.0}}}
    recipe = tiny(**with_(quant=clipped))
    straight = train(recipe, dataset, tmp_path / "straight")
    assert straight.result.post_qat is not None and straight.result.post_qat["steps"] > 1
    with pytest.raises(Interrupted, match="in post-training QAT"):
        train(recipe, dataset, tmp_path / "run", callbacks=[At(9, signal.SIGTERM)])
    assert same(weights(train(recipe, dataset, tmp_path / "run", resume=True)), weights(straight))


@pytest.mark.parametrize("changes", OTHERS, ids=OTHER_NAMES)
def test_two_processes_equal_one(dataset: Dataset, tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = tiny(**with_(**changes))
    train(recipe, dataset, tmp_path / "one")
    assert spawn_ranks(2, run_child, recipe, dataset.root, tmp_path / "two", {"callbacks": []}) == [0, 0]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
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


def test_documents_that_begin_with_another_token_are_refused() -> None:
    masked = {"model": {"document_mask": True}}
    for changes, words in (
        (masked, r"model\.document_mask=true .* begins them with 2"),
        (masked | {"data": {"order": "packed"}}, r"data\.order=packed"),
        ({"model": {"parts": {"smear_gate2": {}}}}, r"smear_gate2: .* set its bos_id=2"),
    ):
        check_documents(tiny(**changes), 1)
        with pytest.raises(GolfError, match=words):
            check_documents(tiny(**changes), 2)
    check_documents(tiny(model={"parts": {"smear_gate2": {"bos_id": 2}}}), 2)
    check_documents(tiny(), 2)


def test_positions_are_those_of_the_last_stage_however_long_the_windows_of_a_score(
    dataset: Dataset, tmp_path: Path
) -> None:
    stages = [{"at": 0.5, "seq_len": 64}]
    recipe = tiny(model={"rope_ref_len": 16}, stages=stages, budget={"steps": 2, "bytes": 0}, quant=QUANT)
    trained = train(recipe, dataset, tmp_path / "run").model
    pack_model(trained.state_dict(), recipe, b"", tmp_path / "model.golf", VOCAB)
    read = load_model(tmp_path / "model.golf").model
    assert read.context_len == trained.context_len == 64


def test_a_stage_longer_than_a_step_is_refused_before_data_is_read() -> None:
    for order in ("packed", "shuffled"):
        recipe = tiny(data={"order": order}, model={"document_mask": True}, stages=[{"at": 0.9, "seq_len": 512}])
        with pytest.raises(GolfError, match=r"256 tokens is no whole number of rows of 512.*512 fits"):
            check(recipe)


def test_a_stage_longer_than_the_packed_rows_gets_longer_ones(dataset: Dataset) -> None:
    """A row is an eighth of a step, but never less than `seq_len`, so that a stage has the context it asks for."""
    tokens = dataset.train_tokens()
    loader = Loader(tokens, seq_len=32, batch_tokens=256, order="packed")
    assert loader.next_batch()[0].shape == (8, 32)
    loader.set_shape(128, 256)
    assert loader.next_batch()[0].shape == (2, 128)


def test_packed_rows_train_like_the_documents_they_hold(dataset: Dataset, tmp_path: Path) -> None:
    """Eight rows of a step in one pass or one by one, resumed or not: the same weights but for rounding."""
    recipe = tiny(**with_(train={"micro_batch_tokens": 4096}))
    straight = train(recipe, dataset, tmp_path / "straight")
    assert straight.result.tokens == 4 * 256 + 6 * 128
    single = train(tiny(**with_(train={"micro_batch_tokens": 32})), dataset, tmp_path / "single")
    one, eight = losses(tmp_path / "straight"), losses(tmp_path / "single")
    assert max(abs(a - b) for a, b in zip(one, eight, strict=True)) < 1e-4
    for name, tensor in weights(straight).items():  # Adam makes whole steps, of 1e-3 and more, of gradients near zero
        torch.testing.assert_close(tensor, weights(single)[name], rtol=0, atol=4e-3)
    with pytest.raises(Interrupted):
        train(recipe, dataset, tmp_path / "run", callbacks=[At(5, signal.SIGTERM)])
    assert same(weights(train(recipe, dataset, tmp_path / "run", resume=True)), weights(straight))


def test_the_decay_tapers() -> None:
    section = ScheduleSection(decay_taper_at=0.7, decay_taper_to=0.5)
    found = [decay_mul(section, f) for f in (0.0, 0.7, 0.85, 1.0)]
    assert found == pytest.approx([1.0, 1.0, 0.75, 0.5])
    assert decay_mul(ScheduleSection(), 1.0) == 1.0
