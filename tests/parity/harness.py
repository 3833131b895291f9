"""What a parity check returns, and the two ways to compare."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Check:
    """One comparison: `error` must not exceed `tolerance` (both in the units the fixture's README gives)."""

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return bool(np.isfinite(self.error)) and self.error <= self.tolerance


def worst(name: str, ours: object, reference: object, tolerance: float, *, relative: bool = False) -> Check:
    """Largest absolute difference (relative: divided by the reference's largest magnitude)."""
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if a.shape != b.shape:
        return Check(f"{name} (shape {a.shape} against {b.shape})", float("inf"), tolerance)
    error = float(np.max(np.abs(a - b), initial=0.0))
    if relative:
        error /= max(float(np.max(np.abs(b), initial=0.0)), 1e-30)
    return Check(name, error, tolerance)


def exact(name: str, ours: object, reference: object) -> Check:
    """Number of entries that differ; none may."""
    a, b = np.asarray(ours), np.asarray(reference)
    if a.shape != b.shape:
        return Check(f"{name} (shape {a.shape} against {b.shape})", float("inf"), 0.0)
    return Check(name, float(np.count_nonzero(a != b)), 0.0)
