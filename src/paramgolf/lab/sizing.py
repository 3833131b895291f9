"""What a shape of model is expected to reach in so many bytes and tokens, and how long its steps take. No torch.

The rule is the parametric loss of Hoffmann et al. 2022 (arXiv 2203.15556) in bits per byte. The vocabulary's weights
are a term of their own (Tao et al. 2024, arXiv 2407.13623), text is counted in bytes, a batch wastes what McCandlish et
al. 2018 (arXiv 1812.06162) say, less the longer training lasts (Zhang et al. 2024, arXiv 2410.21676), and repeated text
is worth what Muennighoff et al. 2023 (arXiv 2305.16264) say. The coefficients lie in fit_rule.json and are made by
`python -m bench.fit_sweep --fit`; docs/fit.md says what they rest on. Step times are a sum of kinds of work, each at
the rate that was measured here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from paramgolf.errors import GolfError

HEAD = 64  # channels of a head
RULE_FILE = "fit_rule.json"
_MILLION, _TEN_MILLION = 1e6, 1e7
_ROW, _NS_STEPS = 256, 5  # tokens of a row where row terms are one; iterations that orthogonalise


class Shape(NamedTuple):
    """What is chosen of a model and its training, but for the grids."""

    vocab: int
    layers: int
    dim: int
    hidden: int  # of the MLP
    seq_len: int
    batch: int  # tokens of a step


@dataclass(frozen=True)
class Shapes:
    """Many shapes: int64 arrays that broadcast with one another."""

    vocab: np.ndarray
    layers: np.ndarray
    dim: np.ndarray
    hidden: np.ndarray
    seq_len: np.ndarray
    batch: np.ndarray

    @staticmethod
    def of(shapes: Sequence[Shape]) -> Shapes:
        """Arrays (n,)."""
        return Shapes(*np.array(shapes, dtype=np.int64).reshape(-1, len(Shape._fields)).T)

    @property
    def kv_dim(self) -> np.ndarray:
        """Channels of the keys, and of the values."""
        kv = np.vectorize(kv_heads, otypes=[np.int64])
        return HEAD * kv(self.dim // HEAD)

    @property
    def block_weights(self) -> np.ndarray:
        """Of all matrices but the embedding."""
        return self.layers * self.dim * (2 * self.dim + 2 * self.kv_dim + 2 * self.hidden)

    @property
    def vocab_weights(self) -> np.ndarray:
        return self.vocab * self.dim


def kv_heads(heads: int) -> int:
    """Key and value heads beside so many query heads: about a third, as pocket has."""
    return next(kv for kv in range(max(1, heads // 3), 0, -1) if heads % kv == 0)


# -- the loss --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """Coefficients of the expected loss, bits per byte of web text, standard windows, no n-gram cache."""

    floor: float  # what no size and no training goes below
    blocks: float  # times (a million over the weights of the blocks) ^ blocks_power
    blocks_power: float
    vocab: float  # the same of the embedding's weights
    vocab_power: float
    text: float  # times (10 MB over the effective bytes trained on) ^ text_power
    text_power: float
    batch: float  # tokens of a step at which, after 10 MB, a token is worth half of one in a small batch
    batch_power: float  # that number grows with this power of the bytes trained on
    row_power: float  # text in rows of T tokens is worth (T / 256) ^ -row_power
    context: float  # times (256 / T) ^ context_power: what short windows cannot see
    context_power: float
    aspect: float  # times the squared log of (dim / layers) / best_aspect
    best_aspect: float
    ratio: float  # times the squared log of (hidden / dim) / best_ratio
    best_ratio: float
    rounding: float  # of pocket's grids; grows with the square of the step
    rounding_power: float  # and with this power of the blocks' weights over the embedding's, whose grid is finer
    repeats: float  # passes after which a further one is worth 1/e of the first
    bytes_per_token: dict[int, float] = field(default_factory=dict)  # of web text by vocabulary
    evidence: dict[str, Any] = field(default_factory=dict)  # what the coefficients were fitted to

    @staticmethod
    def load() -> Rule:
        """The rule that ships with the package."""
        return Rule.of(json.loads((resources.files("paramgolf") / "lab" / RULE_FILE).read_text(encoding="utf-8")))

    @staticmethod
    def of(table: dict[str, Any]) -> Rule:
        """From the plain form of the file. GolfError for one that is not complete."""
        names = {f.name for f in fields(Rule)} - {"bytes_per_token", "evidence"}
        try:
            numbers = {name: float(table["coefficients"][name]) for name in names}
            sizes = {int(vocab): float(size) for vocab, size in table["bytes_per_token"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise GolfError(f"{RULE_FILE} is no rule ({error!r}); make it again: bench.fit_sweep --fit") from None
        return Rule(**numbers, bytes_per_token=dict(sorted(sizes.items())), evidence=table.get("evidence", {}))

    def token_bytes(self, vocab: np.ndarray | int) -> np.ndarray:
        """Bytes a token of web text, between the known vocabularies along their logarithm."""
        known = np.log2(np.array(list(self.bytes_per_token), dtype=np.float64))
        return np.interp(np.log2(vocab), known, np.array(list(self.bytes_per_token.values())))

    def worth(self, text_bytes: np.ndarray, unique_bytes: float) -> np.ndarray:
        """Bytes of fresh text that so many bytes of training are worth, where only `unique_bytes` are different."""
        if not unique_bytes:
            return text_bytes
        again = np.maximum(text_bytes / unique_bytes - 1.0, 0.0)
        seen = unique_bytes * (1.0 + self.repeats * -np.expm1(-again / self.repeats))
        return np.where(text_bytes <= unique_bytes, text_bytes, seen)

    def terms(
        self, shapes: Shapes, text_bytes: np.ndarray, coarseness: np.ndarray | float = 1.0, *,
        unique_bytes: float = 0.0, block_weights: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """Parts of the expected loss, which sum to it.

        Args:
            text_bytes: trained on, repeats counted.
            coarseness: of the grids: steps in units of pocket's; 0 = not rounded.
            unique_bytes: of different text; 0 = no end of it.
            block_weights: where they are not those of `shapes`.
        """
        blocks = shapes.block_weights if block_weights is None else block_weights
        rows = shapes.seq_len / _ROW
        least = self.batch * (np.maximum(text_bytes, 1.0) / _TEN_MILLION) ** self.batch_power
        fresh = self.worth(text_bytes, unique_bytes) * rows**-self.row_power / (1.0 + shapes.batch / least)
        return {
            "floor": np.full(np.shape(fresh), self.floor),
            "blocks": self.blocks * (_MILLION / blocks) ** self.blocks_power,
            "vocabulary": self.vocab * (_MILLION / shapes.vocab_weights) ** self.vocab_power,
            "training": self.text * (_TEN_MILLION / np.maximum(fresh, 1.0)) ** self.text_power,
            "context": self.context * rows**-self.context_power,
            "form": self.aspect * np.log(shapes.dim / shapes.layers / self.best_aspect) ** 2
            + self.ratio * np.log(shapes.hidden / shapes.dim / self.best_ratio) ** 2,
            "rounding": self.rounding
            * np.asarray(coarseness, dtype=np.float64) ** 2
            * (blocks / shapes.vocab_weights) ** self.rounding_power,
        }

    def loss(
        self, shapes: Shapes, text_bytes: np.ndarray, coarseness: np.ndarray | float = 1.0, *, unique_bytes: float = 0.0
    ) -> np.ndarray:  # fmt: skip
        """The expected loss in bits per byte; never more with more text, finer grids or more different text."""
        parts = self.terms(shapes, text_bytes, coarseness, unique_bytes=unique_bytes).values()
        total = np.zeros(())
        for part in parts:
            total = total + part
        return total


# -- the time --------------------------------------------------------------------------------------------------------

KINDS = (
    "matrix products of the blocks", "matrix products of the head", "attention", "the rest of a layer",
    "orthogonalising", "other updates", "a layer's calls",
)  # fmt: skip


def work(shapes: Shapes) -> np.ndarray:
    """How much of each of KINDS a step has, float64 (..., 7): FLOPs, channels and weights in billions, and layers."""
    d, kv, h, tokens = shapes.dim, shapes.kv_dim, shapes.hidden, shapes.batch

    def orthogonalised(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return _NS_STEPS * (4.0 * rows**2 * columns + 2.0 * rows**3)

    matrices = (
        2 * orthogonalised(d, d) + 2 * orthogonalised(kv, d) + 2 * orthogonalised(np.minimum(d, h), np.maximum(d, h))
    )
    kinds = (
        6.0 * shapes.block_weights * tokens,
        6.0 * shapes.vocab_weights * tokens,
        6.0 * shapes.layers * shapes.seq_len * d * tokens,
        1.0 * shapes.layers * d * tokens,
        shapes.layers * matrices,
        1.0 * (shapes.block_weights + shapes.vocab_weights),
        1e9 * shapes.layers,
    )
    return np.stack([kind / 1e9 for kind in np.broadcast_arrays(*kinds)], axis=-1)


@dataclass(frozen=True)
class Rates:
    """Seconds that each of KINDS takes here, and what a run needs beside its steps."""

    seconds: tuple[float, ...]  # one for each of KINDS
    before: float  # seconds from the start of a run to its first step
    device: str = "cpu"
    how: str = ""
    timed: tuple[tuple[Shape, float], ...] = ()  # steps that were timed, in seconds

    def step_seconds(self, shapes: Shapes) -> np.ndarray:
        return work(shapes) @ np.array(self.seconds)

    @property
    def error(self) -> float:
        """Root mean square of the relative differences between these rates and what was timed."""
        if not self.timed:
            return 0.0
        seconds = np.array([seconds for _, seconds in self.timed])
        told = self.step_seconds(Shapes.of([shape for shape, _ in self.timed]))
        return float(np.sqrt(np.mean((told / seconds - 1.0) ** 2)))


def solve_rates(timed: Sequence[tuple[Shape, float]], weights: Sequence[float] = ()) -> tuple[float, ...]:
    """Rates that explain timed steps with the least squared relative error, none of them negative.

    Args:
        timed: shapes and the seconds of one step of each.
        weights: how much each counts; equal without.
    """
    seconds = np.array([s for _, s in timed])
    if not len(seconds) or not np.all(np.isfinite(seconds)) or np.any(seconds <= 0):
        raise GolfError("the steps that were timed took no time that could be measured; try again")
    trust = np.sqrt(np.array(weights) if len(weights) else np.ones(len(seconds)))
    rows = work(Shapes.of([shape for shape, _ in timed])) * (trust / seconds)[:, None]
    scale = np.linalg.norm(rows, axis=0)
    rows = rows / scale
    # Seven unknowns from about as many steps: a small pull to zero makes the answer unique.
    gram, right = rows.T @ rows + 1e-4 * np.eye(len(scale)), rows.T @ trust
    found = np.zeros(len(scale))
    for _ in range(20_000):
        before = found.copy()
        for k in range(len(found)):
            found[k] = max(0.0, found[k] + (right[k] - gram[k] @ found) / gram[k, k])
        if np.abs(found - before).max() < 1e-12 * max(1.0, found.max()):
            break
    return tuple(float(rate) for rate in found / scale)
