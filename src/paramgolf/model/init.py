"""Initialisation: the same numbers on every device and at every world size.

Each tensor has its own generator, seeded with the seed and the tensor's name, and is drawn on the CPU in float32, so
adding a part does not move the others' numbers.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from paramgolf.model.layers import Linear
from paramgolf.recipe.sections import ModelSection

ORTHOGONAL_MIN_SIDE = 64  # PR 137's script leaves smaller matrices alone


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one tensor. The framework's CPU generator uses 32 bits of its seed and drops the rest."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def uniform_fan_in(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Uniform within 1/sqrt(fan_in) on both sides: the framework's default of a linear layer."""
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def orthogonal(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A uniformly distributed matrix with orthonormal rows or columns, whichever are fewer."""
    rows, cols = shape
    normal = torch.randn(max(rows, cols), min(rows, cols), generator=generator)
    q, r = torch.linalg.qr(normal)
    q = q * r.diagonal().sign()  # without this the distribution depends on the routine's choice of signs
    return q if rows >= cols else q.t()


def init_linear(name: str, linear: Linear, section: ModelSection, seed: int) -> None:
    """Output maps (`proj` of attention and MLP) and the head start at zero, the rest uniform; with "orthogonal" every
    large matrix is orthogonal and output maps are scaled by 1/sqrt(2 L); with "orthogonal_zero" they stay zero."""
    shape = (linear.weight.shape[0], linear.weight.shape[1])
    generator = generator_for(seed, f"{name}.weight")
    large = min(shape) >= ORTHOGONAL_MIN_SIDE
    output = name == "lm_head" or (name.startswith("blocks.") and name.endswith(".proj"))
    if section.init == "orthogonal" and large:
        scale = (2 * section.num_layers) ** -0.5 if name.endswith(".proj") else 1.0
        value = orthogonal(shape, generator) * scale
    elif output:
        value = torch.zeros(shape)
    elif section.init == "orthogonal_zero" and large:
        value = orthogonal(shape, generator)
    else:
        value = uniform_fan_in(shape, generator)
    linear.weight.copy_(value)


@torch.no_grad()
def init_matrices(model: nn.Module, section: ModelSection, seed: int) -> None:
    """Fill every linear weight and the token embedding; vectors and scalars already hold their start values."""
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            init_linear(name, module, section, seed)
    embedding = model.get_parameter("tok_emb.weight")
    noise = torch.randn(embedding.shape, generator=generator_for(seed, "tok_emb.weight"))
    embedding.copy_(noise * section.embed_init_std)
