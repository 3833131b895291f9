"""The feed-forward branch and its activations."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from paramgolf.model.layers import Linear


def relu2(u: Tensor) -> Tensor:
    """max(u, 0)^2."""
    return F.relu(u).square()


def leaky_relu2(u: Tensor) -> Tensor:
    """(max(u, 0) + 0.5 min(u, 0))^2: negative inputs keep a quarter of the square and a gradient."""
    return F.leaky_relu(u, 0.5).square()


class MLP(nn.Module):
    """proj(activation(fc(x))): (B, T, D) -> (B, T, F) -> (B, T, D)."""

    def __init__(self, dim: int, hidden: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc = Linear(dim, hidden)
        self.proj = Linear(hidden, dim)
        self.activation = activation

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.proj(self.activation(self.fc(x_BTD)))
