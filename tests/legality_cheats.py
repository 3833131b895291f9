"""Scorers that break one condition each, and honest ones that look alike."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle

from paramgolf.model.block import Block
from paramgolf.model.gpt import GPT
from paramgolf.model.layers import rms_norm
from paramgolf.model.parts.base import Flow
from paramgolf.model.parts.smear_gate import SmearGate
from paramgolf.score.own_scorers import CacheScorer

V = 48


class Bigram:
    """An honest adaptive model: counts of what followed each token so far, mixed with uniform."""

    vocab_size = V

    def reset(self, stream: np.ndarray) -> None:
        self.counts: dict[int, Counter[int]] = defaultdict(Counter)
        self.seen: list[int] = []
        self.stream = stream

    def log_probs(self) -> np.ndarray:
        return np.log(self.mixed(0.5))

    def mixed(self, share: float) -> np.ndarray:
        followers = self.counts[self.seen[-1]]
        total = sum(followers.values())
        cache = np.full(V, 0.0 if total else 1 / V)
        for token, count in followers.items():
            cache[token] = count / total
        return share * cache + (1 - share) / V

    def give(self, token: int) -> None:
        if self.seen:
            self.counts[self.seen[-1]][token] += 1
        self.seen.append(token)


class TargetKeyed(Bigram):
    """The cache is trusted where it holds the coming target, and the rest is scaled down to a sum of one."""

    def log_probs(self) -> np.ndarray:
        target = int(self.stream[len(self.seen)])
        share = 0.9 if self.counts[self.seen[-1]][target] else 0.1
        return np.log(self.mixed(share))


class Unnormalised(Bigram):
    """Cache and uniform are added, not mixed."""

    def log_probs(self) -> np.ndarray:
        return np.log(self.mixed(0.5) + 0.05 / V)


class Memory(Bigram):
    """Keeps its counts over `reset`: the second run has read the text."""

    def reset(self, stream: np.ndarray) -> None:
        counts = getattr(self, "counts", defaultdict(Counter))
        super().reset(stream)
        self.counts = counts


class NextToken(Bigram):
    """Moves some probability to tokens that appear in what follows: within a batch that is all at hand."""

    def log_probs(self) -> np.ndarray:
        later = np.bincount(self.stream[len(self.seen) + 1 :], minlength=V) + 1e-9
        return np.log(0.9 * self.mixed(0.5) + 0.1 * later / later.sum())


class Charges:
    """Only the scores of another scorer, by its distributions."""

    vocab_size = V

    def __init__(self, inner: Bigram, says_targets: bool = True) -> None:
        self.inner, self.says_targets = inner, says_targets

    def score(self, stream: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        self.inner.reset(stream)
        self.inner.give(int(stream[0]))
        nats = []
        for token in stream[1:].tolist():
            nats.append(-self.inner.log_probs()[token])
            self.inner.give(token)
        targets = np.arange(1, len(stream))
        return (targets if self.says_targets else None), np.array(nats)


class BestOfTwo(Charges):
    """Scores the text, learns it, scores it again and keeps the better charge of each token."""

    def score(self, stream: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        targets, first = super().score(stream)
        counts = self.inner.counts
        second = [-np.log(0.1 / V + 0.9 * counts[a][b] / sum(counts[a].values())) for a, b in _pairs(stream)]
        return targets, np.minimum(first, second)


class SecondPass(Charges):
    """As `BestOfTwo`, but both passes are counted."""

    def score(self, stream: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        targets, first = super().score(stream)
        both = np.concatenate((first, super().score(stream)[1]))
        return (None if targets is None else np.concatenate((targets, targets))), both


class Flattered(Bigram):
    """Honest distributions, and charges a little below them."""

    def score(self, stream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        targets, nats = Charges(Bigram()).score(stream)
        assert targets is not None
        return targets, 0.98 * nats


def _pairs(stream: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(stream[:-1].tolist(), stream[1:].tolist(), strict=True))


class Trained(CacheScorer):
    """Test-time training; `chunk` 0: on the whole text before it is scored, else on each chunk once it is scored."""

    def __init__(self, model: GPT, seq_len: int, chunk: int) -> None:
        super().__init__(model, seq_len=seq_len)
        self._plain, self._chunk = model, chunk

    def reset(self, stream: np.ndarray) -> None:
        super().reset(stream)
        self.model = copy.deepcopy(self._plain)
        self._seen: list[int] = []
        if not self._chunk:
            self._train(stream)

    def give(self, token: int) -> None:
        self._seen.append(token)
        if self._chunk and len(self._seen) % self._chunk == 0:
            self._train(np.array(self._seen[-self._chunk :]))
            self._stepper = None  # the cache holds keys of the old weights
        super().give(token)

    def _train(self, tokens: np.ndarray) -> None:
        ids = torch.from_numpy(tokens)[None]
        self.model.train()
        self.model(ids[:, :-1], ids[:, 1:]).backward()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
                    parameter.grad = None


def batch_statistics(model: GPT) -> GPT:
    """The model with a layer that is normalised by the mean of the whole batch."""
    model.blocks[0].register_forward_hook(_normalised)
    return model


def batch_statistics_everywhere() -> RemovableHandle:
    """The same in all layers of every model that is run while the handle is held."""
    return register_module_forward_hook(lambda *call: _normalised(*call) if isinstance(call[0], Block) else None)


def _normalised(_layer: nn.Module, _given: object, out: torch.Tensor) -> torch.Tensor:
    return out - 0.2 * out.mean(dim=(0, 1), keepdim=True)


class LeakySmear(SmearGate):
    """The look-back of one token sees over the beginning of a document."""

    def on_stream(self, x_BTD: torch.Tensor, flow: Flow) -> torch.Tensor:
        return super().on_stream(x_BTD, dataclasses.replace(flow, documents=False))


class PackedDocuments:
    """Documents scored apart, each with the next one's beginning as its last target, on a model with a smear gate: a
    look-back of one token. On the packed stream it sees over a document's start (`leaks`); it should see nothing."""

    vocab_size = V

    def __init__(self, model: GPT, leaks: bool) -> None:
        self.model, self.leaks = model, leaks

    def starts(self, stream: np.ndarray) -> np.ndarray:
        return np.flatnonzero(stream == 1)

    def reset(self, stream: np.ndarray) -> None:
        self.rows: list[np.ndarray] = []
        self.at = 0
        table = self.model.tok_emb.weight.detach()
        for low, high in itertools.pairwise([*self.starts(stream), len(stream)]):
            ids = torch.from_numpy(stream[low:high])[None]
            first = table[stream[low - 1]] if self.leaks and low else torch.zeros_like(table[0])
            before = torch.cat((first[None], table[ids[0, :-1]]))
            x_BTD = rms_norm(table[ids] + 0.3 * before, self.model.section.norm_eps)
            with embedding_given(self.model, x_BTD), torch.no_grad():
                self.rows += list(self.model.logits(ids)[0].log_softmax(-1).numpy())

    def log_probs(self) -> np.ndarray:
        return self.rows[self.at - 1]

    def give(self, token: int) -> None:
        self.at += 1


@contextlib.contextmanager
def embedding_given(model: GPT, x_BTD: torch.Tensor) -> Iterator[None]:
    """Inside, the model's stream begins with `x_BTD`."""
    model.embed = lambda flow: x_BTD  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.embed
