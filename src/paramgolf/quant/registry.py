"""Post-training quantisers by name. Adding one is one file with a function like `rtn.quantize` and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from paramgolf.recipe.sections import QuantSection
from paramgolf.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from paramgolf.quant.grid import Grid


class Quantizer(Protocol):
    """From float weights and their grid to integers."""

    def __call__(self, weight: Tensor, grid: Grid, hessian: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(int8 codes of the shape of `weight`, scale of the grid's type: (R,) of a matrix, () of a vector).

        `weight` is float32 (R, C) or a vector; `hessian` (C, C) float32, any positive multiple of the sum of x x^T over
        the inputs of that layer. A quantiser that needs one and gets None rounds to nearest. GolfError for weights or
        a Hessian that are not finite or do not fit each other; the caller adds the tensor's name.
        """
        ...


QUANTIZERS = Registry(
    "quantizer",
    {
        "rtn": "paramgolf.quant.rtn:quantize",
        "percentile": "paramgolf.quant.percentile:quantize",
        "weighted": "paramgolf.quant.weighted:quantize",
        "gptq": "paramgolf.quant.gptq:quantize",
    },
)
_CALIBRATED = frozenset({"weighted", "gptq"})


def calibrated(section: QuantSection) -> bool:
    """Whether export uses Hessians: then a run collects them on training text before it packs."""
    return section.method in _CALIBRATED or section.coarse_fraction > 0
