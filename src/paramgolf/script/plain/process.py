"""Plain forms of what the package does with more care for the machine, the user or other packages than a script needs;
`facts.SUBSTITUTES` puts them in the place of the careful ones."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import torch.distributed as torch_dist

from paramgolf.data import compact
from paramgolf.data.shards import HEADER_BYTES
from paramgolf.data.token_bytes import TokenBytes
from paramgolf.dist import Dist
from paramgolf.model.attention import AttentionChoice
from paramgolf.model.backends import ScaledDotProduct
from paramgolf.model.gpt import GPT
from paramgolf.recipe.sections import Recipe

BLANK = "\u2581"  # SentencePiece writes a blank as this character


class GivenTokenizer:
    """What scoring and the artifact need of a tokenizer that somebody else made, as SentencePiece tells it."""

    def __init__(self, model: bytes) -> None:
        self.model = model
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = pieces.vocab_size()
        base, space, boundary = np.zeros(self.vocab_size, np.int16), *np.zeros((2, self.vocab_size), bool)
        for i in range(self.vocab_size):
            boundary[i] = pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_unused(i)
            text = pieces.id_to_piece(i)
            space[i] = text.startswith(BLANK) and not boundary[i]
            if not boundary[i]:
                base[i] = 1 if pieces.is_byte(i) else len(text.removeprefix(BLANK).replace(BLANK, " ").encode())
        self.token_bytes = TokenBytes(base, space, boundary)

    @classmethod
    def load(cls, path: str) -> GivenTokenizer:
        return cls(Path(path).read_bytes())

    def compact(self) -> bytes:
        """The bytes that the artifact carries."""
        return compact.plain(self.model)


def open_shard(path: Path, vocab_size: int | None = None) -> np.memmap:
    """The token ids of an official shard; its header's third word says how many there are."""
    return np.memmap(path, "<u2", "r", offset=HEADER_BYTES, shape=(int(np.fromfile(path, "<i4", 3)[2]),))


class Stopwatch:
    """The clocks of one process: since its start without phases outside the budget, and since the first step."""

    def __init__(self) -> None:
        self.zero = time.monotonic()
        self.first = 0.0

    def strict(self) -> float:
        return time.monotonic() - self.zero

    def spent(self, kind: str) -> float:
        return time.monotonic() - (self.first if kind == "challenge" else self.zero)

    def start_challenge(self) -> None:
        self.first = time.monotonic()

    @contextmanager
    def phase(self, name: str, *, outside: bool = False) -> Iterator[None]:
        begun = time.monotonic()
        yield
        if outside:
            self.zero += time.monotonic() - begun


class OneMode:
    """The modes of a model that never changes."""

    def __init__(self, model: GPT, recipe: Recipe) -> None:
        self.states = [0]

    def wanted(self, fraction: float) -> int:
        return 0

    def set(self, mode: int) -> bool:
        return False


def join(device: str) -> Dist:
    """The process group that torchrun names."""
    world, rank, local_rank = (
        int(os.environ.get(n, d)) for n, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    where = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(where)
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        torch_dist.init_process_group(backend, rank=rank, world_size=world, timeout=timedelta(hours=2))
    return Dist(rank, world, where)


def raise_together(dist: Dist, error: BaseException | None) -> None:
    if error is not None or dist.world > 1:
        raise error or RuntimeError("another rank failed")


def default_threads() -> int:
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, torch.get_num_threads() // (1 if "OMP_NUM_THREADS" in os.environ else ranks))


def choose(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, masked: bool = False) -> AttentionChoice:
    return AttentionChoice("sdpa", "", ScaledDotProduct())


def read_config(config_class: type, table: dict[str, Any], where: str) -> Any:
    """A part's settings; they were checked when the script was made."""
    return config_class(**table)


def unchanged(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Where a recipe has no corrections in its artifact."""
    return dict(arrays)
