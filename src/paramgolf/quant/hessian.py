"""What a trained model's layers read: the second moments of their inputs on training text, for quantisers to weigh by.

Suffixes: B rows of a batch, T time, N = B x T, C inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paramgolf.data.loader import TokenStream
from paramgolf.dist import Dist
from paramgolf.errors import GolfError
from paramgolf.model.gpt import GPT
from paramgolf.model.layers import Linear

BATCH_TOKENS = 16_384  # of one forward
# Multiply-adds a second of a machine, on the safe side, and how many each parameter takes a token: forward and moments.
_RATE = {"cpu": 6e10, "cuda": 1e13}
_WORK = 3.0
COLUMN_SECONDS = 0.8e-6  # seconds a parameter to round column by column on one slow core


def training_rows(
    shards: Sequence[np.ndarray], *, seq_len: int, tokens: int, batch_tokens: int = BATCH_TOKENS, phase: float = 0.0,
    among: int = 0,
) -> Iterator[Tensor]:  # fmt: skip
    """Batches (B, seq_len + 1) int64 of evenly spaced windows of the training text, at least one row of `tokens`.

    `phase` in [0, 1) moves all windows by that part of the distance between two of them, so that another phase gives
    other text (where there is enough). With `among` the windows are some of those that so many tokens would give, so
    that another phase is other text than theirs. Raises GolfError without any text.
    """
    stream = TokenStream(shards)
    if not stream.total:
        raise GolfError("there is no training text to calibrate on; give data.train some")
    count = max(1, tokens // seq_len)
    places = max(count, among // seq_len)
    starts = ((np.arange(count) * places // count + phase) * stream.total / places).astype(np.int64)
    batch = max(1, batch_tokens // seq_len)
    for first in range(0, count, batch):
        rows = [stream.read(int(start), seq_len + 1) for start in starts[first : first + batch]]
        yield torch.from_numpy(np.stack(rows).astype(np.int64))


@torch.no_grad()
def collect(
    model: GPT, shards: Sequence[np.ndarray], *, seq_len: int, tokens: int, dist: Dist,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The mean of x x^T over about `tokens` tokens of training text, for every linear weight; all ranks call it alike.

    Keys are state names, values (C, C) float32 on the model's device. The output layer's input is the final normalised
    stream; where the embedding is tied, that is the embedding's entry. A layer that runs several times counts every
    run. Ranks share the windows, and all get the same sums. The model is left as it was, in evaluation mode with its
    plain kernels: the fused ones do not pass through the modules.
    """
    model.eval()
    model.use_plain()
    sums: dict[str, Tensor] = {}
    seen: dict[str, int] = {}

    def add(name: str, x: Tensor) -> None:
        x_NC = x.detach().reshape(-1, x.shape[-1]).float()
        if name not in sums:
            sums[name] = torch.zeros(x_NC.shape[1], x_NC.shape[1], device=x_NC.device)
        sums[name].addmm_(x_NC.t(), x_NC)
        seen[name] = seen.get(name, 0) + len(x_NC)

    batches = list(training_rows(shards, seq_len=seq_len, tokens=tokens))
    device = model.tok_emb.weight.device
    head = "tok_emb.weight" if model.lm_head is None else "lm_head.weight"
    with model.eager(), _watching(model, add):
        for index, rows in enumerate(batches):
            # Every rank goes through every batch, so that all know the same layers; its share may be empty.
            mine = rows[dist.rank :: dist.world, :-1]
            if len(mine):
                add(head, model.hidden(mine.to(device)))
            if progress is not None:
                progress(index + 1, len(batches))
    return _reduced(model, head, sums, seen, dist)


def _reduced(
    model: GPT, head: str, sums: dict[str, Tensor], seen: dict[str, int], dist: Dist
) -> dict[str, Tensor]:  # fmt: skip
    """The means over all ranks, in the order of the modules; a rank without any row adds zeros."""
    widths = {f"{name}.weight": module.weight.shape[1] for name, module in _linears(model)}
    widths[head] = model.head_weight().shape[1]
    means = {}
    for name, width in widths.items():
        total = dist.all_sum(float(seen.get(name, 0)))
        if total:
            here = sums.pop(name, None)
            zeros = torch.zeros(width, width, device=model.tok_emb.weight.device)
            means[name] = dist.all_reduce_sum(zeros if here is None else here) / total
    return means


def _linears(model: GPT) -> list[tuple[str, Linear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]


@contextmanager
def _watching(model: GPT, add: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, every linear layer's input is passed to `add` with the state name of its weight."""

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, inputs: add(f"{name}.weight", inputs[0])

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in _linears(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def seconds_for(params: int, tokens: float, device: torch.device) -> float:
    """An upper guess of what calibrating on one rank and rounding by columns take: what training leaves of its time."""
    return 0.5 + params * (_WORK * tokens / _RATE.get(device.type, _RATE["cpu"]) + COLUMN_SECONDS)


@torch.no_grad()
def training_loss(
    model: GPT, shards: Sequence[np.ndarray], *, seq_len: int, tokens: int, phase: float = 0.5, among: int = 0
) -> float:  # fmt: skip
    """Mean loss in nats on training windows between those that `collect` reads of `among` tokens."""
    device = model.tok_emb.weight.device
    total, count = 0.0, 0
    with model.eager():
        for rows in training_rows(shards, seq_len=seq_len, tokens=tokens, phase=phase, among=among):
            rows = rows.to(device)
            total += float(model(rows[:, :-1], rows[:, 1:], reduction="sum"))
            count += rows.shape[0] * (rows.shape[1] - 1)
    return total / count
