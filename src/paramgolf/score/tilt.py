"""The causal n-gram tilt: where the text so far has continued the last tokens in one way, that way becomes likelier.

    p'(v) = p(v) e^(b [v = hint]) / (1 + p(hint) (e^b - 1))

A hint comes from the tokens before the target alone: of the contexts of `tilt.orders` tokens, longest first, the first
that was seen often enough and nearly always went on with one token. The sum over the vocabulary is exactly one: it is
the model with `b` added to one logit. The table learns a token only after it was scored. Origin: #1514, #2135.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import torch
from torch import Tensor

from paramgolf.errors import GolfError
from paramgolf.recipe.sections import TiltSection

NO_HINT = -1


class NgramTable:
    """What followed every context of each order so far: `hint` for the next token, then `give` that token."""

    def __init__(self, section: TiltSection) -> None:
        """GolfError without an order."""
        if not section.orders:
            raise GolfError("the n-gram tilt needs tilt.orders, e.g. tilt.orders=[16, 12, 8]")
        self._orders = sorted(set(section.orders), reverse=True)
        self._threshold, self._least = section.threshold, section.min_count
        self._followers: list[dict[bytes, Counter[int]]] = [{} for _ in self._orders]
        self._last = b""  # the newest tokens, two bytes each

    def hint(self) -> int:
        """The token expected next, NO_HINT if none is."""
        for order, followers in zip(self._orders, self._followers, strict=True):
            if len(self._last) < 2 * order:
                continue
            seen = followers.get(self._last[-2 * order :])
            if seen is None:
                continue
            token, count = max(seen.items(), key=lambda pair: (pair[1], -pair[0]))
            total = sum(seen.values())
            if total >= self._least and count >= self._threshold * total:
                return token
        return NO_HINT

    def give(self, token: int) -> None:
        """The token itself."""
        for order, followers in zip(self._orders, self._followers, strict=True):
            if len(self._last) >= 2 * order:
                context = self._last[-2 * order :]
                followers.setdefault(context, Counter())[int(token)] += 1
        self._last = (self._last + int(token).to_bytes(2, "little"))[-2 * self._orders[0] :]


def hints(tokens: np.ndarray, section: TiltSection) -> np.ndarray:
    """The hint for every token of the stream, int64 (n,), NO_HINT where there is none."""
    table, out = NgramTable(section), np.full(len(tokens), NO_HINT, np.int64)
    for index, token in enumerate(tokens.tolist()):
        out[index] = table.hint()
        table.give(token)
    return out


def tilted_nll(nll: np.ndarray, hint_nll: np.ndarray, truth: np.ndarray, hint: np.ndarray, boost: float) -> np.ndarray:
    """Nats of `truth` under the tilted model, float64, from those of `truth` and of `hint` (any where it is NO_HINT)
    under the model itself."""
    mass = np.exp(-hint_nll.astype(np.float64))
    tilted = nll + np.log1p(mass * math.expm1(boost)) - boost * (truth == hint)
    return np.where(hint == NO_HINT, nll, tilted)


def tilt_logits(logits: Tensor, hint: Tensor, boost: float) -> Tensor:
    """(..., V) logits of the tilted model for hints (...,); the softmax of the result is p'."""
    there = (hint != NO_HINT).unsqueeze(-1)
    add = torch.where(there, boost, 0.0).to(logits.dtype)
    return logits.scatter_add(-1, hint.clamp_min(0).unsqueeze(-1), add)
