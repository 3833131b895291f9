"""Components of the model in the form that serves whole rows in training and scoring."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paramgolf.model.layers import Linear, rms_norm
from paramgolf.model.rope import apply_rope


class Attention(nn.Module):
    """model/attention.py without caches, document masks and layer parts, by PyTorch's own kernel."""

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, qk_gain: float, norm_eps: float) -> None:
        super().__init__()
        self.head_dim, self.norm_eps = dim // num_heads, norm_eps
        self.c_q = Linear(dim, dim)
        self.c_k = Linear(dim, num_kv_heads * self.head_dim)
        self.c_v = Linear(dim, num_kv_heads * self.head_dim)
        self.proj = Linear(dim, dim)
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain))

    def forward(self, n_BTD: Tensor, rope: tuple[Tensor, Tensor], extras: dict[str, Any]) -> Tensor:
        batch, length, _ = n_BTD.shape
        q, k, v = [f(n_BTD).view(batch, length, -1, self.head_dim) for f in (self.c_q, self.c_k, self.c_v)]
        q = apply_rope(rms_norm(q.float(), self.norm_eps), *rope) * self.q_gain[:, None]
        k = apply_rope(rms_norm(k.float(), self.norm_eps), *rope)
        q, k, v = [t.to(n_BTD.dtype).transpose(1, 2) for t in (q, k, v)]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self.proj(y.transpose(1, 2).reshape(batch, length, -1))
