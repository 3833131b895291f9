"""The kernels that may compute attention, each behind the same small face. `attention.choose` picks one.

A backend is `(q_BTHK, k_BSGK, v_BSGK[, mask]) -> y_BTHK`: causal, scale 1/sqrt(K), query head h reads key/value head
h // (H / G), and the T queries are the last T of the S positions (S > T when decoding with a cache).
`why_not(device, dtype, head_dim)` is "" when it can run there, else the reason. `mask(segments_BT, room, longest)` puts
the documents of a batch (see documents.py) into the form that the kernel wants, once for all layers; every backend
also takes the dense (B, 1, T, S) form, which is what decoding uses.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paramgolf.model.documents import bounds, causal_mask, cumulative_lengths, dense_mask

# Rows longer than this have no dense mask: their segments are computed one by one.
DENSE_LENGTH = 4096


class PlainMath:
    """The definition, in float32: slow, needs (T, S) memory a head, runs everywhere."""

    @staticmethod
    def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        return ""

    def mask(self, segments_BT: Tensor, room: int, longest: int) -> Tensor:
        return dense_mask(segments_BT, segments_BT.shape[1])

    def __call__(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Tensor | None = None) -> Tensor:
        groups = q_BTHK.shape[2] // k_BSGK.shape[2]
        length, span = q_BTHK.shape[1], k_BSGK.shape[1]
        k = k_BSGK.float().repeat_interleave(groups, dim=2)
        v = v_BSGK.float().repeat_interleave(groups, dim=2)
        score_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK.float(), k) * q_BTHK.shape[-1] ** -0.5
        seen = causal_mask(length, span, q_BTHK.device) if mask is None else mask
        score_BHTS = score_BHTS.masked_fill(~seen, float("-inf"))
        return torch.einsum("bhts,bshk->bthk", score_BHTS.softmax(-1), v).to(q_BTHK.dtype)


class ScaledDotProduct:
    """The framework's fused kernel (flash attention where it has one)."""

    @staticmethod
    def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        return ""

    def mask(self, segments_BT: Tensor, room: int, longest: int) -> Tensor | list[int]:
        length = segments_BT.shape[1]
        return dense_mask(segments_BT, length) if length <= DENSE_LENGTH else bounds(segments_BT)

    def __call__(
        self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Tensor | list[int] | None = None
    ) -> Tensor:
        if isinstance(mask, list):
            return self._one_by_one(q_BTHK, k_BSGK, v_BSGK, mask)
        length, span = q_BTHK.shape[1], k_BSGK.shape[1]
        # The fused causal flag means "aligned at the first position", so a cache needs an explicit mask; one query
        # sees everything and needs none.
        if mask is None and 1 < length < span:
            mask = causal_mask(length, span, q_BTHK.device)
        y_BHTK = F.scaled_dot_product_attention(
            q_BTHK.transpose(1, 2),
            k_BSGK.transpose(1, 2),
            v_BSGK.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None and length == span,
            enable_gqa=q_BTHK.shape[2] != k_BSGK.shape[2],
        )
        return y_BHTK.transpose(1, 2)

    def _one_by_one(self, q: Tensor, k: Tensor, v: Tensor, ends: list[int]) -> Tensor:
        """Each segment of the flattened rows by itself."""
        if torch.compiler.is_compiling():  # every batch would be a graph of its own
            raise RuntimeError(f"documents in rows above {DENSE_LENGTH} tokens cannot be compiled with this kernel")
        flat = [t.flatten(0, 1).unsqueeze(0) for t in (q, k, v)]
        pieces = [self(*(t[:, a:b] for t in flat)) for a, b in pairwise(ends)]
        return torch.cat(pieces, 1).view_as(q)


class _Ragged:
    """What the kernels for packed rows share: the mask is (cu_seqlens (room + 1,) int32, longest)."""

    def mask(self, segments_BT: Tensor, room: int, longest: int) -> tuple[Tensor, int]:
        return cumulative_lengths(segments_BT, room), longest


class FlashAttention3(_Ragged):
    """FlashAttention-3 for Hopper GPUs, where its package is installed."""

    def __init__(self) -> None:
        module = importlib.import_module("flash_attn_interface")
        self._attend, self._attend_packed = module.flash_attn_func, module.flash_attn_varlen_func

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

    def __call__(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Any = None) -> Tensor:
        if isinstance(mask, Tensor):
            return ScaledDotProduct()(q_BTHK, k_BSGK, v_BSGK, mask)
        if mask is None:
            out = self._attend(q_BTHK, k_BSGK, v_BSGK, causal=True)  # its causal mask is aligned at the last position
            return out[0] if isinstance(out, tuple) else out
        ends, longest = mask
        flat = [t.flatten(0, 1) for t in (q_BTHK, k_BSGK, v_BSGK)]
        out = self._attend_packed(
            *flat, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=longest, max_seqlen_k=longest, causal=True
        )
        return (out[0] if isinstance(out, tuple) else out).view_as(q_BTHK)


class VariableLength(_Ragged):
    """The framework's flash attention for packed rows; without documents it is its usual kernel."""

    def __init__(self) -> None:
        self._attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        known = inspect.signature(self._attend).parameters  # earlier versions of torch have another word for it
        self._causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
        self._groups = "enable_gqa" in known

    @staticmethod
    def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        if device.type != "cuda":
            return f"varlen needs a CUDA device, this is {device.type}"
        if torch.cuda.get_device_capability(device)[0] < 8:
            return "varlen needs a GPU of compute capability 8 or newer"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"varlen needs bfloat16 or float16, the compute type is {str(dtype).removeprefix('torch.')}"
        if head_dim % 8 or head_dim > 256:
            return f"varlen needs a head dimension that is a multiple of 8 and at most 256, this is {head_dim}"
        if importlib.util.find_spec("torch.nn.attention.varlen") is None:
            return "this torch has no variable-length attention"
        return ""

    def __call__(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Any = None) -> Tensor:
        if mask is None or isinstance(mask, Tensor):
            return ScaledDotProduct()(q_BTHK, k_BSGK, v_BSGK, mask)
        ends, longest = mask
        options = self._causal | ({"enable_gqa": q_BTHK.shape[2] != k_BSGK.shape[2]} if self._groups else {})
        flat = [t.flatten(0, 1) for t in (q_BTHK, k_BSGK, v_BSGK)]
        out = self._attend(*flat, ends, ends, longest, longest, **options)
        return (out[0] if isinstance(out, tuple) else out).view_as(q_BTHK)


class FlexAttention:
    """The framework's kernel generator: skips what a mask forbids in blocks."""

    def __init__(self) -> None:
        from torch.nn.attention import flex_attention as flex

        self._flex = flex

    @staticmethod
    def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        if device.type != "cuda":
            return f"flex has no backward pass on {device.type}"
        return "" if importlib.util.find_spec("triton") is not None else "flex needs triton"

    def mask(self, segments_BT: Tensor, room: int, longest: int) -> Any:
        batch, length = segments_BT.shape

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q >= k) & (segments_BT[b, q] == segments_BT[b, k])

        make = _compiled(self._flex.create_block_mask) if segments_BT.is_cuda else self._flex.create_block_mask
        return make(seen, batch, None, length, length, device=str(segments_BT.device))

    def __call__(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Any = None) -> Tensor:
        if mask is None or isinstance(mask, Tensor):
            return ScaledDotProduct()(q_BTHK, k_BSGK, v_BSGK, mask)
        attend = _compiled(self._flex.flex_attention) if q_BTHK.is_cuda else self._flex.flex_attention
        y_BHTK = attend(
            q_BTHK.transpose(1, 2), k_BSGK.transpose(1, 2), v_BSGK.transpose(1, 2),
            block_mask=mask, enable_gqa=q_BTHK.shape[2] != k_BSGK.shape[2],
        )  # fmt: skip
        return y_BHTK.transpose(1, 2)


@cache
def _compiled(function: Any) -> Any:
    """`function` compiled by itself: on a GPU its uncompiled form needs (T, T) memory."""
    return torch.compile(function)
