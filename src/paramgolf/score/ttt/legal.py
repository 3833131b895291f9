"""A score that learns, as a scorer that `legality.check` can examine: the batched path with its distributions shown."""

from __future__ import annotations

import math

import numpy as np
import torch

from paramgolf.model.gpt import GPT
from paramgolf.recipe.sections import TiltSection, TttSection
from paramgolf.score.scorer import OneByteEach, window_batches
from paramgolf.score.stream import window_logits
from paramgolf.score.tilt import tilt_logits
from paramgolf.score.ttt.adapt import adapting
from paramgolf.score.ttt.group import Chunk
from paramgolf.score.ttt.scorer import Run, score_adapted
from paramgolf.score.windows import Plan


class AdaptedScorer:
    """`score_adapted`. A token may depend on all tokens before it, those of other documents too."""

    def __init__(
        self, model: GPT, section: TttSection, tilt: TiltSection | None = None, *, seq_len: int, stride: int = 0,
        batch_tokens: int = 16_384, bos_id: int = 1,
    ) -> None:  # fmt: skip
        self.model, self.vocab_size = model, model.vocab_size
        self._section, self._tilt = section, tilt if tilt is not None and tilt.orders else None
        self._seq_len, self._stride, self._batch_tokens, self._bos_id = seq_len, stride, batch_tokens, bos_id
        self._rows: dict[int, np.ndarray] = {}
        self._next = 0

    def reset(self, stream: np.ndarray) -> None:
        """Score the whole stream and keep every distribution."""
        run = _Shown(self.model, self._section, self._tilt, stream, self._seq_len, self._bos_id, None, math.inf, None)
        with adapting(self.model, max(self._seq_len, self._section.context)):
            if self._section.kind in ("lora", "phased"):
                run.documents()
            else:
                run.windows(self._stride or self._seq_len, self._batch_tokens)
        self._rows, self._next = run.rows, 0

    def log_probs(self) -> np.ndarray | None:
        return self._rows.get(self._next)

    def give(self, token: int) -> None:
        self._next += 1

    def score(self, stream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What `score_adapted` charges, and the targets."""
        result = score_adapted(
            self.model, stream, self._section, self._tilt, token_bytes=OneByteEach(), seq_len=self._seq_len,
            stride=self._stride, batch_tokens=self._batch_tokens, bos_id=self._bos_id,
        )  # fmt: skip
        return np.arange(1, len(stream)), result.nll if result.tilted is None else result.tilted


class _Shown(Run):
    """A run that keeps the natural logarithms of all probabilities, by target."""

    def __init__(self, *inputs: object) -> None:
        super().__init__(*inputs)  # type: ignore[arg-type]
        self.rows: dict[int, np.ndarray] = {}

    def observe(self, chunk: Chunk, logits: torch.Tensor) -> None:
        for row, span in zip(logits, chunk.spans(), strict=True):
            self._show(np.arange(span.start, span.stop), row[: span.stop - span.start])

    def score_windows(self, part: Plan, rows: tuple[int, int]) -> None:
        targets, at = part.targets(), 0
        for _, hidden, truth in window_batches(self.model, self.tokens, part, rows):
            self._show(targets[at : at + len(truth)], window_logits(self.model, hidden))
            at += len(truth)

    def _show(self, targets: np.ndarray, logits: torch.Tensor) -> None:
        hint = torch.from_numpy(self.hints[targets]).to(logits.device)
        shown = torch.log_softmax(tilt_logits(logits, hint, self.boost).double(), dim=-1).cpu().numpy()
        self.rows |= dict(zip(targets.tolist(), shown, strict=True))
