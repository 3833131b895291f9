"""Cross entropy of a softcapped head without ever holding all logits.

Suffixes: N positions, D model width, V vocabulary. Logits, softcap and cross entropy are float32; the matrix products
run in the type of `h_ND`. Targets of -1 are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits held at a time, in elements: small enough for a CPU's cache, large enough to fill a GPU.
CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}

ChunkFn = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


def softcap(z: Tensor, cap: float) -> Tensor:
    """cap * tanh(z / cap); cap 0 means none."""
    return cap * torch.tanh(z / cap) if cap else z


def nll_of(z_NV: Tensor, targets_N: Tensor, cap: float) -> Tensor:
    """(N,) float32 nats of each target under the raw logits; 0 where the target is -1."""
    return F.cross_entropy(softcap(z_NV.float(), cap), targets_N, ignore_index=-1, reduction="none")


def nll_and_slope(z_NV: Tensor, targets_N: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """(nll (N,) float32, d nll / d z (N, V) in the type of `z_NV`); both 0 where the target is -1."""
    t_NV = torch.tanh(z_NV.float() / cap) if cap else z_NV.float()
    s_NV = cap * t_NV if cap else t_NV
    valid_N1 = (targets_N >= 0).unsqueeze(-1)
    safe_N1 = targets_N.clamp_min(0).unsqueeze(-1)
    log_total_N1 = torch.logsumexp(s_NV, -1, keepdim=True)
    nll_N = torch.where(valid_N1, log_total_N1 - s_NV.gather(-1, safe_N1), 0.0).squeeze(-1)
    p_NV = torch.exp(s_NV - log_total_N1)
    hit_NV = torch.arange(z_NV.shape[-1], device=z_NV.device) == safe_N1
    slope_NV = torch.where(valid_N1, p_NV - hit_NV.float(), 0.0)
    if cap:
        slope_NV = slope_NV * (1.0 - t_NV * t_NV)
    return nll_N, slope_NV.to(z_NV.dtype)


def chunks(count: int, vocab_size: int, device: torch.device) -> Iterator[slice]:
    """Slices covering `count` positions, all of one length where a fitting divisor exists (one compiled shape)."""
    if count == 0:
        return iter(())
    most = max(1, CHUNK_ELEMENTS.get(device.type, 1 << 24) // vocab_size)
    pieces = -(-count // most)
    even = next((p for p in range(pieces, 2 * pieces + 1) if count % p == 0), pieces)
    size = -(-count // even)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


class FusedLoss(torch.autograd.Function):
    """Sum over positions of the cross entropy of softcap(h W^T).

    The gradients are formed chunk by chunk in the forward pass, while the logits are at hand: the same arithmetic as
    the plain graph without storing (N, V) logits for the backward pass. Differentiable once.
    """

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, w_VD: Tensor, targets_N: Tensor, cap: float, chunk_fn: ChunkFn) -> Tensor:
        w = w_VD.to(h_ND.dtype)
        grad_h_ND = torch.empty_like(h_ND)
        grad_w_VD = torch.zeros_like(w_VD, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        for piece in chunks(h_ND.shape[0], w.shape[0], h_ND.device):
            h = h_ND[piece]
            nll_N, slope_NV = chunk_fn(F.linear(h, w), targets_N[piece], cap)
            total += nll_N.sum()
            torch.mm(slope_NV, w, out=grad_h_ND[piece])
            if w.dtype == torch.float32:
                grad_w_VD.addmm_(slope_NV.t(), h)
            else:
                grad_w_VD += slope_NV.t() @ h
        ctx.save_for_backward(grad_h_ND, grad_w_VD)
        ctx.weight_dtype = w_VD.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_h_ND, grad_w_VD = ctx.saved_tensors
        return grad_h_ND * grad.to(grad_h_ND.dtype), (grad_w_VD * grad).to(ctx.weight_dtype), None, None, None


def chunked_nll(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor, cap: float) -> Tensor:
    """(N,) float32 nats; holds one chunk of logits at a time when no gradient is needed."""
    w = w_VD.to(h_ND.dtype)
    parts = [nll_of(F.linear(h_ND[p], w), targets_N[p], cap) for p in chunks(h_ND.shape[0], w.shape[0], h_ND.device)]
    return torch.cat(parts) if parts else h_ND.new_zeros(0, dtype=torch.float32)
