"""How gradients travel between ranks: everything to everybody, or each weight matrix to the rank that works on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paramgolf.dist import Dist
from paramgolf.optim.muon import Muon


class Exchange:
    """Sums gradients and a tail of numbers over ranks in one flat float32 all-reduce.

    With `matrix`, the gradients of its weights are reduce-scattered instead: a rank gets the sums of those matrices
    that it orthogonalises and keeps no gradient of the others (the banked Muon of #399). A third less is sent a step.
    """

    def __init__(self, parameters: Sequence[Tensor], dist: Dist, matrix: Muon | None = None) -> None:
        self.dist = dist
        self._places: Sequence[tuple[Tensor, int, int]] = matrix.places() if matrix is not None else ()
        scattered = {id(p) for p, _, _ in self._places}
        self._parameters = [p for p in parameters if id(p) not in scattered]
        self._row = matrix.row if matrix is not None else 0
        self._flat: Tensor | None = None
        self._views: list[Tensor] = []
        self._table: Tensor | None = None

    def __call__(self, tail: Tensor, expected_tokens: int) -> Tensor:
        """Sum over ranks, then scale by expected tokens over those of the step (tail[1]); returns the summed tail.

        Afterwards the gradients are views of buffers that the next call writes again.
        """
        if self._flat is None:
            sizes = [p.numel() for p in self._parameters] + [tail.numel()]
            self._flat = torch.empty(sum(sizes), device=self.dist.device)
            parts = self._flat.split(sizes)
            self._views = [part.view_as(p) for part, p in zip(parts[:-1], self._parameters, strict=True)]
        for parameter, view in zip(self._parameters, self._views, strict=True):
            _put(parameter, view)
        summed = self._flat[-tail.numel() :]
        summed.copy_(tail)
        self.dist.all_reduce_sum(self._flat)
        tail = summed.clone()
        scale = expected_tokens / tail[1].clamp(min=1.0)  # exactly 1 when the loader kept its promise
        self._flat[: -tail.numel()].mul_(scale)
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view.to(parameter.dtype) if parameter.dtype != view.dtype else view
        if self._places:
            self._scatter(scale)
        return tail

    def _scatter(self, scale: Tensor) -> None:
        """Each matrix's sum to its owner."""
        if self._table is None:
            self._table = torch.zeros(self.dist.world, self._row, device=self.dist.device)
        for parameter, owner, start in self._places:
            _put(parameter, self._table[owner, start : start + parameter.numel()].view(parameter.shape))
        mine = self.dist.reduce_scatter_sum(self._table.new_empty(self._row), self._table)
        mine.mul_(scale)
        for parameter, owner, start in self._places:
            own = owner == self.dist.rank
            parameter.grad = mine[start : start + parameter.numel()].view(parameter.shape) if own else None


def _put(parameter: Tensor, view: Tensor) -> None:
    """The gradient into its place in the buffer, unless it is there already."""
    if parameter.grad is None:
        view.zero_()
    elif parameter.grad.data_ptr() != view.data_ptr():
        view.copy_(parameter.grad)
