"""Integer grids: how a row of float weights becomes small integers and one scale, and back.

One object is used by quantisation-aware training (`fake_quantize`) and by export (`quantize`, `dequantize`), so the
two cannot disagree. Shapes: w_RC float weights, codes_RC int8, scale_R (one scale a row; a vector or a scalar has one
scale for the whole tensor). Rounding is half to even.

By default the scale is rounded to its stored type first and the codes are computed with that stored value; there is no
absolute floor. A row of zeros gets the scale 1 and codes 0. A row so small that its scale underflows to zero in the
stored type is stored as zeros (an error below 1e-5 for fp16 scales), never divided by zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paramgolf.errors import GolfError
from paramgolf.recipe.sections import GridSection

# Fractions of the row maximum tried by clip = "search" (PR 137's script); the first of equals wins.
SEARCH_FACTORS = (0.85, 0.90, 0.925, 0.95, 0.975, 0.99, 0.995, 1.0)
# Clips tried by clip = "mse", evenly spaced in their logarithm from the row's root mean square to its maximum.
MSE_CLIPS = 32
# A row whose standard deviation is below this part of its maximum is constant: k x std says nothing about its range.
CONSTANT_ROW = 1e-6
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Grid:
    """The integer grid of a `GridSection`; pure functions of tensors, on any device."""

    section: GridSection
    qmax: int = field(init=False)  # largest code
    qmin: int = field(init=False)  # smallest code
    steps: float = field(init=False)  # quantisation steps from 0 to the clip
    scale_dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        s = self.section
        if s.clip == "quantile" and not 0 < s.clip_value <= 1:
            raise GolfError(f"clip_value={s.clip_value} of a quantile grid is not in (0, 1]; set clip_value=0.9999984")
        if s.clip == "sdclip" and s.clip_value <= 0:
            raise GolfError("clip_value of an sdclip grid, the k of k x std, must be above 0; set clip_value=12.85")
        if s.scale_bits < 10 and s.scale_dtype != "float16":
            raise GolfError(f"scale_bits={s.scale_bits} is for float16 scales; set scale_dtype = 'float16' or unset it")
        qmax = 2 ** (s.bits - 1) - 1
        object.__setattr__(self, "qmax", qmax)
        object.__setattr__(self, "qmin", -qmax if s.low_code == "symmetric" else -qmax - 1)
        object.__setattr__(self, "steps", qmax + 0.5 if s.low_code == "half" else float(qmax))
        object.__setattr__(self, "scale_dtype", _DTYPES[s.scale_dtype])

    def quantize(self, w: Tensor, importance_C: Tensor | None = None, *, cut: bool = True) -> tuple[Tensor, Tensor]:
        """(codes int8 shaped like `w`, scale in the stored type: (R,) for a matrix, () for a vector or scalar).

        More than two dimensions: every row along the last one has its scale, shaped `w.shape[:-1]`.
        `importance_C`: what a squared error in each column costs, for clips that weigh (see `choose_scale`). `cut`:
        "quantile" and "search" cut at their clip what a floored scale leaves room for above it.
        Raises GolfError on NaN or infinity.
        """
        if not w.is_floating_point():
            raise GolfError(f"only float tensors can be quantised, this one is {w.dtype}; store it as it is")
        if not bool(torch.isfinite(w).all()):
            raise GolfError(f"weights of shape {tuple(w.shape)} hold NaN or infinity: they cannot be quantised")
        rows = w.detach().float().reshape(1, -1) if w.ndim < 2 else w.detach().float()
        if not rows.numel():
            scale = torch.ones(w.shape[:-1], dtype=self.scale_dtype, device=w.device)
            return torch.zeros_like(w, dtype=torch.int8), scale
        codes, scale = self._codes(rows, importance_C, cut)
        codes, stored = codes.to(torch.int8), scale.to(self.scale_dtype)
        return (codes.reshape(w.shape), stored.reshape(())) if w.ndim < 2 else (codes, stored.squeeze(-1))

    def dequantize(self, codes: Tensor, scale: Tensor) -> Tensor:
        """float32(codes) x float32(scale), one scale a row."""
        return codes.float() * (scale.float() if scale.ndim == 0 else scale.float().unsqueeze(-1))

    def fake_quantize(self, w: Tensor) -> Tensor:
        """`dequantize(*quantize(w))` in float32 whose gradient with respect to `w` is the identity, also where clipped.

        No data-dependent Python and no check for NaN: made for `torch.compile`.
        """
        w = w.float()
        with torch.no_grad():
            rows = w.reshape(1, -1) if w.ndim < 2 else w
            codes, scale = self._codes(rows)
            value = (codes * scale).reshape(w.shape)
        return _StraightThrough.apply(w, value)

    def choose_scale(self, rows_RC: Tensor, importance_C: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(scale_R1 float32 before rounding to the stored type, clip_R1: largest magnitude the grid is made for).

        `importance_C` >= 0 (the second moments of the inputs, say) weighs the errors of "search" and "mse", and the
        rows of "sdclip" with `row_weight`. Training has none.
        """
        s = self.section
        peak = rows_RC.abs().amax(-1, keepdim=True)
        if s.clip == "search":
            return self._search(rows_RC, [peak * factor for factor in SEARCH_FACTORS], importance_C)
        if s.clip == "mse":
            rms = rows_RC.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
            ratio = (peak / rms).clamp_min(1.0)
            exponents = [index / (MSE_CLIPS - 1) for index in reversed(range(MSE_CLIPS))]  # of equals the widest
            clips = [torch.minimum(rms * ratio**exponent, peak) for exponent in exponents]
            return self._search(rows_RC, clips, importance_C)
        if s.clip == "quantile":
            clip = row_quantile(rows_RC.abs(), s.clip_value)
        elif s.clip == "sdclip":
            std = rows_RC.std(-1, keepdim=True, correction=1 if rows_RC.shape[-1] > 1 else 0)
            clip = s.clip_value * std
            if s.row_weight and importance_C is not None:
                clip = clip * (1 + s.row_weight * (_row_importance(rows_RC, importance_C) - 1))
            clip = torch.where(std > CONSTANT_ROW * peak, clip, peak)
        else:
            clip = peak
        return self._scale_of(clip)

    def row_scale(self, rows_RC: Tensor, importance_C: Tensor | None = None) -> Tensor:
        """float32 scale_R1 of matrix rows exactly as the stored type holds it; 0 where it underflows."""
        return self._stored(self.choose_scale(rows_RC, importance_C)[0])

    def _scale_of(self, clip_R1: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, clip) after the lower bounds of the section; scale 1 where there is nothing to represent."""
        s = self.section
        clip = clip_R1.clamp_min(s.eps) if s.eps else clip_R1
        scale = clip / self.steps
        if s.floor:
            scale = scale.clamp_min(s.floor)
        largest = torch.finfo(torch.float32).max if s.scale_dtype == "float32" else (2 - 0.5**s.scale_bits) * 2.0**15
        return torch.where(scale == 0, 1.0, scale.clamp_max(largest)), clip

    def _codes(self, rows_RC: Tensor, importance_C: Tensor | None = None, cut: bool = True) -> tuple[Tensor, Tensor]:
        """(codes as float32 integers, float32 scale_R1 that the stored type represents exactly)."""
        scale, clip = self.choose_scale(rows_RC, importance_C)
        stored = self._stored(scale)
        return self._round(rows_RC, stored if self.section.round_scale_first else scale, clip, cut), stored

    def _stored(self, scale_R1: Tensor) -> Tensor:
        if self.scale_dtype != torch.float16:
            return scale_R1
        return round_to_float16(scale_R1, self.section.scale_bits)

    def _round(self, rows_RC: Tensor, scale_R1: Tensor, clip_R1: Tensor, cut: bool = True) -> Tensor:
        if cut and self.section.clip in ("quantile", "search"):
            rows_RC = torch.minimum(torch.maximum(rows_RC, -clip_R1), clip_R1)
        divisor = torch.where(scale_R1 == 0, torch.inf, scale_R1)  # a scale that underflowed: all codes are 0
        return (rows_RC / divisor).round_().clamp_(self.qmin, self.qmax)

    def _search(self, rows_RC: Tensor, clips: list[Tensor], importance_C: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of the clips_R1, for each row the one with the least squared error of what will be decoded; first of equals.

        Columns are weighed by `importance_C` where it is given and positive somewhere.
        """
        best_scale, best_clip = self._scale_of(clips[0])
        best_error: Tensor | None = None
        for tried in clips:
            scale, clip = self._scale_of(tried)
            used = self._stored(scale) if self.section.round_scale_first else scale
            decoded = self._round(rows_RC, used, clip) * used
            error = (decoded - rows_RC).square()
            error = (error if importance_C is None else error * importance_C).mean(-1, keepdim=True)
            if best_error is None:
                best_error = error
                continue
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_clip = torch.where(better, clip, best_clip)
        return best_scale, best_clip


def _row_importance(rows_RC: Tensor, importance_C: Tensor) -> Tensor:
    """(R, 1): the mean of |w| x importance over a row, divided by its mean over the rows; 1 where all are zero."""
    mean_R1 = (rows_RC.abs() * importance_C).mean(-1, keepdim=True)
    overall = mean_R1.mean()
    return torch.where(overall > 0, mean_R1 / overall, 1.0)


class _StraightThrough(torch.autograd.Function):
    """`value` in the forward pass, the identity with respect to `w` in the backward pass."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def round_to_float16(x: Tensor, mantissa: int = 10) -> Tensor:
    """`x.half().float()` for 0 <= x <= 65504, in float32 and integer arithmetic; with fewer than 10 `mantissa` bits

    the nearest float16 whose lowest 10 - mantissa bits are zero (ties to even; subnormal numbers keep all bits).
    Written out because compilers may drop a pair of casts as pointless, and then training would see other scales than
    the file stores.
    """
    bits = x.view(torch.int32)
    drop = 23 - mantissa
    rounded = (bits + ((1 << (drop - 1)) - 1) + ((bits >> drop) & 1)) & ~((1 << drop) - 1)
    subnormal = torch.round(x * 2.0**24) * 2.0**-24
    return torch.where(x < 2.0**-14, subnormal, rounded.view(torch.float32))


def row_quantile(rows_RC: Tensor, q: float) -> Tensor:
    """(R, 1) linearly interpolated quantile of each row, as `torch.quantile` defines it.

    Only the values from the lower neighbour up are ordered: two of them for the levels near 1 that clipping uses,
    where a full sort of every weight in every training step would dominate.
    """
    last = rows_RC.shape[-1] - 1
    rank = float(np.float32(q) * np.float32(last))  # the rank is formed in float32 there too
    low = min(int(rank), last)
    top = torch.topk(rows_RC, last - low + 1, dim=-1).values
    lower = top[..., -1:]
    upper = top[..., -2:-1] if low < last else lower
    return torch.lerp(lower, upper, rank - low)
