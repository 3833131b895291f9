"""The two layers everything is made of: a bias-free linear map and RMS normalisation without a gain."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn, zeros

from paramgolf.quant.grid import Grid


class Linear(nn.Module):
    """y = x W^T without bias. The float32 master weight is cast to the type of `x` at use; there is no autocast.

    With a `grid`, the weight is fake-quantised in training mode (gradient straight through). The weight is zero until
    `initialise` or a state dict fills it.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(zeros(out_features, in_features))
        self.grid: Grid | None = None

    def effective_weight(self) -> Tensor:
        """float32 weight that the forward pass uses: the master, or its fake-quantised value."""
        if self.grid is not None and self.training:
            return self.grid.fake_quantize(self.weight)
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective_weight().to(x.dtype))


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, computed in float32, returned in the type of `x`."""
    return F.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(x.dtype)
