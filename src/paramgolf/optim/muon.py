"""Muon: momentum, then orthogonalise the update (Jordan et al. 2024), sharded over the ranks by matrix.

Equally shaped matrices are stacked, so that a step is a few large batched products. Every rank works on its own share
(balanced by cost) and keeps momentum for that share only; one flat all-gather then gives all updates to all ranks,
which apply them alike. Each rank needs the gradients of its own matrices only; they must already be summed over ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from paramgolf.dist import Dist
from paramgolf.errors import GolfError
from paramgolf.optim import newton_schulz as ns
from paramgolf.recipe.sections import OptimSection

State = dict[str, Tensor]


def orthogonalize_cost(rows: int, cols: int) -> int:
    """Multiplications of one Newton-Schulz iteration on one matrix."""
    short, long = min(rows, cols), max(rows, cols)
    return 2 * short * short * long + short**3


def assign_owners(shapes: Sequence[tuple[int, int]], world: int) -> list[int]:
    """The rank that orthogonalises each matrix: the most expensive first, each to the least loaded rank."""
    load = [0] * world
    owner = [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: (-orthogonalize_cost(*shapes[i]), i)):
        rank = min(range(world), key=lambda r: (load[r], r))
        owner[i] = rank
        load[rank] += orthogonalize_cost(*shapes[i])
    return owner


class Bucket:
    """This rank's matrices of one shape, with their state stacked: `state[key]` is (B, ...) float32."""

    def __init__(self, names: list[str], params: list[Tensor], state: State) -> None:
        self.names = names
        self.params = params
        self.state = state

    def gradients(self) -> Tensor:
        """(B, rows, cols) float32, a fresh tensor; a parameter without a gradient counts as zero."""
        return torch.stack([p.grad if p.grad is not None else torch.zeros_like(p) for p in self.params])


class Muon:
    """buf <- mu buf + g; u = g + mu buf (Nesterov); p <- (1 - lr wd) p - lr sqrt(max(1, rows / cols)) orthogonal(u)."""

    coefficients: ns.Coefficients | tuple[ns.Coefficients, ...] = ns.QUINTIC
    safety = 1.0

    def __init__(
        self,
        named: Iterable[tuple[str, Parameter]],
        section: OptimSection,
        dist: Dist,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.section = section
        self.dist = dist
        self.dtype = dtype
        self.names: list[str] = []
        self.params: list[Tensor] = []
        for name, param in named:
            if param.ndim != 2 or param.dtype != torch.float32:
                raise GolfError(
                    f"parameter '{name}' is {tuple(param.shape)} {param.dtype}; "
                    "the matrix optimizer takes 2-D float32 weights only"
                )
            self.names.append(name)
            self.params.append(param)
        shapes = [(p.size(0), p.size(1)) for p in self.params]
        self.owner = assign_owners(shapes, dist.world)
        self.buckets = self._make_buckets(shapes)
        self._layout = self._make_layout()

    def state_shapes(self, rows: int, cols: int) -> dict[str, tuple[int, ...]]:
        """What is kept for one matrix, by name; float32, zero at first."""
        return {"momentum": (rows, cols)}

    def direction(self, grads: Tensor, state: State, momentum: float) -> Tensor:
        """What is orthogonalised; updates the momentum in `state`. `grads` (B, rows, cols) may be overwritten."""
        buffer = state["momentum"]
        torch.add(grads, buffer, alpha=momentum, out=buffer)
        return grads.add_(buffer, alpha=momentum) if self.section.nesterov else buffer

    def rescale(self, update: Tensor, state: State, momentum: float) -> Tensor:
        """What is made of the orthogonalised (B, rows, cols) update; here nothing."""
        return update

    @torch.no_grad()
    def step(self, lr: float, momentum: float, decay_mul: float = 1.0) -> None:
        """One update of all matrices at learning rate `lr`, with `decay_mul` times the section's weight decay."""
        if not self.params:
            return
        mine: dict[str, Tensor] = {}
        for bucket in self.buckets:
            direction = self.direction(bucket.gradients(), bucket.state, momentum)
            update = ns.orthogonalize(direction, self.section.ns_steps, self.coefficients, self.dtype, self.safety)
            update = self.rescale(update, bucket.state, momentum)
            # Rounded to the exchanged type also when there is nobody to exchange with: any world size, one result.
            mine.update(zip(bucket.names, update.to(self.dtype).float().unbind(0), strict=True))
        updates = self._exchange(mine)
        self._apply([updates[name] for name in self.names], lr, decay_mul * self.section.weight_decay)

    def state_dict(self) -> State:
        """`<key>.<parameter>` -> float32, complete on every rank; all ranks must call it."""
        out: State = {}
        mine = {
            f"{key}.{name}": stack[i]
            for bucket in self.buckets
            for key, stack in bucket.state.items()
            for i, name in enumerate(bucket.names)
        }
        for name, param, owner in zip(self.names, self.params, self.owner, strict=True):
            for key, shape in self.state_shapes(param.size(0), param.size(1)).items():
                full = f"{key}.{name}"
                tensor = mine[full].clone() if full in mine else torch.empty(shape, device=param.device)
                out[full] = self.dist.broadcast(tensor.contiguous(), src=owner)
        return out

    def load_state_dict(self, state: State) -> None:
        """Take this rank's share of a complete state, whatever world size wrote it."""
        for bucket in self.buckets:
            for key, stack in bucket.state.items():
                for i, name in enumerate(bucket.names):
                    stack[i].copy_(state[f"{key}.{name}"])

    def _make_buckets(self, shapes: list[tuple[int, int]]) -> list[Bucket]:
        mine = [i for i, owner in enumerate(self.owner) if owner == self.dist.rank]
        buckets = []
        for shape in dict.fromkeys(shapes[i] for i in mine):
            members = [i for i in mine if shapes[i] == shape]
            device = self.params[members[0]].device
            state = {
                key: torch.zeros((len(members), *size), device=device)
                for key, size in self.state_shapes(*shape).items()
            }
            buckets.append(Bucket([self.names[i] for i in members], [self.params[i] for i in members], state))
        return buckets

    def places(self) -> list[tuple[Tensor, int, int]]:
        """(weight, rank that orthogonalises it, where it begins in that rank's row of `row` numbers), in order."""
        pairs = zip(self.names, self.params, strict=True)
        return [(param, *self._layout[name]) for name, param in pairs]

    def _make_layout(self) -> dict[str, tuple[int, int]]:
        """Where each matrix lies in the exchanged buffer: name -> (owner, offset in the owner's row)."""
        used = [0] * self.dist.world
        layout = {}
        for name, param, owner in zip(self.names, self.params, self.owner, strict=True):
            layout[name] = (owner, used[owner])
            used[owner] += param.numel()
        self.row = max(used, default=0)
        return layout

    def _exchange(self, mine: dict[str, Tensor]) -> dict[str, Tensor]:
        """All ranks' updates, float32, from this rank's own."""
        if self.dist.world == 1:
            return mine
        row = torch.zeros(self.row, dtype=self.dtype, device=self.params[0].device)
        for name, update in mine.items():
            start = self._layout[name][1]
            row[start : start + update.numel()].view(update.shape).copy_(update)
        table = self.dist.all_gather_into(row.new_empty(self.dist.world, self.row), row).float()
        out = {}
        for name, param in zip(self.names, self.params, strict=True):
            owner, start = self._layout[name]
            out[name] = table[owner, start : start + param.numel()].view(param.shape)
        return out

    def _apply(self, updates: list[Tensor], lr: float, decay: float) -> None:
        if decay:
            torch._foreach_mul_(self.params, 1.0 - lr * decay)
        # One foreach call for each aspect factor: with a dtype or a factor of its own a tensor leaves the fast path.
        factors = [max(1.0, p.size(0) / p.size(1)) ** 0.5 for p in self.params]
        for factor in dict.fromkeys(factors):
            chosen = [i for i, f in enumerate(factors) if f == factor]
            torch._foreach_add_([self.params[i] for i in chosen], [updates[i] for i in chosen], alpha=-lr * factor)
