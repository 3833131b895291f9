"""Which optimizer trains which parameter, and the set of them as one object.

Groups: `matrix` (Muon and its kin), `embed`, `head` and `scalar` (Adam, each with its own learning rate). A model
part may name the group of a parameter itself by setting the attribute `optim_group` on it; otherwise its name and
shape decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from paramgolf.dist import Dist
from paramgolf.errors import GolfError
from paramgolf.model.names import is_control
from paramgolf.optim.adam import Adam
from paramgolf.optim.newton_schulz import fast_dtype
from paramgolf.optim.registry import MATRIX_OPTIMIZERS
from paramgolf.recipe.sections import OptimSection

GROUPS = ("matrix", "embed", "head", "scalar")
GROUP_ATTRIBUTE = "optim_group"


def group_of(name: str, param: Tensor) -> str:
    """The group of one parameter: its own `optim_group`, else by name and shape."""
    chosen = getattr(param, GROUP_ATTRIBUTE, None)
    if chosen is not None:
        if chosen not in GROUPS:
            raise GolfError(f"parameter '{name}' asks for optimizer group '{chosen}'; known: {', '.join(GROUPS)}")
        return str(chosen)
    if name.startswith("lm_head."):
        return "head"
    if name.startswith("tok_emb.") or name.endswith(".embed.weight"):
        return "embed"
    is_map = name.startswith("blocks.") or name.endswith("proj.weight")
    if param.ndim == 2 and not is_control(name) and is_map:
        return "matrix"
    return "scalar"


def matrix_dtype(choice: str, device: torch.device) -> torch.dtype:
    """The type Newton-Schulz runs in: `optim.ns_dtype` on `device` (auto: bfloat16 on CUDA, float32 elsewhere)."""
    if choice == "fast":
        return fast_dtype(device)
    if choice == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if choice == "bfloat16" else torch.float32


class OptimizerSet:
    """All optimizers of a model. Gradients must be equal on all ranks when `clip` and `step` are called, except that
    with `scattered` a matrix has one on its owner alone (see optim/muon.py)."""

    def __init__(self, model: nn.Module, section: OptimSection, dist: Dist) -> None:
        self.section, self.dist = section, dist
        self.scattered = False
        members: dict[str, list[tuple[str, Parameter]]] = {group: [] for group in GROUPS}
        for name, param in named_parameters(model):
            members[group_of(name, param)].append((name, param))
        self._group = {name: group for group, pairs in members.items() for name, _ in pairs}
        self.params = [param for pairs in members.values() for _, param in pairs]
        if not self.params:
            raise GolfError("the model has no trainable parameters")
        dtype = matrix_dtype(section.ns_dtype, self.params[0].device)
        self.matrix = MATRIX_OPTIMIZERS[section.matrix](members["matrix"], section, dist, dtype)
        decay = {"embed": section.embed_weight_decay, "head": section.embed_weight_decay}
        self.adams = {
            group: Adam(
                members[group],
                betas=(section.beta1, section.beta2),
                eps=section.adam_eps,
                weight_decay=decay.get(group, section.scalar_weight_decay),
            )
            for group in ("embed", "head", "scalar")
        }

    def group_of(self, name: str) -> str:
        """matrix, embed, head or scalar."""
        return self._group[name]

    def base_lr(self, group: str) -> float:
        """The learning rate of a group before the schedule's multiplier."""
        return float(getattr(self.section, f"{group}_lr"))

    def clip(self, max_norm: float) -> Tensor:
        """Global gradient norm (0-d, on the device, before clipping); scales by min(1, max_norm / (norm + 1e-6)).

        `max_norm` 0 only measures.
        """
        norm = self._norm()
        if max_norm > 0:
            nn.utils.clip_grads_with_norm_(self.params, max_norm, norm)
        return norm

    def _norm(self) -> Tensor:
        """Global gradient norm; a collective with `scattered`."""
        if not self.scattered:
            return nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        matrices = {id(p) for p in self.matrix.params}
        own = [p.grad for p in self.matrix.params if p.grad is not None]
        shared = [p.grad for p in self.params if p.grad is not None and id(p) not in matrices]
        squares = [nn.utils.get_total_norm(grads).to(self.dist.device).square() for grads in (own, shared)]
        return (self.dist.all_reduce_sum(squares[0]) + squares[1]).sqrt()

    def step(self, lr_mul: float, momentum: float, decay_mul: float = 1.0) -> None:
        """One step of every optimizer: learning rates times `lr_mul`; for the matrices `momentum`, and their weight
        decay times `decay_mul`."""
        for group, adam in self.adams.items():
            adam.step(self.base_lr(group) * lr_mul)
        self.matrix.step(self.base_lr("matrix") * lr_mul, momentum, decay_mul)

    def zero_grad(self) -> None:
        """Forget the gradients (they become None)."""
        for param in self.params:
            param.grad = None

    def state_dict(self) -> dict[str, Tensor | int]:
        """Everything a resumed run needs, `<group>.<key>.<parameter>`; the same on every rank, all must call it."""
        out: dict[str, Tensor | int] = {f"matrix.{key}": value for key, value in self.matrix.state_dict().items()}
        for group, adam in self.adams.items():
            out.update({f"{group}.{key}": value for key, value in adam.state_dict().items()})
        return out

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`, from any world size; a state of another model or optimizer is refused unchanged."""
        self._check_state(state)
        self.matrix.load_state_dict(_under(state, "matrix"))
        for group, adam in self.adams.items():
            adam.load_state_dict(_under(state, group))

    def _check_state(self, state: Mapping[str, Any]) -> None:
        expected = self._state_shapes()
        missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
        if missing or extra:
            what = f"lacks '{missing[0]}'" if missing else f"has an unknown '{extra[0]}'"
            raise GolfError(f"this optimizer state {what}; it belongs to another model or optimizer")
        for key, shape in expected.items():
            found = tuple(state[key].shape) if isinstance(state[key], Tensor) else ()
            if found != shape:
                raise GolfError(f"optimizer state '{key}' has shape {found}, not {shape}; it belongs to another model")

    def _state_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for name, param in zip(self.matrix.names, self.matrix.params, strict=True):
            for key, shape in self.matrix.state_shapes(*param.shape).items():
                shapes[f"matrix.{key}.{name}"] = shape
        for group, adam in self.adams.items():
            shapes[f"{group}.steps"] = ()
            for name, param in zip(adam.names, adam.params, strict=True):
                shapes[f"{group}.mean.{name}"] = shapes[f"{group}.square.{name}"] = tuple(param.shape)
        return shapes


def _under(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key[len(prefix) + 1 :]: value for key, value in state.items() if key.startswith(f"{prefix}.")}


def named_parameters(model: nn.Module) -> Iterator[tuple[str, Parameter]]:
    """Trainable parameters under their own names, also of a compiled model (which prefixes them)."""
    for name, param in model.named_parameters():
        if param.requires_grad:
            yield name.replace("_orig_mod.", ""), param


def build_optimizers(model: nn.Module, section: OptimSection, dist: Dist) -> OptimizerSet:
    """The optimizers `section` describes for `model`, whose parameters must be on their final device."""
    return OptimizerSet(model, section, dist)
