"""Two-lane residuals: from one layer on, attention and feed-forward each read a lane of their own and write to both.

Origin: #1204, in the form of #1529 to #1855. Cost: 6 numbers a layer and a second stream in memory; the two branches of
a layer do not wait for each other. Lane 0 feeds attention and takes the skips, lane 1 feeds the MLP.
Layers that feed skips keep to one stream.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paramgolf.recipe.sections import ModelSection

RESID_INIT = 1.1


class Lanes(nn.Module):
    """The learned weights of all layers; rows below `model.lanes_from` are not used.

    `resid` (L, 2): what each lane keeps of itself. `post` (L, 4): what attention gives to lane 0 and 1, then the MLP.
    """

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        self.first, self.merging = section.lanes_from, section.lane_merge
        self.resid = nn.Parameter(torch.full((section.num_layers, 2), RESID_INIT))
        self.post = nn.Parameter(torch.ones(section.num_layers, 4))

    def merge(self, a_BTD: Tensor, b_BTD: Tensor) -> Tensor:
        """The stream that leaves the last layer."""
        if self.merging == "mean":
            return 0.5 * (a_BTD + b_BTD)
        return a_BTD if self.merging == "attn" else b_BTD
