"""Which tensors of a model are control tensors: small learned vectors that steer the stream. No torch here."""

from __future__ import annotations

# Substrings, as the reference scripts match them (so `attn_scale` also finds `attn_scales`).
CONTROL_NAMES = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weight", "skip_gate", "attn_gate", "lanes.")


def is_control(name: str) -> bool:
    """True for the tensors that are optimised as scalars and stored in full precision."""
    return any(control in name for control in CONTROL_NAMES)
