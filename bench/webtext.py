"""The shared web text for benches: one training piece, the validation set, and a split of training text for tuning."""

from __future__ import annotations

import lzma
from pathlib import Path

from bench.runs import shared
from paramgolf.files import atomic_write

TRAIN = "webtext_train_00.txt.xz"
HELD = "webtext_train_03.txt.xz"  # another piece of the same mix: its first documents are the tuning split
SEPARATOR = b"\x1e\n"
SPLIT_BYTES = 500_000


def train_text() -> str:
    return str(shared("data", TRAIN))


def val_text() -> str:
    """The validation set: scored to report, never to choose."""
    return str(shared("data", "webtext_val.txt.xz"))


def tuning_split(folder: Path) -> str:
    """Half a megabyte of training text that `train_text` does not hold, as a file in `folder`."""
    path = folder / "webtext_tuning_split.txt"
    if not path.exists():
        with lzma.open(shared("data", HELD)) as stream:
            head = stream.read(SPLIT_BYTES)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(path, head[: head.rindex(SEPARATOR)] + b"\n")
    return str(path)
