"""Plain SGD over text that was scored, on all weights of the model: the global half of test-time training.

The text is cut into chunks of `ttt.sgd_chunk_tokens`; the learning rate falls as a cosine over them, and the last one
is left out (its rate would be next to nothing). A chunk's whole rows of `row_tokens` are trained on, `ttt.sgd_rows` of
them in a step. With document masks the rows of a step are one packed row, cut at documents and every `row_tokens` after
a document's beginning. Every rank does all of it alike: nothing is exchanged and no world size changes the result.
Origin: #549 (chunks), #1610 and #1626 (pauses).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paramgolf.model.documents import segment_numbers
from paramgolf.model.gpt import GPT
from paramgolf.recipe.sections import TttSection


@dataclass(frozen=True)
class SgdStep:
    """`ids` (B, T) of the step, its segments if the model masks documents, mean loss in nats, gradient norm before the
    clip."""

    ids: Tensor
    segments: Tensor | None
    loss: float
    norm: float


class GlobalSgd:
    """An optimizer for one pass over a text: `over` goes through it, or the caller by `on`, chunk after chunk."""

    def __init__(
        self, model: GPT, section: TttSection, row_tokens: int, watch: Callable[[SgdStep], None] | None = None
    ) -> None:
        self._model, self._section, self._row_tokens, self._watch = model, section, row_tokens, watch
        self._optimizer = torch.optim.SGD(model.parameters(), lr=section.sgd_lr, momentum=section.sgd_momentum)

    def over(self, tokens: np.ndarray) -> None:
        """One pass over `tokens` (n,)."""
        size = self._section.sgd_chunk_tokens
        chunks = -(-(len(tokens) - 1) // size)
        for number in range(chunks - 1):
            self.on(tokens[number * size : (number + 1) * size + 1], number / (chunks - 1))

    def on(self, tokens: np.ndarray, progress: float) -> None:
        """Train on one chunk, `progress` (0 to 1) of the way through the text."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._section.sgd_lr * 0.5 * (1.0 + math.cos(math.pi * progress))
        stream = torch.from_numpy(np.asarray(tokens).astype(np.int64)).to(self._model.tok_emb.weight.device)
        rows = (len(tokens) - 1) // self._row_tokens
        for _ in range(self._section.sgd_epochs):
            for first in range(0, rows, self._section.sgd_rows):
                last = min(first + self._section.sgd_rows, rows)
                self._step(stream[first * self._row_tokens : last * self._row_tokens + 1])

    def _step(self, stream: Tensor) -> None:
        """One step on consecutive rows."""
        model, segments = self._model, None
        x, y = stream[:-1], stream[1:]
        if model.section.document_mask:
            x, y = x[None], y[None]
            segments = segment_numbers(x, self._row_tokens)
        else:
            x, y = x.view(-1, self._row_tokens), y.view(-1, self._row_tokens)
        with torch.enable_grad():
            loss = model(x, y, segments_BT=segments)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self._section.sgd_clip or math.inf)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._watch is not None:
            self._watch(SgdStep(x, segments, float(loss.detach()), float(norm)))
