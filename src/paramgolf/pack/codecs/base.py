"""What a weight codec is: integer tensors in, bytes out, and back. numpy only: importable without torch.

A codec codes the integer tensors (codes of quantised weights). Scales and unquantised tensors are small and are coded
by pack/side.py before it, so a codec that wants to may condition on `CodeSpec.scale`, which the decoder has too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

_BLOCK = re.compile(r"^blocks\.\d+\.")


def role(name: str) -> str:
    """The name without its layer number, so that tensors alike in statistics share a role.

    >>> role("blocks.3.attn.c_q.weight")
    'attn.c_q.weight'
    """
    return _BLOCK.sub("", name)


@dataclass(frozen=True)
class CodeSpec:
    """Everything a decoder knows of an integer tensor before its codes: checked against limits by the container."""

    name: str
    shape: tuple[int, ...]
    bits: int  # codes lie in [-2^(bits-1), 2^(bits-1) - 1]; the lowest value is unused on a symmetric grid
    packed: bool = False  # byte coders lay four 6-bit codes in three bytes (PR 107's layout); others ignore it
    scale: np.ndarray | None = field(default=None, compare=False)  # known before the codes: shape[:-1], () of a vector

    @property
    def size(self) -> int:
        """Number of codes."""
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the 2-D view: the last axis are the columns; a vector or scalar is one row."""
        columns = self.shape[-1] if self.shape else 1
        return (self.size // columns if columns else 0), columns

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True)
class CodeTensor:
    """An integer tensor to encode: `codes` is int8 of shape `spec.shape`, every value within [spec.low, spec.high]."""

    spec: CodeSpec
    codes: np.ndarray


class Codec(Protocol):
    """Registered in pack/registry.py as `name -> "module:Class"`; the class is made without arguments."""

    name: str

    def encode(self, tensors: Sequence[CodeTensor], level: int = -1) -> bytes:
        """Self-contained bytes for these tensors in this order. Deterministic; `level` -1 = strongest."""
        ...

    def decode(self, data: bytes, specs: Sequence[CodeSpec]) -> list[np.ndarray]:
        """int8 arrays of the specs' shapes. Anything wrong with `data` raises GolfError or ValueError; memory stays

        proportional to the specs' sizes and len(data), whatever `data` says, and `data` must be used up exactly.
        """
        ...
