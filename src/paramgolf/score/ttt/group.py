"""A batch of documents, chunk by chunk: score with the adapters of each, then one or more steps on what was scored.

Suffixes: S documents, T time, C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from paramgolf.recipe.sections import TttSection
from paramgolf.score.ttt.adapters import Adapters
from paramgolf.score.ttt.documents import Chunks, Document, Window, window_of


@dataclass(frozen=True)
class Chunk:
    """Chunk `number` of the documents that have it, in slots `rows` (S,). `ids_ST` are their windows, padded behind;
    `places_SC` the chunk's positions in them and `targets_SC` what follows, both filled up by repeating the last."""

    number: int
    documents: list[Document]
    windows: list[Window]
    rows: Tensor
    ids_ST: Tensor
    places_SC: Tensor
    targets_SC: Tensor

    def spans(self) -> list[slice]:
        """Where each document's targets of this chunk lie among the stream's tokens."""
        pairs = zip(self.documents, self.windows, strict=True)
        first = [d.start + w.start + w.offset + 1 for d, w in pairs]
        return [slice(at, at + w.count) for at, w in zip(first, self.windows, strict=True)]


Observe = Callable[[Chunk, Tensor], None]  # the chunk and its logits (S, C, V), before anything is learned from it


class Group:
    """`documents` of the stream `tokens` (int64 on the model's device), document i in slot i of `adapters`: one rank's
    share of a batch whose longest document has so many `chunks`. Adapters of a document that is over are moved by decay
    and momentum until the batch is, as in the records, so that what a slot hands on does not depend on the share."""

    def __init__(
        self, adapters: Adapters, section: TttSection, tokens: Tensor, documents: list[Document], cut: Chunks,
        chunks: int, context: int,
    ) -> None:  # fmt: skip
        self.adapters, self.section, self.context = adapters, section, context
        self.documents, self.cut, self.chunks, self._tokens = documents, cut, chunks, tokens

    def slots(self, number: int) -> list[int]:
        """Of the documents that have a chunk `number`."""
        return [i for i, d in enumerate(self.documents) if self.cut.count(d.targets) > number]

    def run(self, observe: Observe) -> None:
        """All chunks of all documents."""
        for number in range(self.chunks):
            if self.slots(number):
                self.advance(self.chunk(number), observe)
            else:
                self._step_without_learners(number)

    def advance(self, chunk: Chunk, observe: Observe | None = None) -> None:
        """Score a chunk, show it, then learn from it for the chunks that follow."""
        learners = self._learners(chunk)
        if not len(learners):
            if observe is not None:
                with torch.no_grad():
                    observe(chunk, self.logits(chunk))
            self._step_without_learners(chunk.number)
            return
        with torch.enable_grad():
            logits = self.logits(chunk)
        if observe is not None:
            observe(chunk, logits.detach())
        for repeat in range(self.section.grad_steps):
            with torch.enable_grad():
                logits = self.logits(chunk) if repeat else logits
                mine, truth = logits[learners], chunk.targets_SC[learners]
                nll = F.cross_entropy(mine.flatten(0, 1), truth.flatten(), reduction="none").view(truth.shape)
                nll.mean(1).sum().backward()
            self.adapters.step()

    def _step_without_learners(self, number: int) -> None:
        """The steps of other ranks after chunk `number`, which the slots here go along with."""
        for _ in range(self.section.grad_steps if number + 1 < self.chunks else 0):
            self.adapters.step()

    def _learners(self, chunk: Chunk) -> Tensor:
        """Rows of the chunk whose documents go on; their chunk is whole."""
        on = [i for i, d in enumerate(chunk.documents) if self.cut.count(d.targets) > chunk.number + 1]
        return torch.tensor(on, dtype=torch.int64, device=chunk.rows.device)

    def logits(self, chunk: Chunk) -> Tensor:
        """(S, C, V) float32."""
        hidden = self.adapters.hidden(chunk.ids_ST, chunk.rows)
        at = chunk.places_SC.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        return self.adapters.logits(hidden.gather(1, at), chunk.rows)

    def chunk(self, number: int) -> Chunk:
        """Chunk `number` of every document that has it."""
        device, slots = self._tokens.device, self.slots(number)
        first, end = self.cut.begin(number), self.cut.begin(number + 1)
        own = [self.documents[i] for i in slots]
        to_end = self.section.order == "longest"
        windows = [window_of(d.targets, first, end, self.context, to_end=to_end) for d in own]
        width = min(self.context, end)
        start = np.array([d.start + w.start for d, w in zip(own, windows, strict=True)])[:, None]
        length, offset, count = (np.array([getattr(w, k) for w in windows])[:, None] for k in _WINDOW)
        inside = np.arange(width) < length
        index = torch.from_numpy(np.where(inside, start + np.arange(width), 0)).to(device)
        ids = self._tokens[index].masked_fill(~torch.from_numpy(inside).to(device), 0)
        places = torch.from_numpy(offset + np.minimum(np.arange(end - first), count - 1)).to(device)
        targets = self._tokens[torch.from_numpy(start).to(device) + places + 1]
        rows = torch.tensor(slots, dtype=torch.int64, device=device)
        return Chunk(number, own, windows, rows, ids, places, targets)


_WINDOW = ("length", "offset", "count")
