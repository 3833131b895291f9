"""Test-time training over the documents of a stream: adapters for each, pauses that train all weights.

`Adaptation` is what scoring, encoding and decoding share: it says which documents come next, gives them a `Group`, and
between batches trains all weights where a pause is due. It looks at no token that its caller has not scored.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from paramgolf.errors import GolfError
from paramgolf.model.gpt import GPT
from paramgolf.recipe.sections import TttSection
from paramgolf.score.scorer import evaluating
from paramgolf.score.ttt.adapters import Adapters
from paramgolf.score.ttt.documents import Batch, Document, batches_of
from paramgolf.score.ttt.group import Group
from paramgolf.score.ttt.sgd import GlobalSgd, SgdStep


def check_ttt(section: TttSection, seq_len: int) -> None:
    """GolfError for settings that cannot work on windows of `seq_len`."""
    context = section.context or seq_len
    if section.kind in ("lora", "phased"):
        for key, chunk in (("chunk", section.chunk), *(("short_chunks", size) for _, size in section.short_chunks)):
            if chunk > context:
                raise GolfError(
                    f"ttt.{key}={chunk} is more than the {context} tokens it would be predicted from (ttt.context, or "
                    "score.seq_len); lower it"
                )
        limits = [limit for limit, _ in section.short_chunks]
        if any(after <= before for before, after in itertools.pairwise(limits)):
            raise GolfError(f"ttt.short_chunks: the limits {limits} must rise; put the shortest documents first")
        if not section.adapt:
            raise GolfError("ttt.adapt=[] leaves nothing to adapt; name head, q, k, v, o or mlp, or set ttt.kind=none")
    if section.kind in ("sgd", "phased") and section.sgd_chunk_tokens < seq_len:
        raise GolfError(
            f"ttt.sgd_chunk_tokens={section.sgd_chunk_tokens} holds no row of score.seq_len={seq_len} tokens; raise it"
        )


@contextmanager
def adapting(model: GPT, seq_len: int) -> Iterator[None]:
    """Inside: evaluation by the plain kernels, no gradient unless asked for, weights frozen. Afterwards the weights are
    what they were, bit for bit."""
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    segment_len = model.segment_len
    model.use_plain()
    before: list[Tensor] = []
    try:
        with evaluating(model, seq_len), model.eager():
            model.segment_len = 0
            before = [p.detach().clone() for p, _ in frozen]
            for param, _ in frozen:
                param.requires_grad_(False)
            yield
    finally:
        model.segment_len = segment_len
        with torch.no_grad():
            for (param, learns), kept in zip(frozen, before, strict=False):
                if not torch.equal(param, kept):
                    param.copy_(kept)
                param.requires_grad_(learns)


@contextmanager
def learning(model: GPT) -> Iterator[None]:
    """Inside: all weights take gradients."""
    for param in model.parameters():
        param.requires_grad_(True)
    try:
        yield
    finally:
        for param in model.parameters():
            param.requires_grad_(False)


class Adaptation:
    """LoRA for each document and, of kind "phased", pauses. `tokens` (n,) may be filled while it goes on; `rank` takes
    every `world`-th document of each batch."""

    def __init__(
        self,
        model: GPT,
        section: TttSection,
        tokens: np.ndarray,
        documents: list[Document],
        seq_len: int,
        *,
        rank: int = 0,
        world: int = 1,
        make: type[Adapters] = Adapters,
        watch: Callable[[SgdStep], None] | None = None,
    ) -> None:
        check_ttt(section, seq_len)
        self.model, self.section, self.seq_len = model, section, seq_len
        self.context = section.context or seq_len
        self.batches = batches_of(documents, section.batch_docs, section.order)
        self.stream = torch.from_numpy(tokens.astype(np.int64)).to(model.tok_emb.weight.device)
        self._rank, self._world, self._make, self._watch = rank, world, make, watch
        self._adapters: Adapters | None = None
        self._finished: list[Batch] = []
        self._count = len(documents)
        last = section.prefix_docs if section.kind == "phased" else 0
        last = min(last, self._count) if section.order == "longest" else last
        self.paused = 0  # times so far
        self.pauses = [end for i in range(section.phases) if (end := last * (i + 1) // section.phases)]

    def begin(self, number: int) -> Group:
        """This rank's documents of the `number`-th batch, ready to be gone through."""
        section, batch = self.section, self.batches[number]
        documents, size = batch.documents, section.batch_docs
        cut = batch.chunks(section.chunk, section.short_chunks, section.order)
        mine = documents[self._rank :: self._world]
        # In the records a batch of fewer documents has adapters of its own; from left to right nothing may show that.
        alone = self.section.order == "longest" and len(documents) < size
        adapters = None if alone else self._adapters
        fresh = adapters is None or not self.section.keep_a
        if adapters is None:
            slots = len(mine) if alone else len(range(self._rank, min(size, self._count), self._world))
            adapters = self._make(self.model, self.section, slots)
            self._adapters = self._adapters if alone else adapters
        adapters.begin(fresh=fresh)
        chunks = max(cut.count(d.targets) for d in documents)
        return Group(adapters, self.section, self.stream, mine, cut, chunks, self.context)

    def finish(self, number: int) -> None:
        """The `number`-th batch is scored on all ranks; train all weights if a pause is due and something is left."""
        self._finished.append(self.batches[number])
        done = sum(len(batch.documents) for batch in self._finished)
        if self.pauses and done >= self.pauses[0] and number + 1 < len(self.batches):
            self.pause()

    def pause(self) -> None:
        """One pass of SGD over the finished documents up to the boundary."""
        tokens = self.prefix(self.pauses.pop(0))
        self.paused += 1
        with learning(self.model):
            GlobalSgd(self.model, self.section, self.seq_len, self._watch).over(tokens)
        self._adapters = None  # they belong to the weights of before

    def prefix(self, count: int) -> np.ndarray:
        """Tokens of the first `count` finished documents, by the number of their batch."""
        done = [d for batch in sorted(self._finished, key=lambda b: b.number) for d in batch.documents]
        parts = [self.stream[d.start : d.start + d.length] for d in done[:count]]
        return torch.cat(parts).cpu().numpy()
