"""Bits per byte of a token stream under a model: standard and sliding windows, batched, over any number of ranks.

One number is promised: the total negative log-likelihood in bits over the bytes of the original text. Every target of
the plan is counted (see `windows`), a document's begin-of-document token costs loss and counts 0 bytes, and a score
is whole or is not returned.

The trunk runs on batches of one fixed shape, the last padded, so that a compiled model compiles once; only the
positions that count go through the vocabulary projection, which makes sliding windows affordable with a large
vocabulary.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from paramgolf.dist import Dist
from paramgolf.errors import CheckFailed, GolfError
from paramgolf.model.gpt import GPT
from paramgolf.model.loss import chunked_nll
from paramgolf.recipe.sections import NgramSection
from paramgolf.score.ngram import ngram_nll
from paramgolf.score.windows import Plan, lanes, plan


class CountsBytes(Protocol):
    """A tokenizer's table: the original bytes each target stands for (`data.token_bytes.TokenBytes`)."""

    def count(self, prev: np.ndarray, target: np.ndarray) -> np.ndarray: ...


class OneByteEach:
    """The table for those who only want the losses."""

    def count(self, prev: np.ndarray, target: np.ndarray) -> np.ndarray:
        return np.ones(np.shape(target), np.int64)


@dataclass(frozen=True)
class Score:
    """The result of one pass. `val_loss` in nats a target, `val_bpb` in bits a byte of original text."""

    val_loss: float
    val_bpb: float
    scored_tokens: int
    scored_bytes: int
    table_bytes: int  # what the tokenizer's byte table says; differs from scored_bytes if the tokenizer loses text
    bytes_from: str  # "documents" or "table" (shards without their documents)
    seq_len: int
    stride: int
    windows: str
    lanes: int
    forwards: int  # windows scored
    seconds: float
    ngram_loss: float | None = None  # nats a target with the n-gram cache, if there is one
    nll: np.ndarray | None = None  # (scored_tokens,) float32, in the order of the plan's targets; only if asked for

    @property
    def val_bpb_table(self) -> float | None:
        """Bits per byte if the tokenizer's byte table were right; None if it counts nothing."""
        return self.val_bpb * self.scored_bytes / self.table_bytes if self.table_bytes else None

    @property
    def val_bpb_ngram(self) -> float | None:
        """Bits per byte with the n-gram cache; None without one."""
        return None if self.ngram_loss is None else self.val_bpb * self.ngram_loss / self.val_loss

    @property
    def sliding(self) -> bool:
        return self.stride < self.seq_len

    def as_dict(self) -> dict[str, Any]:
        """The stable result keys; a sliding score has its own, beside the standard ones."""
        cached: dict[str, Any] = {}
        if self.ngram_loss is not None:
            cached = {"val_loss_ngram": self.ngram_loss, "val_bpb_ngram": self.val_bpb_ngram}
        if self.sliding:
            sliding = {"val_loss_sliding": self.val_loss, "val_bpb_sliding": self.val_bpb, "stride": self.stride}
            return sliding | cached
        return cached | {
            "val_loss": self.val_loss,
            "val_bpb": self.val_bpb,
            "scored_tokens": self.scored_tokens,
            "scored_bytes": self.scored_bytes,
            "table_bytes": self.table_bytes,
            "val_bpb_table": self.val_bpb_table,
            "bytes_from": self.bytes_from,
            "eval_seq_len": self.seq_len,
            "windows": self.windows,
            "lanes": self.lanes,
        }


def score(
    model: GPT,
    tokens: np.ndarray,
    *,
    token_bytes: CountsBytes,
    true_bytes: int | None = None,
    seq_len: int,
    stride: int = 0,
    batch_tokens: int = 65_536,
    dist: Dist | None = None,
    windows: str = "exact",
    lane_count: int = 1,
    lane_starts: Sequence[int] | None = None,
    bos_id: int = 1,
    limit_seconds: float = 0.0,
    keep_nll: bool = False,
    ngram: NgramSection | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Score the token stream `tokens` (1-D ids, begin-of-document tokens included).

    `stride` 0 means `seq_len`, the standard score. `true_bytes` is the size of the original documents (None: counted
    by the table and labelled so). The stream is cut into `lane_count` lanes at document starts, or just at
    `lane_starts`. `batch_tokens` is spread over the ranks of `dist` (rank, world, device,
    all_reduce_sum; None = one process on the model's device). `progress(done, total)` counts this rank's windows.
    Collective: every rank calls it and gets the same Score, except that `nll` (with `keep_nll`) holds this rank's
    contiguous part. With `ngram` the n-gram cache is scored too, on the same windows.
    Raises GolfError when nothing can be scored or `limit_seconds` (0 = none) is passed; CheckFailed when a loss is
    not finite.
    """
    began = time.monotonic()
    rank, world = (dist.rank, dist.world) if dist is not None else (0, 1)
    stride = stride or seq_len
    tokens = np.asarray(tokens)
    starts = lane_starts if lane_starts is not None else lanes(tokens, lane_count, bos_id) if lane_count > 1 else (0,)
    whole = plan(len(tokens), seq_len, stride, windows, lane_starts=starts)
    if not len(whole):
        raise GolfError(f"nothing to score: {len(tokens)} tokens hold no full window; use score.windows=exact")
    device = model.tok_emb.weight.device
    mine = whole.part(rank, world)
    deadline = began + limit_seconds if limit_seconds else math.inf
    batch = batch_rows(len(whole), world, min(seq_len, int(whole.length.max())), batch_tokens)
    pieces: list[np.ndarray] = []
    late = broken = False
    with evaluating(model, seq_len):
        for done, hidden, truth in window_batches(model, tokens, mine, batch):
            nll = chunked_nll(hidden, model.head_weight(), truth, model.section.logit_softcap).cpu().numpy()
            pieces.append(nll)
            if progress is not None:
                progress(done, len(mine))
            broken = not np.isfinite(nll).all()
            late = time.monotonic() > deadline
            if broken or late:
                break
    values = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    targets = mine.targets()[: len(values)]
    counted = float(token_bytes.count(tokens[targets - 1], tokens[targets]).sum())
    # One sum over ranks carries the outcome too, so that all of them fail together.
    totals = _sum_over_ranks([values.sum(dtype=np.float64), len(values), counted, late, broken], dist, device)
    _refuse_partial(totals, int(whole.counts.sum()), limit_seconds)
    loss_sum, count, table = float(totals[0]), int(totals[1]), int(totals[2])
    from_documents = true_bytes is not None and windows == "exact"
    size = _document_bytes(true_bytes, tokens, token_bytes) if from_documents else table
    if size <= 0:
        raise GolfError("nothing to score: the text has tokens but no bytes")
    cached = None
    if ngram is not None and ngram.levels:
        losses = np.zeros(len(tokens))
        losses[targets] = values
        losses = _sum_over_ranks(losses, dist, device)
        scored = whole.targets()
        cached = float(ngram_nll(tokens, losses[1:], ngram.levels, bos_id=bos_id, starts=starts)[scored - 1].sum())
    return Score(
        val_loss=loss_sum / count, val_bpb=loss_sum / math.log(2) / size, scored_tokens=count, scored_bytes=size,
        table_bytes=table, bytes_from="documents" if from_documents else "table", seq_len=seq_len, stride=stride,
        windows=windows, lanes=len(starts), forwards=len(whole), seconds=time.monotonic() - began,
        ngram_loss=None if cached is None else cached / count, nll=values if keep_nll else None,
    )  # fmt: skip


def _document_bytes(true_bytes: int | None, tokens: np.ndarray, table: CountsBytes) -> int:
    """Bytes of the documents that the targets stand for: a stream that does not begin with a begin-of-document token
    gives its first token away, so that token's bytes are not counted either."""
    given = int(table.count(np.array([0]), tokens[:1].astype(np.int64)).sum())
    return int(true_bytes or 0) - given


def _refuse_partial(totals: np.ndarray, expected: int, limit: float) -> None:
    _, count, _, late, broken = totals
    if broken:
        raise CheckFailed("the model gives a loss that is not a number: the weights are broken or the dtype overflows")
    if late:
        raise GolfError(
            f"scoring passed its limit of {limit:g} s (budget.eval_seconds) after {int(count):,} of {expected:,} "
            "targets; no score is given: raise the limit, use a larger score.stride or a shorter text"
        )
    if int(count) != expected:
        raise AssertionError(f"scored {int(count)} targets of {expected}: the plan is not covered")


def _sum_over_ranks(values: list[float] | np.ndarray, dist: Dist | None, device: torch.device) -> np.ndarray:
    if dist is None or dist.world == 1:
        return np.array(values, dtype=np.float64)
    return dist.all_reduce_sum(torch.tensor(values, dtype=torch.float64, device=device)).cpu().numpy()


@contextlib.contextmanager
def evaluating(model: GPT, seq_len: int) -> Iterator[None]:
    """Inside: evaluation mode, no autograd, and positions encoded as for windows of `seq_len` however short the input
    is."""
    training, context_len = model.training, model.context_len
    model.eval()
    model.context_len = max(context_len, seq_len)
    try:
        # Not inference_mode: tables that the model caches in here must stay usable in training.
        with torch.no_grad():
            yield
    finally:
        model.context_len = context_len
        model.train(training)


def batch_rows(windows: int, world: int, width: int, batch_tokens: int) -> tuple[int, int]:
    """(rows, width) of every batch of every rank, at most `batch_tokens` over all ranks.

    The last batch is padded: where there are few batches the rows are spread evenly over them, so that little is
    wasted; where there are many the shape is the largest, the same for every such call, so that a compiled model
    keeps its graph.
    """
    each = -(-windows // world)
    most = max(1, batch_tokens // (width * world))
    batches = -(-each // most)
    return (most if batches > 8 else -(-each // batches)), width


def window_batches(
    model: GPT, tokens: np.ndarray, part: Plan, batch: tuple[int, int]
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(windows done, hidden states (n, D), target ids (n,) int64) of each batch's scored positions, in the plan's
    order.

    `batch` is (rows, width) of every batch; call it inside `evaluating`.
    """
    rows, width = batch
    device = model.tok_emb.weight.device
    stream = torch.from_numpy(tokens.astype(np.int64)).to(device)
    offsets = np.arange(width)
    for low in range(0, len(part), rows):
        high = min(low + rows, len(part))
        start, length, first = (a[low:high, None] for a in (part.start, part.length, part.first_scored))
        # Past a window's end the row runs on into whatever follows: the model is causal, so it changes nothing before.
        index = np.zeros((rows, width), dtype=np.int64)
        index[: high - low] = np.minimum(start + offsets, len(tokens) - 1)
        scored = (offsets >= first) & (offsets < length)
        places = np.stack((np.flatnonzero(scored), (start + offsets + 1)[scored]))  # in the flat batch, in the stream
        hidden = model.hidden(stream[torch.from_numpy(index).to(device)]).flatten(0, 1)
        position, target = torch.from_numpy(places).to(device)
        yield high, hidden[position], stream[target]
