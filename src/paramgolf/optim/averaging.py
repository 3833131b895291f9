"""Averages of the weights over the run, kept in float32 beside the model.

Whether the average or the raw weights are kept is for the caller to decide, on training-side data only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paramgolf.errors import GolfError
from paramgolf.recipe.sections import AverageSection

COUNT = "count"


def float_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The floating tensors of the model's state dict, sharing its memory, under their own names."""
    state = model.state_dict()
    return {name.replace("_orig_mod.", ""): t.detach() for name, t in state.items() if t.is_floating_point()}


class Average(ABC):
    """A running average: `shadow` holds it, `count` how many models went in."""

    def __init__(self) -> None:
        self.shadow: dict[str, Tensor] = {}
        self.count = 0

    @property
    def ready(self) -> bool:
        """Whether there is an average to apply."""
        return self.count > 0

    @abstractmethod
    def update(self, model: nn.Module, step: int, lr_mul: float) -> None:
        """Take in the weights after step number `step` (from 0), taken at learning-rate multiplier `lr_mul`."""

    @torch.no_grad()
    def apply(self, model: nn.Module) -> dict[str, Tensor]:
        """Put the average into the model; returns what was there, for `restore`. Without an average a no-op."""
        weights = float_tensors(model)
        before = {name: tensor.clone() for name, tensor in weights.items()}
        if self.ready:
            restore(model, self.shadow)
        return before

    def state_dict(self) -> dict[str, Tensor | int]:
        """`shadow.<tensor>` (float32 copies) and `count`."""
        out: dict[str, Tensor | int] = {COUNT: self.count}
        out.update({f"shadow.{name}": tensor.clone() for name, tensor in self.shadow.items()})
        return out

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave (the tensors may lie on another device)."""
        if COUNT not in state:
            raise GolfError("the saved state holds no weight average; it belongs to a run without one")
        self.count = int(state[COUNT])
        self.shadow = {
            name.removeprefix("shadow."): tensor.clone() for name, tensor in state.items() if name.startswith("shadow.")
        }

    def _blend(self, model: nn.Module, weight: float) -> None:
        """shadow <- shadow + weight (model - shadow); the first call copies."""
        weights = float_tensors(model)
        if not self.shadow:
            self.shadow = {name: tensor.float().clone() for name, tensor in weights.items()}
            return
        names = list(weights)
        device = weights[names[0]].device
        self.shadow = {name: tensor.to(device) for name, tensor in self.shadow.items()}
        new = [weights[name].float() for name in names]
        torch._foreach_lerp_([self.shadow[name] for name in names], new, weight)


class EMA(Average):
    """shadow <- decay shadow + (1 - decay) weights after every step, from the initial weights, without correction."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self._blend(model, 1.0)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, lr_mul: float) -> None:
        self._blend(model, 1.0 - self.decay)
        self.count += 1


class SWA(Average):
    """Plain mean of snapshots while the multiplier is below `start_lr_mul`: at once, then at multiples of `every`."""

    def __init__(self, start_lr_mul: float, every: int) -> None:
        super().__init__()
        self.start_lr_mul = start_lr_mul
        self.every = every

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, lr_mul: float) -> None:
        if lr_mul >= self.start_lr_mul or (self.count and step % self.every):
            return
        self.count += 1
        self._blend(model, 1.0 / self.count)


@torch.no_grad()
def restore(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the model's floating tensors of the same names."""
    weights = float_tensors(model)
    if weights.keys() != tensors.keys():
        odd = sorted(weights.keys() ^ tensors.keys())[0]
        raise GolfError(f"the averaged weights and the model differ in '{odd}'; they belong to different models")
    for name, tensor in weights.items():
        tensor.copy_(tensors[name])


def build_average(section: AverageSection, model: nn.Module) -> Average | None:
    """The average that `section` asks for, started at the model's present weights; None for kind "none"."""
    if section.kind == "ema":
        return EMA(model, section.decay)
    return SWA(section.start_lr_mul, section.every) if section.kind == "swa" else None
