"""Rotary position embedding, half-split layout: channel i is paired with channel i + R/2.

R is the number of rotated channels of a head: all K, or the first `model.rope_dims` (#374), the rest knowing nothing of
positions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def stretched_base(base: float, length: int, ref_len: int, dims: int) -> float:
    """The base for inputs of `length` tokens: PR 114 stretches it beyond its reference length (0 = never)."""
    if ref_len and length > ref_len and dims > 2:
        return base * (length / ref_len) ** (dims / (dims - 2))
    return base


def rope_tables(length: int, dims: int, base: float) -> tuple[Tensor, Tensor]:
    """(cos, sin) float32 of shape (length, dims / 2), made on the CPU, so that every device sees the same tables.

    Angles are formed in float32 as the reference scripts do (off by up to 1e-4 at position 2000): a table that is more
    exact than theirs moves weights across rounding ties of fake quantisation, and their trajectories are lost.
    """
    inverse = 1.0 / base ** (torch.arange(0, dims, 2, dtype=torch.float32, device="cpu") / dims)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device="cpu"), inverse)
    return angle.cos(), angle.sin()


def apply_rope(x_BTHK: Tensor, cos_TJ: Tensor, sin_TJ: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + J]) by the angle of their position; channels from 2 J on stay."""
    cos, sin = cos_TJ[None, :, None, :], sin_TJ[None, :, None, :]
    rotated = 2 * cos_TJ.shape[-1]
    if rotated == x_BTHK.shape[-1]:
        a, b = x_BTHK.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)
    a, b = x_BTHK[..., :rotated].chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, x_BTHK[..., rotated:]), dim=-1)
