"""Autograd functions over kernels.c. Tensors are contiguous bfloat16 on the CPU unless said otherwise.

Suffixes: B batch, T time, D model width, H query heads, G key/value heads, K head width, V vocabulary, N = B x T,
W = (H + 2 G) K, J rotary pairs (at most K / 2).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paramgolf.model.native.build import load

CHUNK_ELEMENTS = 1 << 21  # logits held at a time: 4 MiB of bfloat16 stay in the cache


def _at(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _array(tensors: Sequence[Tensor | None]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*[_at(t) for t in tensors])


def _row_major(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


class FusedAttention(torch.autograd.Function):
    """(B, T, H K) from qkv (B, T, W): per-head RMS norm and rotation of q and k, gain of q, causal attention.

    `cos_TJ`, `sin_TJ` and `gain_H` are float32. `first_BT` (int32): the first key that each query sees, where its
    document begins; None = 0. T is a multiple of 32, K one of 16 and at most 256.
    Nothing of size T x T is stored; the backward pass computes the scores again.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv_BTW: Tensor, cos_TJ: Tensor, sin_TJ: Tensor, gain_H: Tensor, first_BT: Tensor | None,
        kv_heads: int, eps: float,
    ) -> Tensor:  # fmt: skip
        batch, length, width = qkv_BTW.shape
        heads = gain_H.numel()
        head_dim = width // (heads + 2 * kv_heads)
        y_BTD = qkv_BTW.new_empty(batch, length, heads * head_dim)
        lse_BHT = torch.empty(batch, heads, length)
        sizes = (batch, length, heads, kv_heads, head_dim, cos_TJ.shape[1])
        gain_H = gain_H.detach().contiguous()
        load().attn_fwd(
            *sizes, _at(qkv_BTW), _at(cos_TJ), _at(sin_TJ), _at(gain_H), _at(first_BT), eps, _at(y_BTD), _at(lse_BHT)
        )  # fmt: skip
        ctx.save_for_backward(qkv_BTW, cos_TJ, sin_TJ, gain_H, first_BT, y_BTD, lse_BHT)
        ctx.sizes, ctx.eps = sizes, eps
        return y_BTD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        qkv_BTW, cos_TJ, sin_TJ, gain_H, first_BT, y_BTD, lse_BHT = ctx.saved_tensors
        grad_BTD = grad_BTD.contiguous()
        d_qkv = torch.empty_like(qkv_BTW)
        d_gain_BH = torch.empty(qkv_BTW.shape[0], gain_H.numel())
        load().attn_bwd(
            *ctx.sizes, _at(qkv_BTW), _at(cos_TJ), _at(sin_TJ), _at(gain_H), _at(first_BT), ctx.eps, _at(y_BTD),
            _at(lse_BHT), _at(grad_BTD), _at(d_qkv), _at(d_gain_BH),
        )  # fmt: skip
        return d_qkv, None, None, d_gain_BH.sum(0), None, None, None


class Mix(torch.autograd.Function):
    """x = sum_k c_k * in_k and n = rms(x): one pass over memory for a sum of streams and the norm that follows it.

    Arguments: eps, want ("x", "n" or "xn": what is returned), then in_1, c_1, in_2, c_2, ... with in_k (..., D)
    bfloat16 and c_k (D,) float32 or None for 1. Sums and the norm are float32.
    """

    @staticmethod
    def forward(ctx: Any, eps: float, want: str, *terms: Tensor | None) -> Any:
        streams = [t.contiguous() for t in terms[0::2] if t is not None]
        factors = [None if c is None else c.detach().contiguous() for c in terms[1::2]]
        width = streams[0].shape[-1]
        rows = streams[0].numel() // width
        alone = len(streams) == 1 and factors[0] is None
        x = streams[0] if alone else torch.empty_like(streams[0])
        n = torch.empty_like(x) if "n" in want else None
        rstd = torch.empty(rows)
        load().mix_fwd(
            rows, width, len(streams), _array(streams), _array(factors), eps,
            None if alone else _at(x), _at(n), _at(rstd),
        )  # fmt: skip
        # A stream without a factor is not needed again: its gradient is that of x.
        kept = [s if c is not None else None for s, c in zip(streams, factors, strict=True)]
        ctx.save_for_backward(x, rstd, *kept, *factors)
        ctx.want, ctx.sizes = want, (rows, width, len(streams))
        ctx.set_materialize_grads(False)
        if want == "n":
            return n
        x = x.view_as(x) if alone else x
        return x if want == "x" else (x, n)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        count = ctx.sizes[2]
        x, rstd, *rest = ctx.saved_tensors
        kept, factors = rest[:count], rest[count:]
        grad_x = _row_major(grads[0]) if "x" in ctx.want else None
        grad_n = _row_major(grads[-1]) if "n" in ctx.want else None
        needed = ctx.needs_input_grad[2:]
        d_streams = [torch.empty_like(x) if needed[2 * k] else None for k in range(count)]
        d_factors = [
            torch.empty_like(c) if c is not None and needed[2 * k + 1] else None for k, c in enumerate(factors)
        ]
        load().mix_bwd(
            *ctx.sizes, _array(kept), _array(factors), _at(x), _at(rstd), _at(grad_x), _at(grad_n),
            _array(d_streams), _array(d_factors),
        )  # fmt: skip
        pairs = zip(d_streams, d_factors, strict=True)
        return (None, None, *[g for pair in pairs for g in pair])


class Squared(torch.autograd.Function):
    """f(u)^2 with f the leaky ReLU of `slope` (0: ReLU); u has a multiple of 16 elements."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, slope: float) -> Tensor:
        y = torch.empty_like(u)
        load().square_fwd(u.numel(), slope, _at(u), _at(y))
        ctx.save_for_backward(u)
        ctx.slope = slope
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (u,) = ctx.saved_tensors
        grad = grad.contiguous()
        d_u = torch.empty_like(u)
        load().square_bwd(u.numel(), ctx.slope, _at(u), _at(grad), _at(d_u))
        return d_u, None


def _nll(h_ND: Tensor, w_DV: Tensor, targets_N: Tensor, cap: float, nll_N: Tensor, z_NV: Tensor, grad: bool) -> Tensor:
    """Fill `nll_N`; returns the (N, V) buffer with the logits' gradient (of the sum) when `grad`."""
    z_NV = z_NV[: h_ND.shape[0]]
    torch.mm(h_ND, w_DV, out=z_NV)
    load().softcap_ce(*z_NV.shape, _at(z_NV), _at(targets_N), cap, 1.0, _at(nll_N), int(grad))
    return z_NV


def _pieces(count: int, vocab_size: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // vocab_size)
    return [slice(i, min(i + step, count)) for i in range(0, count, step)]


class NativeLoss(torch.autograd.Function):
    """Sum of the cross entropy of softcap(h W^T): as model.loss.FusedLoss, with bfloat16 logits turned into their own
    gradient in place. h (N, D) and w (V, D) are bfloat16, V a multiple of 16 up to 8192, cap > 0."""

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, w_VD: Tensor, targets_N: Tensor, cap: float) -> Tensor:
        nll_N = torch.empty(h_ND.shape[0])
        grad_h_ND = torch.empty_like(h_ND)
        grad_w_VD = torch.zeros(w_VD.shape)
        pieces = _pieces(h_ND.shape[0], w_VD.shape[0])
        buffer = h_ND.new_empty(pieces[0].stop if pieces else 0, w_VD.shape[0])
        for p in pieces:
            z_NV = _nll(h_ND[p], w_VD.t(), targets_N[p], cap, nll_N[p], buffer, True)
            torch.mm(z_NV, w_VD, out=grad_h_ND[p])
            grad_w_VD += z_NV.t() @ h_ND[p]
        ctx.save_for_backward(grad_h_ND, grad_w_VD)
        return nll_N.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_h_ND, grad_w_VD = ctx.saved_tensors
        return grad_h_ND * grad.to(grad_h_ND.dtype), (grad_w_VD * grad).to(grad_h_ND.dtype), None, None


def native_nll(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor, cap: float) -> Tensor:
    """(N,) float32 nats of each target, 0 where it is -1; no gradient."""
    nll_N = torch.empty(h_ND.shape[0])
    pieces = _pieces(h_ND.shape[0], w_VD.shape[0])
    buffer = h_ND.new_empty(pieces[0].stop if pieces else 0, w_VD.shape[0])
    for p in pieces:
        _nll(h_ND[p], w_VD.t(), targets_N[p], cap, nll_N[p], buffer, False)
    return nll_N
