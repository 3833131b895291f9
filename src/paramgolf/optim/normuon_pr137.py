"""NorMuon as the script of PR 137 has it, for reproducing that run; prefer `normuon`.

The row statistic decays with the momentum, has no bias correction, and the update is not scaled back: its element
RMS is about 1 instead of Muon's 1 / sqrt(max(rows, cols)), a factor of 22 to 39 at the same nominal learning rate.
"""

from __future__ import annotations

from torch import Tensor

from paramgolf.optim.muon import Muon, State

EPS = 1e-8


class NorMuonPR137(Muon):
    """v <- mu v + (1 - mu) mean_cols(O^2); O <- O / sqrt(v + 1e-8)."""

    def state_shapes(self, rows: int, cols: int) -> dict[str, tuple[int, ...]]:
        return {"momentum": (rows, cols), "second": (rows,)}

    def rescale(self, update: Tensor, state: State, momentum: float) -> Tensor:
        wide = update.float()
        second = state["second"].mul_(momentum).add_(wide.square().mean(dim=-1), alpha=1.0 - momentum)
        return (wide / (second + EPS).sqrt().unsqueeze(-1)).to(update.dtype)
