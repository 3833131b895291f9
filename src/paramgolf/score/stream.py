"""A token stream to bytes and back with a model: the scorer's windows encode, the cache decodes.

The encoder runs the model over whole windows in batches, as the scorer does; the decoder runs it token by token with
a KV cache, all lanes side by side. Both follow the same `exact` plan, so the size is the score's, plus what `coder`
costs. The first token of each lane is given, not coded: the caller's begin-of-document token. Where the artifact has an
n-gram cache (`ngram`), both mix it into the model's distribution, a cache for each lane.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from paramgolf.errors import GolfError
from paramgolf.model.cache import KVCache
from paramgolf.model.gpt import GPT
from paramgolf.model.loss import softcap
from paramgolf.recipe.sections import NgramLevel
from paramgolf.score import coder
from paramgolf.score.ngram import Mixture, NgramCache
from paramgolf.score.scorer import batch_rows, evaluating, window_batches
from paramgolf.score.windows import plan

SAMPLE_TOKENS = 4096  # decisions of so many tokens choose the coder's settings
LOGITS_AT_ONCE = 2**18  # what fits in a cache: half the time of 2**22
Progress = Callable[[int, int], None]


def encode_stream(
    model: GPT,
    tokens: np.ndarray,
    *,
    seq_len: int,
    stride: int = 0,
    lane_starts: tuple[int, ...] = (0,),
    tolerance: float = 1e-4,
    batch_tokens: int = 16_384,
    ngram: Sequence[NgramLevel] = (),
    bos_id: int = 1,
    progress: Progress | None = None,
) -> bytes:
    """All tokens but the first of each lane as bytes. `tolerance`: log-odds by which the decoder may differ."""
    whole = plan(len(tokens), seq_len, stride or seq_len, lane_starts=lane_starts)
    # The targets come in stream order, so a lane's are what lies between its start and the next.
    targets = whole.targets()
    lane_of = np.searchsorted(lane_starts, targets, side="right") - 1
    caches = Caches(ngram, bos_id, [int(tokens[start]) for start in lane_starts])
    encoder: coder.Encoder | None = None
    held: list[np.ndarray] = []
    fed = done = 0
    with evaluating(model, seq_len):
        batch = batch_rows(len(whole), 1, min(seq_len, int(whole.length.max())), batch_tokens)
        for windows, hidden, truth in window_batches(model, tokens, whole, batch):
            mix = caches.mixer(lane_of[done : done + len(truth)], truth.cpu().numpy())
            held.append(path_log_odds(model, hidden, truth, mix))
            done += len(truth)
            if encoder is None and (done >= SAMPLE_TOKENS or windows == len(whole)):
                sample = np.concatenate(held)[:SAMPLE_TOKENS]
                settings = coder.fit(tolerance, sample, tokens[targets[: len(sample)]], model.vocab_size)
                encoder = coder.Encoder(settings, len(lane_starts))
            if encoder is not None:
                log_odds, held = np.concatenate(held), []
                for lane in np.unique(lane_of[fed:done]):
                    mine = lane_of[fed:done] == lane
                    encoder.add(int(lane), log_odds[mine], tokens[targets[fed:done][mine]])
                fed = done
            if progress is not None:
                progress(windows, len(whole))
    assert encoder is not None
    return encoder.finish()


Mixer = Callable[[int, int], Mixture]


def path_log_odds(model: GPT, hidden: torch.Tensor, truth: torch.Tensor, mix: Mixer | None = None) -> np.ndarray:
    """(n, depth) float64 for hidden states (n, D) and the tokens (n,) that follow, a few at a time. `mix` tells what is
    made of the distributions of rows `low` to `high`, asked in their order."""
    size, parts = max(1, LOGITS_AT_ONCE // model.vocab_size), []
    for low in range(0, len(truth), size):
        high = min(low + size, len(truth))
        logits = window_logits(model, hidden[low:high])
        parts.append(coder.path_log_odds(logits, truth[low:high], None if mix is None else mix(low, high)))
    return np.concatenate(parts)


class Caches:
    """The n-gram caches of all lanes; nothing where there are no levels."""

    def __init__(self, levels: Sequence[NgramLevel], bos_id: int, first: Sequence[int]) -> None:
        """`first`: the token with which each lane begins."""
        self._caches = [NgramCache(levels, bos_id) for _ in first] if levels else []
        self.give(first)

    def give(self, tokens: Sequence[int]) -> None:
        """The next token of every lane."""
        for cache, token in zip(self._caches, tokens, strict=False):
            cache.give(int(token))

    def mixture(self) -> Mixture | None:
        """Of the next token of every lane."""
        return Mixture.of([cache.change() for cache in self._caches]) if self._caches else None

    def mixer(self, lanes: np.ndarray, tokens: np.ndarray) -> Mixer | None:
        """For `path_log_odds` of targets (n,) of these lanes (n,): each is given once its own distribution is there."""
        if not self._caches:
            return None

        def changes(low: int, high: int) -> Iterator[tuple[float, np.ndarray, np.ndarray]]:
            for lane, token in zip(lanes[low:high].tolist(), tokens[low:high].tolist(), strict=True):
                yield self._caches[lane].change()
                self._caches[lane].give(token)

        return lambda low, high: Mixture.of(list(changes(low, high)))


def window_logits(model: GPT, hidden: torch.Tensor) -> torch.Tensor:
    """(n, V) float32, as `GPT.logits` forms them."""
    raw = torch.nn.functional.linear(hidden, model.head_weight().to(hidden.dtype))
    return softcap(raw.float(), model.section.logit_softcap)


def decode_stream(
    model: GPT, data: bytes, *, first_token: int, seq_len: int, stride: int = 0, ngram: Sequence[NgramLevel] = (),
    progress: Progress | None = None,
) -> list[np.ndarray]:  # fmt: skip
    """The lanes' tokens, int64, each with its `first_token`: their concatenation is what was encoded.

    Model, `seq_len`, `stride` and `ngram` must be those of the encoder. `progress(done, total)` counts steps of all
    lanes. Raises GolfError if `data` is no coded stream of this vocabulary, CheckFailed if the tokens do not match
    their checksum.
    """
    decoder = coder.Decoder(data)
    if decoder.settings.vocab_size != model.vocab_size:
        raise GolfError(
            f"the text was coded with a vocabulary of {decoder.settings.vocab_size} tokens, the model has "
            f"{model.vocab_size}; use the model it was coded with"
        )
    lanes, steps = len(decoder.lengths), int(decoder.lengths.max())
    stepper = Stepper(model, np.full(lanes, first_token), seq_len=seq_len, stride=stride)
    caches = Caches(ngram, first_token, [first_token] * lanes)
    with evaluating(model, seq_len):
        while not decoder.done:
            tokens = np.maximum(decoder.step(stepper.logits(), caches.mixture()), 0)
            caches.give(tokens.tolist())
            stepper.append(tokens)
            if progress is not None:
                progress(decoder.position, steps)
    decoder.finish()
    whole = np.stack(stepper.columns, axis=1)
    return [row[: length + 1] for row, length in zip(whole, decoder.lengths.tolist(), strict=True)]


class Stepper:
    """The model read token by token with a KV cache, all lanes side by side, in the windows of the `exact` plan.

    Call it inside `evaluating(model, seq_len)`.
    """

    def __init__(self, model: GPT, first: np.ndarray, *, seq_len: int, stride: int = 0) -> None:
        """`first`: int (lanes,), the first token of each lane. `stride` 0 = `seq_len`."""
        self._model, self._seq_len, self._stride = model, seq_len, stride or seq_len
        self._cache, self._start, self._read = KVCache(seq_len), 0, 0
        self.columns = [first.astype(np.int64)]  # of the streams, so far

    def append(self, tokens: np.ndarray) -> None:
        """The next token of every lane, int (lanes,)."""
        self.columns.append(tokens.astype(np.int64))

    def logits(self) -> torch.Tensor:
        """(lanes, V) float32 for the token after the newest; once for each token."""
        if self._read == self._seq_len:  # the next window of the plan: read again what it shares with this one
            self._start += self._stride
            self._cache.reset()
            self._read = 0
        unread = np.stack(self.columns[self._start + self._read :], axis=1)
        self._read += unread.shape[1]
        ids = torch.from_numpy(unread).to(self._model.tok_emb.weight.device)
        return self._model.logits(ids, self._cache, last_only=True)[:, -1]
