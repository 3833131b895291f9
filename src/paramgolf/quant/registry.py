"""Post-training quantisers by name. Adding one is one file with a function like `rtn.quantize` and one line here.

`quantize(weight, grid, hessian=None) -> (codes, scale)`: float32 (rows, cols) or vector to int8 codes of the same shape
and the grid's scale. `hessian` is (cols, cols) float32, the mean of x x^T over the inputs of that layer; a quantiser
that needs it and gets None falls back to rounding to nearest.
"""

from __future__ import annotations

from paramgolf.registry import Registry

QUANTIZERS = Registry(
    "quantizer",
    {
        "rtn": "paramgolf.quant.rtn:quantize",
        "percentile": "paramgolf.quant.percentile:quantize",
        "gptq": "paramgolf.quant.gptq:quantize",
    },
)
CALIBRATED = frozenset({"gptq"})  # those that use Hessians: a run collects them on training text before it packs
