"""Causal grouped-query attention, and the one door through which its kernel is chosen.

Suffixes: B batch, T query positions, S key positions, D model width, H query heads, G key/value heads, K head width,
J rotary pairs (K / 2 unless model.rope_dims says less).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paramgolf.errors import GolfError
from paramgolf.model.cache import LayerCache
from paramgolf.model.layers import Linear, rms_norm
from paramgolf.model.registry import ATTENTION_BACKENDS, DENSE_ATTENTION, MASKED_ATTENTION
from paramgolf.model.rope import apply_rope

Attend = Callable[..., Tensor]
MASK = "mask"  # key in `extras` of the documents' mask, in the backend's own form


@dataclass(frozen=True)
class AttentionChoice:
    """The backend in use, and why the preferred ones are not ("" when the first choice runs)."""

    name: str
    reason: str
    attend: Attend

    def mask(self, segments_BT: Tensor, room: int, longest: int) -> Any:
        """The mask of these documents as the backend wants it; at most `room` segments of at most `longest` tokens."""
        return self.attend.mask(segments_BT, room, longest)  # type: ignore[attr-defined]


def choose(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, masked: bool = False
) -> AttentionChoice:  # fmt: skip
    """The backend called `name`, or for "auto" the first that can run, in the order for models with document masks
    (`masked`) or without. A forced one that cannot is a GolfError."""
    if name != "auto":
        backend = ATTENTION_BACKENDS[name]
        reason = backend.why_not(device, dtype, head_dim)
        if reason:
            raise GolfError(f"attention backend '{name}' cannot run here: {reason}; set train.attention=auto")
        return AttentionChoice(name, "", backend())
    reasons: list[str] = []
    for candidate in MASKED_ATTENTION.get(device.type, DENSE_ATTENTION) if masked else DENSE_ATTENTION:
        backend = ATTENTION_BACKENDS[candidate]
        reason = backend.why_not(device, dtype, head_dim)
        if not reason:
            return AttentionChoice(candidate, "; ".join(reasons), backend())
        reasons.append(reason)
    raise GolfError(f"no attention backend can run here: {'; '.join(reasons)}")


class Attention(nn.Module):
    """q, k, v maps, per-head RMS norm and rotation of q and k, one learned gain a query head, output map.

    Layer parts (see parts/base.py) may change the values before the kernel and its output before the last map.
    """

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, qk_gain: float, norm_eps: float) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, dim // num_heads
        self.norm_eps = norm_eps
        self.c_q = Linear(dim, dim)
        self.c_k = Linear(dim, num_kv_heads * self.head_dim)
        self.c_v = Linear(dim, num_kv_heads * self.head_dim)
        self.proj = Linear(dim, dim)
        self.q_gain = nn.Parameter(torch.full((num_heads,), qk_gain))
        self.layer_parts: tuple[str, ...] = ()
        self.attend: Attend | None = None  # set by GPT.use_attention

    def forward(
        self, n_BTD: Tensor, rope: tuple[Tensor, Tensor], extras: dict[str, Any], cache: LayerCache | None = None
    ) -> Tensor:
        """`n_BTD` is the normalised block input; `rope` are the (T, J) tables of its positions."""
        batch, length, _ = n_BTD.shape
        q_BTHK = self.c_q(n_BTD).view(batch, length, self.num_heads, self.head_dim)
        k_BTGK = self.c_k(n_BTD).view(batch, length, self.num_kv_heads, self.head_dim)
        v_BTGK = self.c_v(n_BTD).view(batch, length, self.num_kv_heads, self.head_dim)
        for name in self.layer_parts:
            v_BTGK = getattr(self, name).value(v_BTGK, n_BTD, extras)
        # Norm, rotation and gain in float32: one upcast and one rounding instead of three.
        q = apply_rope(rms_norm(q_BTHK.float(), self.norm_eps), *rope) * self.q_gain[:, None]
        k = apply_rope(rms_norm(k_BTGK.float(), self.norm_eps), *rope)
        q, k = q.to(n_BTD.dtype), k.to(n_BTD.dtype)
        k_BSGK, v_BSGK = (k, v_BTGK) if cache is None else cache.extend(k, v_BTGK)
        assert self.attend is not None, "GPT.use_attention was not called"
        mask = extras.get(MASK)
        y_BTHK = self.attend(q, k_BSGK, v_BSGK) if mask is None else self.attend(q, k_BSGK, v_BSGK, mask)
        for name in self.layer_parts:
            y_BTHK = getattr(self, name).output(y_BTHK, v_BTGK, q_BTHK, n_BTD, extras)
        return self.proj(y_BTHK.reshape(batch, length, -1))
