"""Bits per byte of the whole validation stream in windows that score every target once: score/scorer.py's numbers for
`score.windows = "exact"`, one lane and no time limit."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paramgolf.data.tokenizer import Tokenizer
from paramgolf.dist import Dist
from paramgolf.model.gpt import GPT
from paramgolf.model.loss import chunked_nll
from paramgolf.recipe.sections import Recipe
from paramgolf.score.scorer import batch_rows


@dataclass(frozen=True)
class Result:
    """`val_loss` in nats a target, `val_bpb` in bits a byte."""

    val_loss: float
    val_bpb: float
    scored_tokens: int
    scored_bytes: int
    seconds: float
    sliding: bool


@torch.no_grad()
def measure(model: GPT, tokens: np.ndarray, tokenizer: Tokenizer, recipe: Recipe, dist: Dist, stride: int) -> Result:
    """The score of `tokens`, the same on every rank; `stride` 0 = windows side by side."""
    began = time.monotonic()
    seq_len = recipe.score.seq_len or recipe.train.seq_len
    model.context_len = max(recipe.train.seq_len, seq_len)  # positions as in whole windows, however short the stream is
    losses, targets = [np.zeros(0, np.float32)], [np.zeros(0, np.int64)]
    for hidden, target in scored_positions(model, tokens, seq_len, stride or seq_len, recipe.score.batch_tokens, dist):
        truth = torch.from_numpy(tokens[target].astype(np.int64)).to(dist.device)
        nll = chunked_nll(hidden, model.head_weight(), truth, model.section.logit_softcap)
        losses.append(nll.cpu().numpy())
        targets.append(target)
    nats, places = np.concatenate(losses), np.concatenate(targets)
    size = float(tokenizer.token_bytes.count(tokens[places - 1], tokens[places]).sum())
    sums = torch.tensor([nats.sum(dtype=np.float64), len(nats), size], dtype=torch.float64, device=dist.device)
    loss, count, size = dist.all_reduce_sum(sums).tolist()
    if not math.isfinite(loss) or count != len(tokens) - 1:
        raise RuntimeError(f"{count:.0f} of {len(tokens) - 1} targets have a loss of {loss} nats in all")
    bpb, seconds = loss / math.log(2) / size, time.monotonic() - began
    return Result(loss / count, bpb, int(count), int(size), seconds, 0 < stride < seq_len)


def scored_positions(
    model: GPT, tokens: np.ndarray, seq_len: int, stride: int, batch_tokens: int, dist: Dist
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """(hidden states (n, D), indices of their targets (n,)) of this rank's windows, batch by batch.

    A window scores its last `stride` targets, the first one all of its own, the last one what is left.
    """
    targets = len(tokens) - 1
    windows, width = 1 + max(0, -((seq_len - targets) // stride)), min(seq_len, targets)
    rows, _ = batch_rows(windows, dist.world, width, batch_tokens)
    offsets, last = np.arange(width), windows * (dist.rank + 1) // dist.world
    for low in range(windows * dist.rank // dist.world, last, rows):
        start = np.arange(low, min(low + rows, last))[:, None] * stride
        index = np.zeros((rows, width), np.int64)  # of one shape, so that a compiled model keeps its graph
        index[: len(start)] = np.minimum(start + offsets, targets)
        scored = (offsets >= np.where(start > 0, seq_len - stride, 0)) & (start + offsets < targets)
        ids = torch.from_numpy(tokens[index].astype(np.int64)).to(dist.device)
        places = torch.from_numpy(np.flatnonzero(scored)).to(dist.device)
        yield model.hidden(ids).flatten(0, 1)[places], (start + offsets + 1)[scored]
