"""The coefficients of the rule that `golf fit` chooses by, from runs: least squares around published values.

Every coefficient has a value from the literature or from what is known of such models, and a width in which that is
believed; runs move it as far as they have something to say, and what they are silent about stays where it was. Runs of
one series, trained alike but unlike `golf fit` trains, share an offset.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paramgolf.lab.sizing import Rule, Shape, Shapes

# Value and believed width: of the logarithm where it must be positive, as all but the floor. Powers: Hoffmann et al.
# 2022 (0.34 for weights), its replication by Besiroglu et al. 2024 (0.37 for text). The vocabulary's weights: pairs of
# our own runs alike but for the vocabulary, under both budgets that were checked (Tao et al. 2024: a power of 0.67).
# Heights: what the published 16 MB systems reach at convergence (1.22 at 17 M weights), and what models of a megabyte
# do in minutes. The rest: weak beliefs, as Kaplan et al. 2020 found form to matter little.
PRIORS: dict[str, tuple[float, float]] = {
    "floor": (0.90, 0.10),
    "blocks": (0.70, 0.30),
    "blocks_power": (0.34, 0.15),
    "vocab": (0.10, 0.10),
    "vocab_power": (0.50, 0.10),
    "text": (0.27, 0.50),
    "text_power": (0.37, 0.25),
    "batch": (16_384.0, 0.70),
    "batch_power": (0.47, 0.30),
    "row_power": (0.25, 0.60),
    "context": (0.08, 0.50),
    "context_power": (0.50, 0.20),
    "aspect": (0.01, 0.70),
    "best_aspect": (64.0, 0.50),
    "ratio": (0.01, 0.70),
    "best_ratio": (3.0, 0.30),
    "rounding": (0.012, 0.50),
    "rounding_power": (0.30, 0.70),
}
REPEATS = 15.4  # Muennighoff et al. 2023; the sweep trains on more text than it reads
NOISE = 0.010  # bits per byte between two runs that should be equal, and of the rule at its best
# Tokens from which on a power law says what training does; a run of a third of them counts as if noise were nine times.
KNOWN = 2e6
OFFSET = 0.05  # width of the offsets of series
GAP_NOISE = 0.3  # of the logarithm of what rounding costs
# Bytes a token of the shared web text, as tokenised for runs; the sweep measures those in EXTRAPOLATED too.
BYTES_PER_TOKEN = {512: 1.94, 1024: 2.442, 2048: 2.924, 4096: 3.381, 8192: 3.81, 16384: 4.22}
EXTRAPOLATED = (512, 8192, 16384)


def fit(rows: Sequence[Mapping[str, Any]], bytes_per_token: Mapping[int, float]) -> dict[str, Any]:
    """The plain form of a rule (see sizing.RULE_FILE).

    Args:
        rows: runs: `shape` (of sizing.Shape), `tokens`, `val_bpb_float`; where known `block_weights`, `series` (those
            without one were trained as `golf fit` trains), `coarseness` and with it `val_bpb`.
    """
    names = list(PRIORS)
    series = sorted({row["series"] for row in rows if row.get("series")})
    start = np.array([*(_inner(name, PRIORS[name][0]) for name in names), *[0.0] * len(series)])
    widths = np.array([*(PRIORS[name][1] for name in names), *[OFFSET] * len(series)])
    runs = _Runs(rows, series, bytes_per_token)

    def misses(x: np.ndarray) -> np.ndarray:
        told = dict(zip(names, map(_outer, names, x), strict=False))
        return np.concatenate([runs.misses(told, x[len(names) :]), (x - start) / widths])

    found, spread = _least_squares(misses, start)
    numbers = {name: _outer(name, value) for name, value in zip(names, found, strict=False)}
    rule = Rule(**numbers, repeats=REPEATS, bytes_per_token=dict(bytes_per_token))
    left = runs.left(rule, found[len(names) :])
    own = [i for i, row in enumerate(rows) if not row.get("series")]
    return {
        "coefficients": {name: float(f"{value:.5g}") for name, value in numbers.items()} | {"repeats": REPEATS},
        "bytes_per_token": {str(vocab): size for vocab, size in bytes_per_token.items()},
        "evidence": {
            "runs": len(rows),
            "runs_trained_as_chosen": len(own),
            "error_bpb": float(f"{np.sqrt(np.mean(left**2)):.3g}"),
            "offsets": {name: round(float(x), 4) for name, x in zip(series, found[len(names) :], strict=True)},
            # how far runs narrowed each belief: 1 = they said nothing about it
            "left_of_the_prior": {
                name: round(float(s / PRIORS[name][1]), 2) for name, s in zip(names, spread, strict=False)
            },
            "ranges": _Runs([rows[i] for i in own] or rows, [], bytes_per_token).ranges(),
        },
    }


class _Runs:
    """Runs as arrays."""

    def __init__(
        self, rows: Sequence[Mapping[str, Any]], series: Sequence[str], bytes_per_token: Mapping[int, float]
    ) -> None:
        self.shapes = Shapes.of([Shape(*row["shape"]) for row in rows])
        self.tokens = np.array([row["tokens"] for row in rows], dtype=np.float64)
        self.noise = NOISE * np.maximum(1.0, KNOWN / self.tokens) ** 2
        own = self.shapes.block_weights
        self.blocks = np.array([row.get("block_weights") or n for row, n in zip(rows, own, strict=True)], dtype=float)
        self.seen = np.array([row["val_bpb_float"] for row in rows])
        self.bytes = self.tokens * np.array([bytes_per_token[row["shape"][0]] for row in rows])
        self.group = np.array([[row.get("series") == name for name in series] for row in rows], dtype=float)
        self.group = self.group.reshape(len(rows), len(series))
        rounded = [i for i, row in enumerate(rows) if row.get("coarseness") and row["val_bpb"] > row["val_bpb_float"]]
        self.step = np.array([rows[i]["coarseness"] for i in rounded])
        self.share = (self.blocks / self.shapes.vocab_weights)[rounded]
        self.gap = np.array([rows[i]["val_bpb"] - rows[i]["val_bpb_float"] for i in rounded])

    def left(self, rule: Rule, offsets: np.ndarray) -> np.ndarray:
        """Expected less seen, bits per byte (n,)."""
        parts = rule.terms(self.shapes, self.bytes, 0.0, block_weights=self.blocks)
        told = np.zeros(len(self.seen))
        for part in parts.values():
            told = told + part
        return told + self.group @ offsets - self.seen

    def misses(self, numbers: Mapping[str, float], offsets: np.ndarray) -> np.ndarray:
        rule = Rule(**numbers, repeats=REPEATS)
        told = rule.rounding * self.step**2 * self.share**rule.rounding_power
        return np.concatenate([self.left(rule, offsets) / self.noise, (np.log(told) - np.log(self.gap)) / GAP_NOISE])

    def ranges(self) -> dict[str, list[float]]:
        """Smallest and largest of what was run."""
        columns = {name: getattr(self.shapes, name) for name in Shape._fields}
        columns |= {"tokens": self.tokens, "block_weights": self.blocks}
        return {name: [float(c.min()), float(c.max())] if len(c) else [0.0, 0.0] for name, c in columns.items()}


def _inner(name: str, value: float) -> float:
    return value if name == "floor" else math.log(value)


def _outer(name: str, value: float) -> float:
    return float(value) if name == "floor" else math.exp(value)


def _least_squares(misses: Any, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(x with the least sum of squares, standard deviation of each) by Levenberg and Marquardt's steps."""
    x, damping = start.copy(), 1e-2
    r = misses(x)
    for _ in range(300):
        jacobian = _slopes(misses, x)
        normal, slope = jacobian.T @ jacobian, jacobian.T @ r
        step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -slope)
        tried = misses(x + step)
        if tried @ tried < r @ r:
            done = r @ r - tried @ tried < 1e-9 * (r @ r)
            x, r, damping = x + step, tried, max(damping / 4, 1e-9)
            if done:
                break
        elif damping > 1e9:
            break
        else:
            damping *= 4
    jacobian = _slopes(misses, x)
    return x, np.sqrt(np.diag(np.linalg.inv(jacobian.T @ jacobian)))


def _slopes(misses: Any, x: np.ndarray) -> np.ndarray:
    """Central differences."""
    columns = []
    for k in range(len(x)):
        nudge = np.zeros(len(x))
        nudge[k] = 1e-5
        columns.append((misses(x + nudge) - misses(x - nudge)) / 2e-5)
    return np.stack(columns, axis=1)
