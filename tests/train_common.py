"""What the tests of training share: a tiny recipe, a tiny dataset, and processes that do not import torch again."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paramgolf.data.dataset import Dataset, prepare
from paramgolf.dist import Dist, init
from paramgolf.errors import GolfError
from paramgolf.recipe.load import from_table
from paramgolf.recipe.sections import DataSection, Recipe
from paramgolf.train.callbacks import Callback
from paramgolf.train.checkpoint import Store
from paramgolf.train.clock import Clock
from paramgolf.train.session import TrainOutput, train_recipe

QUANT = {
    "grids": {"int6": {"bits": 6}},
    "rules": [
        {"match": "@control", "store": "float32"},
        {"ndim": 2, "store": "int6"},
        {"store": "float32"},
    ],
}
VOCAB = 384
TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {"dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "mlp_hidden": 64},
    "optim": {"matrix_lr": 0.02, "scalar_lr": 0.02, "embed_lr": 0.05},
    "schedule": {"warmup_steps": 0, "warmdown_iters": 4, "momentum_warmup_steps": 6},
    "train": {
        "batch_tokens": 256, "seq_len": 32, "log_every": 1, "compile": "off", "dtype": "float32",
        "checkpoint_every": 0.0, "threads": 1, "device": "cpu",
    },
    "budget": {"steps": 8},
}  # fmt: skip


def tiny(**changes: dict[str, Any]) -> Recipe:
    """The tiny recipe with whole sections updated: `tiny(train={"seq_len": 16})`."""
    table = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}
    for section, values in changes.items():
        table[section] = {**table.get(section, {}), **values} if isinstance(values, dict) else values
    return from_table(table)


def make_dataset(folder: Path, between: str = "\n\n") -> Dataset:
    """A prepared dataset of some 60 kB of made-up, learnable text: one document, or 300 with SEPARATOR `between`."""
    generator = np.random.default_rng(7)
    words = [bytes(generator.integers(97, 123, int(n)).astype(np.uint8)).decode() for n in generator.integers(2, 7, 60)]
    picks = generator.zipf(1.4, 15_000) % len(words)
    text = folder / "text.txt"
    text.write_text(between.join(" ".join(words[i] for i in row) for row in picks.reshape(-1, 50)))
    return prepare(
        DataSection(train=str(text), vocab_size=VOCAB, val_max_bytes=2000), cache=folder / "cache", workers=1
    )


def train(recipe: Recipe, dataset: Dataset, out: Path, **options: Any) -> TrainOutput:
    """Train silently in this process."""
    options.setdefault("callbacks", [])
    return train_recipe(recipe, dataset, out, options.pop("clock", Clock(0.0)), options.pop("dist", Dist()), **options)


def weights(output: TrainOutput) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in output.model.state_dict().items()}


def last_weights(out: Path) -> dict[str, torch.Tensor]:
    """The weights of the newest checkpoint of a run folder."""
    snapshot = Store(out / "checkpoints").newest(print)
    assert snapshot is not None
    return snapshot.part("model")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal names and equal bytes."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Log(Callback):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.losses: list[float] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def on_step(self, info: Any, fraction: float, model: Any) -> None:
        self.losses.append(info.loss)


def context() -> Any:
    """Processes forked from a server that has imported torch once."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["tests.train_common"])
    return made


def run_child(recipe: Recipe, root: Path, out: Path, options: dict[str, Any]) -> None:
    """A child process: train; a GolfError is its exit code and leaves its message in out/error.txt."""
    torch.set_num_threads(1)
    rank = os.environ.get("RANK", "0")
    try:
        dist = init("cpu")
        output = train(recipe, Dataset.open(root), out, dist=dist, **options)
        result = dataclasses.asdict(output.result)
        (out / f"result-{rank}.txt").write_text(repr(result))
        dist.close()
    except GolfError as error:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"error-{rank}.txt").write_text(str(error))
        os._exit(error.exit_code)


def spawn_ranks(world: int, work: Callable[..., None], *arguments: Any, timeout: float = 60.0) -> list[int]:
    """`work(*arguments)` in `world` processes with torchrun's environment; their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world):
        environment = {
            "RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        process = context().Process(target=with_environment, args=(environment, work, arguments))
        process.start()
        processes.append(process)
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def with_environment(environment: dict[str, Any], work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update({key: str(value) for key, value in environment.items()})
    work(*arguments)
