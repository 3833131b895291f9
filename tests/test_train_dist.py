"""Several processes over gloo: the same losses as one, one decision for all, one message when a rank fails."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paramgolf.data.dataset import Dataset
from paramgolf.data.shards import write_shard
from paramgolf.dist import Dist
from paramgolf.errors import GolfError
from paramgolf.recipe.sections import Recipe
from paramgolf.train.callbacks import Callback
from paramgolf.train.checkpoint import Store
from paramgolf.train.session import train_recipe
from tests.train_common import QUANT, Clock, make_dataset, run_child, spawn_ranks, tiny, train

STEPS = 10


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("data"))


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "train.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
@pytest.mark.parametrize("world", [2, 3])
def test_losses_equal_one_process(dataset: Dataset, tmp_path: Path, world: int, order: str) -> None:
    """8 rows a step: over 3 ranks they are uneven, in every micro batch too."""
    recipe = tiny(
        data={"order": order}, budget={"steps": STEPS}, schedule={"warmup_steps": 2}, optim={"grad_clip": 1.0},
        train={"micro_batch_tokens": 64, "checkpoint_every_steps": 4}, average={"kind": "ema", "decay": 0.5},
    )  # fmt: skip
    train(recipe, dataset, tmp_path / "one")
    assert spawn_ranks(world, run_child, recipe, dataset.root, tmp_path / "many", {"callbacks": []}) == [0] * world
    single, several = losses(tmp_path / "one"), losses(tmp_path / "many")
    assert len(single) == len(several) == STEPS
    assert max(abs(a - b) for a, b in zip(single, several, strict=True)) < 1e-4
    alone = Store(tmp_path / "one" / "checkpoints").newest(print)
    together = Store(tmp_path / "many" / "checkpoints").newest(print)
    assert alone is not None and together is not None
    for name, tensor in alone.part("model").items():
        assert torch.allclose(tensor, together.part("model")[name], atol=2e-3), name


def test_a_run_of_two_is_resumed_by_one(dataset: Dataset, tmp_path: Path) -> None:
    recipe = tiny(budget={"steps": STEPS}, train={"checkpoint_every_steps": 4})
    options = {"callbacks": [At(6, signal.SIGTERM)]}
    assert spawn_ranks(2, run_child, recipe, dataset.root, tmp_path / "run", options) == [143, 143]
    result = train(recipe, dataset, tmp_path / "run", resume=True).result
    assert result.resumed_from == 7 and result.steps == STEPS
    train(recipe, dataset, tmp_path / "one")
    pairs = zip(losses(tmp_path / "run"), losses(tmp_path / "one"), strict=True)
    assert max(abs(a - b) for a, b in pairs) < 1e-4


class At(Callback):
    """Sends the main rank a signal at a step: the others must stop at the same one."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step(self, info: Any, fraction: float, model: Any) -> None:
        if info.step == self.step:
            os.kill(os.getpid(), self.number)


def test_a_time_budget_stops_all_ranks_at_the_same_step(dataset: Dataset, tmp_path: Path) -> None:
    recipe = tiny(
        budget={"steps": 0, "seconds": 2.0},
        schedule={"warmdown_frac": 0.5},
        quant=QUANT | {"post_qat": "export", "post_qat_frac": 0.1},
    )
    assert spawn_ranks(2, run_child, recipe, dataset.root, tmp_path / "run", {"callbacks": []}) == [0, 0]
    results = [ast.literal_eval((tmp_path / "run" / f"result-{rank}.txt").read_text()) for rank in range(2)]
    assert results[0]["steps"] == results[1]["steps"] > 2
    assert results[0]["stop_reason"] == results[1]["stop_reason"] == "seconds"


def failing_child(recipe: Recipe, roots: list[Path], out: Path) -> None:
    """Each rank reads a dataset of its own."""
    run_child(recipe, roots[int(os.environ["RANK"])], out, {"callbacks": []})


def test_one_ranks_failure_ends_all_with_its_message(dataset: Dataset, tmp_path: Path) -> None:
    """Rank 1 meets a token that the vocabulary does not have, some steps into the run."""
    poisoned = tmp_path / "poisoned"
    shutil.copytree(dataset.root, poisoned)
    tokens = np.array(dataset.train_tokens()[0])
    tokens[1400:1500] = 65_535
    write_shard(poisoned / dataset.train_shards[0].name, tokens)
    recipe = tiny(budget={"steps": 1000}, data={"order": "sequential"})
    out, roots = tmp_path / "run", [dataset.root, poisoned]
    assert spawn_ranks(2, failing_child, recipe, roots, out, timeout=30.0) == [2, 2]
    messages = [(out / f"error-{rank}.txt").read_text() for rank in range(2)]
    assert messages[0] == messages[1]
    assert messages[0].startswith("rank 1 failed: ") and "65535" in messages[0]
    assert len(losses(out)) >= 3


def test_a_single_process_reports_its_own_error_unchanged(dataset: Dataset, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(GolfError, match=r"^cannot write"):
        train_recipe(tiny(), dataset, blocker / "run", Clock(0.0), Dist(), callbacks=[])
