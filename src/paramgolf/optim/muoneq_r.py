"""MuonEq-R with Polar Express: Muon whose update rows are equalised before orthogonalisation.

Each row of the Nesterov update is divided by its L2 norm (floor 1e-7), then five Polar Express iterations. The
combination of the best published record of the challenge (1.0611; its parts #1217, #1260, #1344).
"""

from __future__ import annotations

import torch
from torch import Tensor

from paramgolf.optim import newton_schulz as ns
from paramgolf.optim.muon import Muon, State

ROW_FLOOR = 1e-7


class MuonEqR(Muon):
    coefficients: ns.Coefficients | tuple[ns.Coefficients, ...] = ns.POLAR_EXPRESS
    safety = 1.02  # the polynomials are exact up to singular value 1; low-precision products overshoot it a little

    def direction(self, grads: Tensor, state: State, momentum: float) -> Tensor:
        update = super().direction(grads, state, momentum)
        return update / torch.linalg.vector_norm(update, dim=-1, keepdim=True).clamp_min(ROW_FLOOR)


class MuonEqRPR1855(MuonEqR):
    """As the 1.0611 record's script has it: no room for overshoot before the iterations."""

    safety = 1.0


class MuonEqRPR1394(MuonEqRPR1855):
    """As the 1.0856 record's script has it: Muon's fixed coefficients after the row norms."""

    coefficients = ns.QUINTIC
