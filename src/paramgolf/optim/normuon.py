"""NorMuon as published (Li et al. 2025, arXiv 2510.05491): Muon with neuron-wise normalisation of the update.

After orthogonalisation each row (an output neuron) is divided by the root of a running mean of its squared entries,
then the whole update is scaled back to the Frobenius norm it had. The authors' code does that; the paper's text
scales to an element RMS of 0.2 instead, which is the same direction at another learning rate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paramgolf.optim.muon import Muon, State

EPS = 1e-10


class NorMuon(Muon):
    """buf <- mu buf + (1 - mu) g; u = (1 - mu) g + mu buf; O = orthogonal(u); v <- b2 v + (1 - b2) mean_cols(O^2)."""

    def state_shapes(self, rows: int, cols: int) -> dict[str, tuple[int, ...]]:
        return {"momentum": (rows, cols), "second": (rows,)}

    def direction(self, grads: Tensor, state: State, momentum: float) -> Tensor:
        buffer = state["momentum"].lerp_(grads, 1.0 - momentum)
        return grads.lerp_(buffer, momentum) if self.section.nesterov else buffer

    def rescale(self, update: Tensor, state: State, momentum: float) -> Tensor:
        wide = update.float()
        before = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
        second = state["second"].lerp_(wide.square().mean(dim=-1), 1.0 - self.section.matrix_beta2)
        wide = wide / (second.sqrt() + EPS).unsqueeze(-1)
        after = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
        return (wide * (before / (after + EPS))).to(update.dtype)
