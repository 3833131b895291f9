"""Choosing the codec: `auto` = the smallest of what there is, compared on a sample where trying all takes minutes."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np

from paramgolf.pack.codecs.base import Codec, CodeSpec, CodeTensor
from paramgolf.pack.registry import CODECS

_EXACT_LIMIT = 1 << 19  # codes; up to so many every codec is run in full
_SAMPLE = 1 << 18  # codes on which the slow ones are compared beyond that
_SAMPLE_ROWS = 16  # rows of each matrix in the sample, at the least
_FAST = ("rans",)  # always run in full
_NEEDS = {"zstd": "zstandard", "brotli": "brotli"}
_LEFT_OUT = ("raw", "shuffled", "grouped")  # the plain layout, and the slow layouts of two records


def available() -> list[str]:
    """Registered codecs that `auto` tries: those that may be the smallest and whose compressor is installed."""
    tried = [n for n in CODECS if n not in _LEFT_OUT]
    return [n for n in tried if n not in _NEEDS or importlib.util.find_spec(_NEEDS[n]) is not None]


def encode_codes(tensors: Sequence[CodeTensor], codec: str = "auto", level: int = -1) -> tuple[str, bytes]:
    """(codec name, bytes). Deterministic; raises GolfError for an unknown codec."""
    if codec != "auto":
        made: Codec = CODECS[codec]()
        return codec, made.encode(tensors, level)
    names = available()
    total = sum(t.spec.size for t in tensors)
    if total <= _EXACT_LIMIT:
        return _smallest(names, tensors)
    sample = _sample(tensors, total)
    sizes = {name: len(CODECS[name]().encode(sample, -1)) for name in names if name not in _FAST}
    slow = min(sizes, key=lambda name: sizes[name])
    fast = [name for name in names if name in _FAST]
    if not fast:
        return _smallest([slow], tensors)
    best = _smallest(fast, tensors)
    likely = sizes[slow] * total / sum(t.spec.size for t in sample)
    return best if len(best[1]) <= likely else min(best, _smallest([slow], tensors), key=lambda item: len(item[1]))


def _smallest(names: Sequence[str], tensors: Sequence[CodeTensor]) -> tuple[str, bytes]:
    return min(((name, CODECS[name]().encode(tensors, -1)) for name in names), key=lambda item: len(item[1]))


def _sample(tensors: Sequence[CodeTensor], total: int) -> list[CodeTensor]:
    """Evenly spaced rows of every tensor, about `_SAMPLE` codes."""
    sample = []
    for tensor in tensors:
        rows, columns = tensor.spec.matrix
        count = min(rows, max(_SAMPLE_ROWS, round(rows * _SAMPLE / total)))
        picked = np.linspace(0, rows - 1, count).astype(np.int64)
        codes = np.ascontiguousarray(tensor.codes.reshape(rows, columns)[picked])
        scale = tensor.spec.scale
        part = scale.reshape(-1)[picked] if scale is not None and scale.ndim else scale
        spec = CodeSpec(tensor.spec.name, codes.shape, tensor.spec.bits, tensor.spec.packed, part)
        sample.append(CodeTensor(spec, codes))
    return sample
