"""Small models for the model room's tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paramgolf.model.gpt import GPT
from paramgolf.recipe.sections import ModelSection

VOCAB = 97
PARTS: dict[str, dict[str, Any]] = {"bigram_hash": {"buckets": 61, "dim": 6}, "smear_gate": {"init": -1.0}}


def section(**changes: Any) -> ModelSection:
    sizes: dict[str, Any] = {"dim": 24, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "mlp_hidden": 40}
    return ModelSection(**(sizes | changes))


def small_gpt(seed: int = 0, vocab: int = VOCAB, **changes: Any) -> GPT:
    """A model whose every parameter is random, so that no branch is silently zero."""
    model = GPT(section(**changes), vocab)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            noise = torch.randn(param.shape, generator=generator)
            param.copy_(param + 0.3 * noise if param.ndim < 2 or param.shape[0] == 2 else 0.3 * noise)
    return model


def tokens(*shape: int, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))
