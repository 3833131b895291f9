"""The two functions of FlashAttention-3 that the public scripts import, by torch's own kernels.

`bench.gpu` puts this folder on the path of a script where the real package is not installed, so that the script runs
as it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from paramgolf.model.backends import ScaledDotProduct, VariableLength

_dense, _ragged = ScaledDotProduct(), VariableLength()


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, **options: Any) -> Tensor:
    """(B, T, H, K) from q of that shape and k, v (B, T, G, K); causal only."""
    _only_causal(causal, options)
    return _dense(q, k, v)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    causal: bool = False, **options: Any,
) -> Tensor:  # fmt: skip
    """(N, H, K) from rows packed one after the other, N tokens in all; causal only, queries and keys of one cut."""
    _only_causal(causal, options)
    return _ragged(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), (cu_seqlens_q, max_seqlen_q)).squeeze(0)


def _only_causal(causal: bool, options: dict[str, Any]) -> None:
    if not causal or any(value not in (None, (-1, -1)) for value in options.values()):
        raise NotImplementedError(f"this stand-in is causal attention alone, not causal={causal} with {options}")
