"""The n-gram cache: what the text so far has made of the last tokens, mixed into the model's next-token distribution.

A level looks up the last `order` tokens in the document, or in the whole text, before the target. Where they were seen
N > 0 times, followed by K different tokens, c of those times by v, the level turns a distribution p into

    p'(v) = (max(c - d, 0) + (d K + s) p(v)) / (N + s)          strength s >= 0, discount 0 <= d < 1, not both 0

and elsewhere leaves it as it is. This is the predictive rule of a Pitman-Yor process (Teh, 2006) whose base is the
level before it and, first of all, the model; caches of this kind go back to Kuhn and De Mori (1990). The sum over v is
exactly one at every level, counts come from tokens before the target alone, and a token is counted only after its
score, so the score is legal in the four senses of docs/legality.md. A level is affine in p with weights that do not
depend on the model, and so are all levels together (`Mixture`): the coder needs the model's distribution only once.

`ngram_nll` computes the score of a whole stream at once by sorting; `NgramCache` shows the whole distribution, token by
token. Both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paramgolf.recipe.sections import NgramLevel


def ngram_nll(
    tokens: np.ndarray, nll: np.ndarray, levels: Sequence[NgramLevel], *, bos_id: int, starts: Sequence[int] = (0,)
) -> np.ndarray:
    """Nats of the tokens 1 ... n-1 of a stream with the cache, (n - 1,) float64.

    Args:
        tokens: (n,) ids. `nll`: (n - 1,) nats under the model.
        starts: where lanes begin; a level never looks across one. Documents begin at `bos_id`.
    """
    ids = np.asarray(tokens).astype(np.int64)
    lane = np.zeros(len(ids), np.int64)
    lane[np.asarray(starts, np.int64)] = 1
    document = np.cumsum(np.maximum(lane, ids == bos_id))
    lane = np.cumsum(lane)
    p = np.exp(-np.asarray(nll, np.float64))
    for level in levels:
        seen, total, kinds = _counts(ids, document if level.scope == "document" else lane, level.order)
        s, d = level.strength, level.discount
        with np.errstate(invalid="ignore", divide="ignore"):
            mixed = (np.maximum(seen - d, 0.0) * (seen > 0) + (d * kinds + s) * p) / (total + s)
        p = np.where(total > 0, mixed, p)
    return -np.log(p)


def _counts(ids: np.ndarray, part: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each target 1 ... n-1: how often its context was followed by it, by anything, by how many kinds of tokens,
    in the same part of the stream and before it; three (n - 1,) int64. A context lies in the part of its last token."""
    n, size = len(ids), int(ids.max()) + 1
    if order >= n:  # no target has so many tokens before it
        zeros = np.zeros((3, n - 1), np.int64)
        return zeros[0], zeros[1], zeros[2]
    context = part.copy()
    for back in range(order):
        shifted = np.full(n, -1, np.int64)
        shifted[back:] = ids[: n - back]
        _, context = np.unique(context * (size + 1) + shifted + 1, return_inverse=True)
    whole = np.zeros(n, bool)  # the context is `order` tokens of one part
    whole[max(order - 1, 0) :] = part[max(order - 1, 0) :] == part[: n - max(order - 1, 0)]
    at = np.flatnonzero(whole[:-1])
    context, token = context[at], ids[at + 1]
    _, pair = np.unique(context * size + token, return_inverse=True)
    seen = _rank_in_group(pair)
    total = _rank_in_group(context)
    order_by = np.argsort(context, kind="stable")
    fresh = np.cumsum(seen[order_by] == 0)
    first = np.flatnonzero(total[order_by] == 0)
    lengths = np.diff(np.append(first, len(order_by)))
    before = fresh - (seen[order_by] == 0) - np.repeat(fresh[first] - 1, lengths)
    kinds = np.empty_like(before)
    kinds[order_by] = before
    out = np.zeros((3, n - 1), np.int64)
    out[:, at] = seen, total, kinds
    return out[0], out[1], out[2]


def _rank_in_group(group: np.ndarray) -> np.ndarray:
    """How many earlier elements equal each element."""
    order_by = np.argsort(group, kind="stable")
    ordered = group[order_by]
    first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    within = np.arange(len(group)) - np.repeat(first, np.diff(np.append(first, len(group))))
    out = np.empty_like(within)
    out[order_by] = within
    return out


@dataclass(frozen=True)
class Mixture:
    """What caches make of n distributions p: p * factor (n,), plus gains (m,) at `rows` and `tokens` (m,), which may
    repeat."""

    factor: np.ndarray
    rows: np.ndarray
    tokens: np.ndarray
    gains: np.ndarray

    @classmethod
    def of(cls, each: Sequence[tuple[float, np.ndarray, np.ndarray]]) -> Mixture:
        """From `NgramCache.change` of each row."""
        rows = np.repeat(np.arange(len(each)), [len(tokens) for _, tokens, _ in each])
        factor = np.array([factor for factor, _, _ in each])
        return cls(factor, rows, *(np.concatenate(parts) for parts in list(zip(*each, strict=True))[1:]))


_NONE = np.zeros(0, np.int64)


class NgramCache:
    """The cache of one lane, token by token: `give` every token of the lane, and `mix` what the model says of the
    next one."""

    def __init__(self, levels: Sequence[NgramLevel], bos_id: int) -> None:
        self.levels, self._bos_id = tuple(levels), bos_id
        self._tables: list[dict[tuple[int, ...], dict[int, int]]] = [{} for _ in levels]
        self._lane: list[int] = []
        self._document: list[int] = []

    def mix(self, probs: np.ndarray) -> np.ndarray:
        """(V,) float64 probabilities of the next token from the model's."""
        factor, tokens, gains = self.change()
        mixed = np.asarray(probs, np.float64) * factor
        np.add.at(mixed, tokens, gains)
        return mixed

    def change(self) -> tuple[float, np.ndarray, np.ndarray]:
        """What `mix` does to any distribution: its factor, then tokens (m,) and what is added to each."""
        factor, tokens, gains = 1.0, [_NONE], [np.zeros(0)]
        for level, table in zip(self.levels, self._tables, strict=True):
            followers = table.get(self._context(level) or ())
            if followers:
                whole = sum(followers.values()) + level.strength
                kept = (level.discount * len(followers) + level.strength) / whole
                factor *= kept
                gains = [before * kept for before in gains]
                tokens.append(np.array(list(followers)))
                gains.append((np.array(list(followers.values())) - level.discount) / whole)
        return factor, np.concatenate(tokens), np.concatenate(gains)

    def give(self, token: int) -> None:
        """The token itself."""
        for level, table in zip(self.levels, self._tables, strict=True):
            context = self._context(level)
            if context is not None:
                followers = table.setdefault(context, {})
                followers[token] = followers.get(token, 0) + 1
        if token == self._bos_id:
            self._document = []
            for level, table in zip(self.levels, self._tables, strict=True):
                if level.scope == "document":
                    table.clear()
        longest = max((level.order for level in self.levels), default=0)
        self._lane = [*self._lane, token][-max(longest, 1) :]
        self._document = [*self._document, token][-max(longest, 1) :]

    def _context(self, level: NgramLevel) -> tuple[int, ...] | None:
        """The last tokens, None where there are not yet enough of them."""
        past = self._document if level.scope == "document" else self._lane
        if len(past) < level.order or not past:
            return None
        return tuple(past[len(past) - level.order :])
