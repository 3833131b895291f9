"""Adam with decoupled weight decay (AdamW) over a list of tensors, in a handful of foreach operations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from paramgolf.errors import GolfError


class Adam:
    """The rule of torch.optim.AdamW; moments in float32, allocated at once, so that a resumed run is exact.

    A parameter without a gradient counts as having a zero gradient.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Parameter]],
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        pairs = list(named)
        for name, param in pairs:
            if param.dtype != torch.float32:
                raise GolfError(f"parameter '{name}' is {param.dtype}; optimizers keep float32 master weights")
        self.names = [name for name, _ in pairs]
        self.params: list[Tensor] = [param for _, param in pairs]
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.steps = 0
        self.mean = [torch.zeros_like(p, requires_grad=False) for p in self.params]
        self.square = [torch.zeros_like(p, requires_grad=False) for p in self.params]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update at learning rate `lr`."""
        if not self.params:
            return
        self.steps += 1
        beta1, beta2 = self.betas
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.params]
        if self.weight_decay:
            torch._foreach_mul_(self.params, 1.0 - lr * self.weight_decay)
        torch._foreach_lerp_(self.mean, grads, 1.0 - beta1)
        torch._foreach_mul_(self.square, beta2)
        torch._foreach_addcmul_(self.square, grads, grads, 1.0 - beta2)
        root = torch._foreach_sqrt(self.square)
        torch._foreach_div_(root, (1.0 - beta2**self.steps) ** 0.5)
        torch._foreach_add_(root, self.eps)
        torch._foreach_addcdiv_(self.params, self.mean, root, -lr / (1.0 - beta1**self.steps))

    def state_dict(self) -> dict[str, Tensor | int]:
        """`mean.<parameter>`, `square.<parameter>` and `steps`; copies."""
        out: dict[str, Tensor | int] = {"steps": self.steps}
        for name, mean, square in zip(self.names, self.mean, self.square, strict=True):
            out[f"mean.{name}"] = mean.clone()
            out[f"square.{name}"] = square.clone()
        return out

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.steps = int(state["steps"])
        for name, mean, square in zip(self.names, self.mean, self.square, strict=True):
            mean.copy_(state[f"mean.{name}"])
            square.copy_(state[f"square.{name}"])
