"""Our own ways to a score, each as a scorer that `legality.check` can examine.

`WindowScorer` is the batched path of every score, standard, sliding and in lanes; `CacheScorer` the token-by-token path
of the decoder; `CoderScorer` the probabilities with which the text coder codes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from paramgolf.errors import GolfError
from paramgolf.model.documents import BOS_ID
from paramgolf.model.gpt import GPT
from paramgolf.recipe.sections import NgramLevel, NgramSection, TiltSection, TttSection
from paramgolf.score import coder, scorer
from paramgolf.score.grid import warp
from paramgolf.score.legality import MIN_TOKENS, Legality, check
from paramgolf.score.ngram import NgramCache, ngram_nll
from paramgolf.score.rans import ONE
from paramgolf.score.stream import Stepper, encode_stream, window_logits
from paramgolf.score.ttt.legal import AdaptedScorer
from paramgolf.score.windows import lanes, plan

EXTRA_TOKENS = 96  # of a check, past the first window


class WindowScorer:
    """`scorer.score`: windows in batches. Its charges are those of `score` itself."""

    def __init__(
        self, model: GPT, *, seq_len: int, stride: int = 0, batch_tokens: int = 16_384, lane_count: int = 1,
        bos_id: int = 1, windows: str = "exact",
    ) -> None:  # fmt: skip
        self.model, self.vocab_size = model, model.vocab_size
        self._seq_len, self._stride, self._batch_tokens = seq_len, stride or seq_len, batch_tokens
        self._lane_count, self._bos_id, self._windows = lane_count, bos_id, windows
        self._rows: dict[int, np.ndarray] = {}
        self._next = 0

    def starts(self, stream: np.ndarray) -> np.ndarray | None:
        """The lanes, and the documents where the model keeps to its own."""
        own = documents_apart(self.model, stream)
        return own if self._lane_count == 1 else np.union1d(self._lanes(stream), [] if own is None else own)

    def _lanes(self, stream: np.ndarray) -> tuple[int, ...]:
        return lanes(stream, self._lane_count, self._bos_id) if self._lane_count > 1 else (0,)

    def reset(self, stream: np.ndarray) -> None:
        """Run the model over all windows."""
        whole = plan(len(stream), self._seq_len, self._stride, self._windows, lane_starts=self._lanes(stream))
        batch = scorer.batch_rows(len(whole), 1, min(self._seq_len, int(whole.length.max())), self._batch_tokens)
        targets = iter(whole.targets().tolist())
        self._rows, self._next = {}, 0
        with scorer.evaluating(self.model, self._seq_len):
            for _, hidden, _ in scorer.window_batches(self.model, stream, whole, batch):
                rows = torch.log_softmax(window_logits(self.model, hidden), dim=-1).cpu().numpy()
                self._rows |= {next(targets): row for row in rows}

    def log_probs(self) -> np.ndarray | None:
        return self._rows.get(self._next)

    def give(self, token: int) -> None:
        self._next += 1

    def score(self, stream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What `scorer.score` charges, and the plan's targets."""
        whole = plan(len(stream), self._seq_len, self._stride, self._windows, lane_starts=self._lanes(stream))
        result = scorer.score(
            self.model, stream, token_bytes=scorer.OneByteEach(), seq_len=self._seq_len, stride=self._stride,
            batch_tokens=self._batch_tokens, windows=self._windows, lane_count=self._lane_count, bos_id=self._bos_id,
            keep_nll=True,
        )  # fmt: skip
        assert result.nll is not None
        return whole.targets(), result.nll


class NgramScorer(WindowScorer):
    """`scorer.score` with the n-gram cache: the windows' distribution, mixed with what the stream has shown so far."""

    def __init__(
        self, model: GPT, levels: Sequence[NgramLevel], *, seq_len: int, stride: int = 0, batch_tokens: int = 16_384,
        bos_id: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(model, seq_len=seq_len, stride=stride, batch_tokens=batch_tokens, bos_id=bos_id)
        self._levels = levels

    def starts(self, stream: np.ndarray) -> np.ndarray | None:
        """None: a level of the whole text looks over documents, whatever the model does."""
        return None

    def reset(self, stream: np.ndarray) -> None:
        super().reset(stream)
        self._cache = NgramCache(self._levels, self._bos_id)

    def log_probs(self) -> np.ndarray | None:
        row = super().log_probs()
        return None if row is None else np.log(self._cache.mix(np.exp(row.astype(np.float64))))

    def give(self, token: int) -> None:
        super().give(token)
        self._cache.give(int(token))

    def score(self, stream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        targets, nll = super().score(stream)
        return targets, ngram_nll(stream, nll, self._levels, bos_id=self._bos_id)


class CacheScorer:
    """The decoder's path: one token at a time with a KV cache, which begins each window of the plan anew."""

    def __init__(self, model: GPT, *, seq_len: int, stride: int = 0) -> None:
        self.model, self.vocab_size = model, model.vocab_size
        self._seq_len, self._stride = seq_len, stride
        self._stepper: Stepper | None = None

    def starts(self, stream: np.ndarray) -> np.ndarray | None:
        """The documents where the model keeps to its own."""
        return documents_apart(self.model, stream)

    def reset(self, stream: np.ndarray) -> None:
        self._stepper = None

    def log_probs(self) -> np.ndarray:
        return torch.log_softmax(self._logits().double(), dim=-1)[0].cpu().numpy()

    def give(self, token: int) -> None:
        if self._stepper is None:
            self._stepper = Stepper(self.model, np.array([token]), seq_len=self._seq_len, stride=self._stride)
        else:
            self._stepper.append(np.array([token]))

    def _logits(self) -> torch.Tensor:
        assert self._stepper is not None
        with scorer.evaluating(self.model, self._seq_len):
            return self._stepper.logits()


class CoderScorer(CacheScorer):
    """The probabilities with which the text coder codes each token, on the decoder's path.

    `settings` (a file's header) and `place` (the number a block begins with) are what the encoder chooses with the text
    in view; both are in the file at their own price, so they are no part of the distribution.
    """

    def __init__(self, model: GPT, settings: coder.Settings, *, seq_len: int, stride: int = 0, place: int = 0) -> None:
        super().__init__(model, seq_len=seq_len, stride=stride)
        self._settings, self._place = settings, place

    def log_probs(self) -> np.ndarray:
        return coded_log_probs(self._settings, self._logits(), self._place)


def documents_apart(model: GPT, stream: np.ndarray) -> np.ndarray | None:
    """Where documents begin for a model that looks no further back than that; None for one that does."""
    return np.union1d([0], np.flatnonzero(stream == BOS_ID)) if model.section.document_mask else None


def coded_log_probs(settings: coder.Settings, logits: torch.Tensor, place: int) -> np.ndarray:
    """(V,) natural logarithms of the probabilities with which each token would be coded, from logits (1, V)."""
    levels = [level.cpu().numpy()[0] for level in coder.masses(logits)]
    total = np.zeros(1)
    for level in range(settings.depth):
        below = levels[level + 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            log_odds = np.log(below[1::2]) - np.log(below[::2])
        prefix = np.arange(1 << level)
        forced = (2 * prefix + 1) << (settings.depth - level - 1) >= settings.vocab_size
        cells = settings.grid.cells(warp(np.where(forced, 0.0, log_odds)), place)
        zero = np.where(forced, 1.0, settings.grid.zero_freq[place][cells] / ONE)
        with np.errstate(divide="ignore"):
            total = (total[:, None] + np.log(np.stack((zero, 1.0 - zero), axis=1))).reshape(-1)
    return total[: settings.vocab_size]


def check_all(
    model: GPT, tokens: np.ndarray, *, seq_len: int, stride: int = 0, bos_id: int = 1, batch_tokens: int = 16_384,
    cuts: int = 4, adapted: tuple[TttSection, TiltSection] | None = None, ngram: NgramSection | None = None,
) -> dict[str, Legality]:  # fmt: skip
    """The check of every path to a score of `model`, by its name, on the beginning of `tokens`: a window and a bit.

    `stride` 0 leaves the sliding windows out; `adapted`: what a score that learns would learn by; `ngram`: the cache
    of the score, if it has one. Raises GolfError for a text that is too short.
    """
    part = np.asarray(tokens[: seq_len + EXTRA_TOKENS]).astype(np.int64)
    if len(part) < MIN_TOKENS:
        raise GolfError(f"a check needs a text of at least {MIN_TOKENS} tokens, this has {len(part)}")
    windows = functools.partial(WindowScorer, model, seq_len=seq_len, bos_id=bos_id, batch_tokens=batch_tokens)
    scorers: dict[str, WindowScorer | CacheScorer | AdaptedScorer] = {"windows": windows()}
    if stride and stride < seq_len:
        scorers["sliding windows"] = windows(stride=stride)
    if len(lanes(part, 4, bos_id)) > 1:
        scorers["lanes"] = windows(lane_count=4)
    scorers["token by token"] = CacheScorer(model, seq_len=seq_len, stride=stride)
    settings = coder.Decoder(encode_stream(model, part, seq_len=seq_len, batch_tokens=batch_tokens)).settings
    scorers["text coder"] = CoderScorer(model, settings, seq_len=seq_len)
    if ngram is not None and ngram.levels:
        scorers["n-gram cache"] = NgramScorer(
            model, ngram.levels, seq_len=seq_len, stride=stride, batch_tokens=batch_tokens, bos_id=bos_id
        )
    if adapted is not None:
        scorers["learning"] = AdaptedScorer(
            model, *adapted, seq_len=seq_len, stride=stride, bos_id=bos_id, batch_tokens=batch_tokens
        )
    return {
        name: check(one, part, bos_id=bos_id, cuts=cuts if name != "text coder" else 2) for name, one in scorers.items()
    }
