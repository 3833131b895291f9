"""One layer: residual mix, attention branch, feed-forward branch. Suffixes as in gpt.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from paramgolf.model.attention import Attention
from paramgolf.model.cache import LayerCache
from paramgolf.model.layers import rms_norm
from paramgolf.model.mlp import MLP
from paramgolf.recipe.sections import ModelSection


class Block(nn.Module):
    """x <- m0 x + m1 x0;  x <- x + a attention(rms(x));  x <- x + b mlp(rms(x)), with a, b, m0, m1 learned a channel.

    From layer `model.parallel_from` on, both branches read the same input (GPT-J; #1412, #1493):
    x <- x + a attention(rms(x)) + b mlp(rms(x)).
    With `model.ln_scale` both branch inputs of layer l are divided by sqrt(l + 1). That factor is a tensor, and nothing
    else in a block depends on its index: all blocks of a model (all of one kind) run the same compiled graph.
    """

    def __init__(self, section: ModelSection, activation: Callable[[Tensor], Tensor], index: int = 0) -> None:
        super().__init__()
        dim = section.dim
        self.norm_eps = section.norm_eps
        self.parallel = 0 <= section.parallel_from <= index
        self.attn = Attention(dim, section.num_heads, section.num_kv_heads, section.qk_gain, section.norm_eps)
        self.mlp = MLP(dim, section.mlp_hidden, activation)
        self.attn_scale = nn.Parameter(torch.ones(dim))
        self.mlp_scale = nn.Parameter(torch.ones(dim))
        self.depth_scale: Tensor | None
        self.register_buffer(
            "depth_scale", torch.tensor((index + 1) ** -0.5) if section.ln_scale else None, persistent=False
        )
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))

    def forward(
        self,
        x_BTD: Tensor,
        x0_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        extras: dict[str, Any],
        cache: LayerCache | None = None,
    ) -> Tensor:
        mix_2D = self.resid_mix.to(x_BTD.dtype)
        x = mix_2D[0] * x_BTD + mix_2D[1] * x0_BTD
        if self.parallel:
            n = self.normed(x)
            x = x + self.attn_scale.to(x.dtype) * self.attn(n, rope, extras, cache)
            return x + self.mlp_scale.to(x.dtype) * self.mlp(n)
        x = x + self.attn_scale.to(x.dtype) * self.attn(self.normed(x), rope, extras, cache)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(self.normed(x))

    def lanes(
        self,
        a_BTD: Tensor,
        b_BTD: Tensor,
        x0_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        extras: dict[str, Any],
        resid_2: Tensor,
        post_4: Tensor,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The layer on two lanes (see lanes.py): attention reads lane a with its mix, the MLP reads lane b."""
        dtype = a_BTD.dtype
        mix_2D, resid_2, post_4 = self.resid_mix.to(dtype), resid_2.to(dtype), post_4.to(dtype)
        n_BTD = self.normed(mix_2D[0] * a_BTD + mix_2D[1] * x0_BTD)
        attn = self.attn_scale.to(dtype) * self.attn(n_BTD, rope, extras, cache)
        mlp = self.mlp_scale.to(dtype) * self.mlp(self.normed(b_BTD))
        a = resid_2[0] * a_BTD + post_4[0] * attn + post_4[2] * mlp
        return a, resid_2[1] * b_BTD + post_4[1] * attn + post_4[3] * mlp

    def normed(self, x_BTD: Tensor) -> Tensor:
        """What a branch reads."""
        n_BTD = rms_norm(x_BTD, self.norm_eps)
        return n_BTD if self.depth_scale is None else n_BTD * self.depth_scale
