"""The kernels that may compute attention, each behind the same small face. `attention.choose` picks one.

A backend is `(q_BTHK, k_BSGK, v_BSGK) -> y_BTHK`: causal, scale 1/sqrt(K), query head h reads key/value head
h // (H / G), and the T queries are the last T of the S positions (S > T when decoding with a cache).
`why_not(device, dtype, head_dim)` is "" when it can run there, else the reason.
"""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor


class PlainMath:
    """The definition, in float32: slow, needs (T, S) memory a head, runs everywhere."""

    @staticmethod
    def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        return ""

    def __call__(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Tensor:
        groups = q_BTHK.shape[2] // k_BSGK.shape[2]
        length, span = q_BTHK.shape[1], k_BSGK.shape[1]
        k = k_BSGK.float().repeat_interleave(groups, dim=2)
        v = v_BSGK.float().repeat_interleave(groups, dim=2)
        score_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK.float(), k) * q_BTHK.shape[-1] ** -0.5
        score_BHTS = score_BHTS.masked_fill(~causal_mask(length, span, q_BTHK.device), float("-inf"))
        return torch.einsum("bhts,bshk->bthk", score_BHTS.softmax(-1), v).to(q_BTHK.dtype)


class ScaledDotProduct:
    """The framework's fused kernel (flash attention where it has one)."""

    @staticmethod
    def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        return ""

    def __call__(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Tensor:
        length, span = q_BTHK.shape[1], k_BSGK.shape[1]
        # The fused causal flag means "aligned at the first position", so a cache needs an explicit mask; one query
        # sees everything and needs none.
        mask = causal_mask(length, span, q_BTHK.device) if 1 < length < span else None
        y_BHTK = F.scaled_dot_product_attention(
            q_BTHK.transpose(1, 2),
            k_BSGK.transpose(1, 2),
            v_BSGK.transpose(1, 2),
            attn_mask=mask,
            is_causal=length == span,
            enable_gqa=q_BTHK.shape[2] != k_BSGK.shape[2],
        )
        return y_BHTK.transpose(1, 2)


class FlashAttention3:
    """FlashAttention-3 for Hopper GPUs, where its package is installed."""

    def __init__(self) -> None:
        self._attend = importlib.import_module("flash_attn_interface").flash_attn_func

    @staticmethod
    def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        if device.type != "cuda":
            return f"fa3 needs a CUDA device, this is {device.type}"
        if torch.cuda.get_device_capability(device)[0] != 9:
            return "fa3 needs a Hopper GPU (compute capability 9)"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"fa3 needs bfloat16 or float16, the compute type is {str(dtype).removeprefix('torch.')}"
        if head_dim % 8 or head_dim > 256:
            return f"fa3 needs a head dimension that is a multiple of 8 and at most 256, this is {head_dim}"
        try:
            importlib.import_module("flash_attn_interface")
        except Exception as error:  # a broken binary raises more than ImportError; the reason is kept and reported
            return f"flash_attn_interface cannot be imported ({type(error).__name__}: {error})"
        return ""

    def __call__(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Tensor:
        out = self._attend(q_BTHK, k_BSGK, v_BSGK, causal=True)  # its causal mask is aligned at the last position
        return out[0] if isinstance(out, tuple) else out


def causal_mask(length: int, span: int, device: torch.device) -> Tensor:
    """(T, S) bool, true where query t, the (S - T + t)-th position, may look."""
    past = span - length
    return torch.ones(length, span, dtype=torch.bool, device=device).tril(past)
