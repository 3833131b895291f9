"""Choosing the codec: `auto` = the smallest of what there is, compared on a sample where trying all takes minutes."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np

from paramgolf.pack.codecs.base import Codec, CodeSpec, CodeTensor
from paramgolf.pack.registry import CODECS

_EXACT_LIMIT = 1 << 21  # codes; up to so many every codec is run in full
_SAMPLE_ROWS = 32  # rows of each matrix in the sample, at the least
_NEEDS = {"zstd": "zstandard", "brotli": "brotli"}


def available() -> list[str]:
    """Registered codecs whose compressor is installed; `raw` only serves to look at the plain layout."""
    return [n for n in CODECS if n != "raw" and (n not in _NEEDS or importlib.util.find_spec(_NEEDS[n]) is not None)]


def encode_codes(tensors: Sequence[CodeTensor], codec: str = "auto", level: int = -1) -> tuple[str, bytes]:
    """(codec name, bytes). Deterministic; raises GolfError for an unknown codec."""
    if codec != "auto":
        made: Codec = CODECS[codec]()
        return codec, made.encode(tensors, level)
    names = available()
    if sum(t.spec.size for t in tensors) > _EXACT_LIMIT:
        names = _best_on_sample(names, tensors)
    coded = [(name, CODECS[name]().encode(tensors, -1)) for name in names]
    return min(coded, key=lambda item: len(item[1]))


def _best_on_sample(names: list[str], tensors: Sequence[CodeTensor]) -> list[str]:
    """The codec that is smallest on evenly spaced rows (about `_EXACT_LIMIT` / 2 codes) of every tensor."""
    total = sum(t.spec.size for t in tensors)
    keep = _EXACT_LIMIT / 2 / total
    sample = []
    for tensor in tensors:
        rows, columns = tensor.spec.matrix
        count = min(rows, max(_SAMPLE_ROWS, round(rows * keep)))
        picked = np.linspace(0, rows - 1, count).astype(np.int64)
        codes = np.ascontiguousarray(tensor.codes.reshape(rows, columns)[picked])
        scale = tensor.spec.scale
        spec = CodeSpec(
            tensor.spec.name,
            codes.shape,
            tensor.spec.bits,
            tensor.spec.packed,
            scale[picked] if scale is not None and scale.ndim else scale,
        )
        sample.append(CodeTensor(spec, codes))
    sizes = {name: len(CODECS[name]().encode(sample, -1)) for name in names}
    return [min(sizes, key=lambda name: sizes[name])]
