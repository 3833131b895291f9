"""A score that learns from what it has scored: test-time training, the n-gram tilt, or both.

Every target is predicted, counted, and only then learned from.

Of the kinds `lora` and `phased` a document is predicted by the model with adapters that learn from its own chunks
before; `phased` pauses to train all weights on documents that are finished. The kind `sgd` scores the stream's windows
and trains all weights on every stretch that was scored whole. Each target counts once, as in the standard score, a
begin-of-document token with its loss and no bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from paramgolf.dist import Dist
from paramgolf.errors import CheckFailed, GolfError
from paramgolf.model.gpt import GPT
from paramgolf.model.loss import chunked_nll
from paramgolf.recipe.sections import TiltSection, TttSection
from paramgolf.score.scorer import CountsBytes, batch_rows, window_batches
from paramgolf.score.tilt import NO_HINT, hints, tilted_nll
from paramgolf.score.ttt.adapt import Adaptation, adapting, check_ttt, learning
from paramgolf.score.ttt.documents import documents_of
from paramgolf.score.ttt.group import Chunk
from paramgolf.score.ttt.sgd import GlobalSgd
from paramgolf.score.windows import Plan, lanes, plan

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class AdaptedScore:
    """`val_loss` in nats a target, `val_bpb` in bits a byte of the text; `nll` (n - 1,) float64 in stream order,
    without the first targets of further lanes.

    `kind` is that of the test-time training ("none": windows alone). `tilted` are the losses with the tilt, if there is
    one; `val_loss`, `val_bpb` and `nll` are then those without it.
    """

    kind: str
    val_loss: float
    val_bpb: float
    scored_tokens: int
    scored_bytes: int
    documents: int
    seconds: float
    nll: np.ndarray
    tilted: np.ndarray | None = None
    pauses: int = 0  # of `phased`: none where the text ends before `prefix_docs` documents

    @property
    def val_bpb_tilt(self) -> float | None:
        """Bits per byte with the tilt."""
        return None if self.tilted is None else float(self.tilted.sum()) / math.log(2) / self.scored_bytes

    def as_dict(self) -> dict[str, Any]:
        """The stable result keys."""
        results: dict[str, Any] = {}
        if self.kind != "none":
            results = {"val_loss_ttt": self.val_loss, "val_bpb_ttt": self.val_bpb, "ttt": self.kind}
            results |= {"ttt_documents": self.documents, "ttt_seconds": self.seconds}
        if self.kind == "phased":
            results["ttt_pauses"] = self.pauses
        if self.tilted is not None:
            name = "tilt" if self.kind == "none" else "ttt_tilt"
            results |= {f"val_loss_{name}": float(self.tilted.mean()), f"val_bpb_{name}": self.val_bpb_tilt}
        return results


def score_adapted(
    model: GPT,
    tokens: np.ndarray,
    section: TttSection,
    tilt: TiltSection | None = None,
    *,
    token_bytes: CountsBytes,
    true_bytes: int | None = None,
    seq_len: int,
    stride: int = 0,
    batch_tokens: int = 65_536,
    lane_count: int = 1,
    bos_id: int = 1,
    dist: Dist | None = None,
    limit_seconds: float = 0.0,
    progress: Progress | None = None,
) -> AdaptedScore:
    """Score the stream `tokens` (1-D ids); arguments as of `scorer.score` (`stride`, `lane_count`: of the kinds
    that use windows, each target in one).

    Collective: every rank calls it and gets the same. The model is left as it was. GolfError for settings that cannot
    work, nothing to score, or more than `limit_seconds`; CheckFailed when a loss is not finite.
    """
    began = time.monotonic()
    tilt = tilt if tilt is not None and tilt.orders else None
    if section.kind == "none" and tilt is None:
        raise GolfError("nothing is learned in scoring: set ttt.kind to lora, phased or sgd, or tilt.orders")
    check_ttt(section, seq_len)
    tokens = np.asarray(tokens)
    if len(tokens) < 2:
        raise GolfError(f"nothing to score: the text is {len(tokens)} token(s) long, at least 2 are needed")
    deadline = began + limit_seconds if limit_seconds else math.inf
    run = Run(model, section, tilt, tokens, seq_len, bos_id, dist, deadline, progress)
    with adapting(model, max(seq_len, section.context)):
        if section.kind in ("lora", "phased"):
            run.documents()
        else:
            run.windows(stride or seq_len, batch_tokens, lanes(tokens, lane_count, bos_id))
    nll, tilted = run.collected(limit_seconds)
    before, after = tokens[:-1].astype(np.int64), tokens[1:].astype(np.int64)
    size = int(token_bytes.count(before, after).sum())
    if true_bytes is not None:
        size = true_bytes - int(token_bytes.count(np.array([0]), tokens[:1].astype(np.int64)).sum())
    if size <= 0:
        raise GolfError("nothing to score: the text has tokens but no bytes")
    total = float(nll.sum())
    return AdaptedScore(
        section.kind, total / len(nll), total / math.log(2) / size, len(nll), size, run.count,
        time.monotonic() - began, nll, tilted if tilt is not None else None, run.pauses,
    )  # fmt: skip


class Run:
    """One pass over a stream; `nll` holds what this rank has scored, nan elsewhere, `tilted` the same with the tilt."""

    def __init__(
        self, model: GPT, section: TttSection, tilt: TiltSection | None, tokens: np.ndarray, seq_len: int, bos_id: int,
        dist: Dist | None, deadline: float, progress: Progress | None,
    ) -> None:  # fmt: skip
        self.model, self.section, self.tokens, self.seq_len = model, section, tokens, seq_len
        self.boost = tilt.boost if tilt is not None else 0.0
        self.hints = hints(tokens, tilt) if tilt is not None else np.full(len(tokens), NO_HINT, np.int64)
        self._documents = documents_of(tokens, bos_id)
        self._dist, self._deadline, self._progress = dist, deadline, progress
        self._rank, self._world = (dist.rank, dist.world) if dist is not None else (0, 1)
        self.nll, self.tilted = np.full(len(tokens), np.nan), np.full(len(tokens), np.nan)
        self.charged = np.ones(len(tokens) - 1, dtype=bool)  # not the first token of a further lane
        self._late, self.pauses = False, 0

    @property
    def count(self) -> int:
        return len(self._documents)

    def documents(self) -> None:
        """Adapters for every document; with pauses where the section has them."""
        adaptation = Adaptation(
            self.model, self.section, self.tokens, self._documents, self.seq_len, rank=self._rank, world=self._world
        )
        done = 0
        for number, batch in enumerate(adaptation.batches):
            if self._is_late():
                return
            adaptation.begin(number).run(self.observe)
            adaptation.finish(number)
            done += len(batch.documents)
            self.pauses = adaptation.paused
            if self._progress is not None:
                self._progress(done, len(self._documents))

    def observe(self, chunk: Chunk, logits: torch.Tensor) -> None:
        """Count a chunk of documents."""
        for row, span in zip(torch.log_softmax(logits, dim=-1), chunk.spans(), strict=True):
            at = np.arange(span.start, span.stop)
            wanted = torch.stack([self._ids(self.tokens[at]), self._ids(self.hints[at])], dim=1)
            self._keep(at, *(-row[: len(at)].gather(1, wanted)).unbind(1))

    def _ids(self, ids: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.maximum(ids.astype(np.int64), 0)).to(self.model.tok_emb.weight.device)

    def _keep(self, targets: np.ndarray, nll: torch.Tensor, hint_nll: torch.Tensor) -> None:
        """Note the losses of these targets and of their hints."""
        own, other = nll.double().cpu().numpy(), hint_nll.double().cpu().numpy()
        self.nll[targets] = own
        self.tilted[targets] = tilted_nll(own, other, self.tokens[targets], self.hints[targets], self.boost)

    def windows(self, stride: int, batch_tokens: int, lane_starts: Sequence[int] = (0,)) -> None:
        """Standard or sliding windows; between two chunks of the stream the model trains on the one that is scored."""
        whole = plan(len(self.tokens), self.seq_len, stride, lane_starts=lane_starts)
        self.charged[np.array(lane_starts[1:], np.int64) - 1] = False
        size = self.section.sgd_chunk_tokens
        chunk_of = (whole.start + whole.first_scored) // size  # a window belongs where its first target is
        chunks = -(-(len(self.tokens) - 1) // size)
        if self.section.kind == "none":
            chunk_of, chunks = np.zeros_like(chunk_of), 1
        rows = batch_rows(len(whole), self._world, min(self.seq_len, int(whole.length.max())), batch_tokens)
        optimizer = GlobalSgd(self.model, self.section, self.seq_len)
        for number in range(chunks):
            if self._is_late():
                return
            self.score_windows(whole.among(chunk_of == number), rows)
            if number + 1 < chunks:
                with learning(self.model):
                    optimizer.on(self.tokens[number * size : (number + 1) * size + 1], number / (chunks - 1))
            if self._progress is not None:
                self._progress(number + 1, chunks)

    def score_windows(self, part: Plan, rows: tuple[int, int]) -> None:
        """Count windows of the stream; `rows` is the shape of a batch."""
        mine = part.part(self._rank, self._world)
        targets, at = mine.targets(), 0
        for _, hidden, truth in window_batches(self.model, self.tokens, mine, rows):
            now = targets[at : at + len(truth)]
            weight, cap = self.model.head_weight(), self.model.section.logit_softcap
            nll = chunked_nll(hidden, weight, truth, cap)
            other = chunked_nll(hidden, weight, self._ids(self.hints[now]), cap) if self.boost else nll
            self._keep(now, nll, other)
            at += len(truth)

    def _is_late(self) -> bool:
        """Whether any rank is past the limit; all of them stop together."""
        late = float(time.monotonic() > self._deadline)
        self._late = bool(self._dist.all_max(late) if self._dist is not None else late)
        return self._late

    def collected(self, limit: float) -> tuple[np.ndarray, np.ndarray]:
        """Every target's loss from all ranks, without the tilt and with it, float64 (n - 1,) less further lanes."""
        if self._late:
            raise GolfError(
                f"scoring with test-time training passed its limit of {limit:g} s (budget.eval_seconds); no score is "
                "given: raise the limit, use larger chunks or a shorter text"
            )
        known = ~np.isnan(self.nll[1:])
        rows = np.stack([*(np.where(known, values[1:], 0.0) for values in (self.nll, self.tilted)), known])
        if self._dist is not None and self._world > 1:
            device = self.model.tok_emb.weight.device
            rows = self._dist.all_reduce_sum(torch.from_numpy(rows).to(device)).cpu().numpy()
        nll, tilted, times = rows
        if not (times == self.charged).all() or not np.isfinite(nll).all():
            raise CheckFailed(
                "test-time training gives a loss that is not a number: lower ttt.lr or ttt.sgd_lr, or the weights are "
                "broken"
            )
        return nll[self.charged], tilted[self.charged]
