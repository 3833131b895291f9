"""F_loader: the reference's data order, world 1 to 8, and the bytes of its shard files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from paramgolf.data.loader import Loader
from paramgolf.data.shards import open_shard, write_shard
from paramgolf.files import sha256_file
from tests.parity.harness import Check, exact


def check(path: Path, z: np.lib.npyio.NpzFile) -> list[Check]:
    """x, y: (rank, micro-batch, rows, T). A micro-batch is one accumulation step of 8 / world."""
    checks: list[Check] = []
    global_tokens, seq_len = int(z["global_tokens"]), int(z["seq_len"])
    worlds = sorted(int(name[5:-2]) for name in z.files if name.startswith("world") and name.endswith("/x"))
    names = sorted(
        (n for n in z.files if n.startswith("shard") and not n.endswith("_sha256")), key=lambda n: int(n[5:])
    )
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{name}.bin") for name in names]
        for name, file in zip(names, files, strict=True):
            write_shard(file, z[name])
            same = float(sha256_file(file) != str(z[f"{name}_sha256"]))
            checks.append(Check(f"{name} file", same, 0.0))
        shards = [open_shard(file) for file in files]
        for world in worlds:
            for kind in ("x", "y"):
                ours = np.stack(
                    [
                        _micro_batches(shards, z[f"world{world}/x"], rank, world, global_tokens, seq_len)[kind]
                        for rank in range(world)
                    ]
                )
                checks.append(exact(f"world {world} {kind}", ours, z[f"world{world}/{kind}"]))
        del shards
    return checks


def _micro_batches(
    shards: list[np.memmap], like: np.ndarray, rank: int, world: int, global_tokens: int, seq_len: int
) -> dict[str, np.ndarray]:
    _, count, rows, _ = like.shape
    loader = Loader(shards, seq_len=seq_len, batch_tokens=global_tokens, rank=rank, world=world, order="sequential")
    x: list[np.ndarray] = []
    y: list[np.ndarray] = []
    while len(x) < count:
        inputs, targets = loader.next_batch()
        x += list(inputs.numpy().reshape(-1, rows, seq_len))
        y += list(targets.numpy().reshape(-1, rows, seq_len))
    loader.close()
    return {"x": np.stack(x[:count]), "y": np.stack(y[:count])}
