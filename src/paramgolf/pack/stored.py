"""One tensor as it is stored: integer codes with their scale, or a plain array. numpy only."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from paramgolf.errors import GolfError
from paramgolf.pack.packing import packed6_size

# Types a tensor may be kept in; the names are those of numpy and of torch.
PLAIN_DTYPES = ("float16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64", "bool")


@dataclass(frozen=True)
class TensorSpec:
    """How a tensor is stored, without its numbers: a row of the artifact's tensor table.

    `bits` 0: kept as the numpy type `store`. Otherwise `store` names the grid and codes have `bits` bits with one
    scale of type `scale_dtype` for each row along the last axis, or one for a vector or scalar.
    """

    name: str
    shape: tuple[int, ...]
    store: str
    bits: int = 0
    scale_dtype: str = "float16"
    packed: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        return self.shape[:-1] if len(self.shape) >= 2 else ()

    @property
    def nbytes(self) -> int:
        """Uncompressed bytes: a code takes one byte (four take three if packed), scales and kept values their type."""
        if not self.bits:
            return self.size * np.dtype(self.store).itemsize
        rows = math.prod(self.scale_shape)
        codes = packed6_size(rows, self.shape[-1]) if self.packed else self.size
        return codes + rows * np.dtype(self.scale_dtype).itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A `TensorSpec` with its numbers: int8 `values` and a `scale` where quantised, else `values` of type `store`."""

    spec: TensorSpec
    values: np.ndarray
    scale: np.ndarray | None = None

    def __post_init__(self) -> None:
        """ValueError when the arrays are not what the spec says: a mistake in the caller, found before it is a file."""
        spec = self.spec
        if self.values.shape != spec.shape or self.values.dtype.name != ("int8" if spec.bits else spec.store):
            raise ValueError(f"{spec.name}: {self.values.dtype} {self.values.shape} is not {spec}")
        if spec.bits and (self.scale is None or self.scale.shape != spec.scale_shape):
            raise ValueError(f"{spec.name}: its scale must have shape {spec.scale_shape}")
        if self.scale is not None and self.scale.dtype.name != spec.scale_dtype:
            raise ValueError(f"{spec.name}: scale {self.scale.dtype} instead of {spec.scale_dtype}")

    @property
    def name(self) -> str:
        return self.spec.name

    def dequantised(self) -> np.ndarray:
        """float32 (non-float tensors: their own type), of the spec's shape: code times stored scale, one rounding."""
        if self.scale is None:
            return self.values.astype(np.float32) if self.values.dtype.kind == "f" else self.values
        scale = self.scale.astype(np.float32)
        return np.asarray(self.values.astype(np.float32) * (scale[..., None] if scale.ndim else scale))

    def check_finite(self) -> None:
        """GolfError naming the tensor when a kept value or scale is not finite (a diverged training run)."""
        for what, array in (("values", self.values), ("scale", self.scale)):
            if array is not None and array.dtype.kind == "f" and not np.isfinite(array).all():
                raise GolfError(f"tensor {self.name}: non-finite {what}; the weights diverged: lower the rates")


def payload_bytes(tensors: Iterable[StoredTensor | TensorSpec]) -> int:
    """Uncompressed bytes of all tensors: what a byte compressor is given. Independent of the coder."""
    return sum((t.spec if isinstance(t, StoredTensor) else t).nbytes for t in tensors)
