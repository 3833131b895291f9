"""Where the bytes of an artifact are: every byte belongs to a group, and the groups add up to the file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paramgolf.model.names import is_control
from paramgolf.pack.codecs.base import role
from paramgolf.pack.stored import StoredTensor

_GROUPS = {
    "tok_emb.weight": "embedding",
    "lm_head.weight": "head",
    "attn.c_q.weight": "attention.q",
    "attn.c_k.weight": "attention.k",
    "attn.c_v.weight": "attention.v",
    "attn.proj.weight": "attention.o",
    "mlp.fc.weight": "mlp.up",
    "mlp.proj.weight": "mlp.down",
}

_CORRECTION = re.compile(r"\.(lqer_[ab]|awq_\d+)$")  # tensors that export adds to a matrix


def group_of(name: str) -> str:
    """The ledger's group of a tensor; whatever is not of the plain transformer belongs to `parts`."""
    known = _GROUPS.get(role(name))
    if known:
        return known
    if _CORRECTION.search(name):
        return "corrections"
    return "control" if is_control(name) else "parts"


@dataclass(frozen=True)
class Ledger:
    """Bytes by group. `groups` sums to `file_bytes`; code stands beside, as it is no part of the file."""

    groups: dict[str, int]
    code_bytes: int = 0
    count: str = "file"
    cap_bytes: int = 0
    codec: str = ""
    payload_bytes: int = 0
    weights: int = 0
    fit: dict[str, Any] = field(default_factory=dict)  # what the solver chose (`solver.Fit`); empty without it

    @property
    def file_bytes(self) -> int:
        return sum(self.groups.values())

    @property
    def counted_bytes(self) -> int:
        """What the cap counts: the whole file, or (challenge) the file without its tokenizer plus the code."""
        if self.count == "file":
            return self.file_bytes
        return self.file_bytes - self.groups.get("tokenizer", 0) + self.code_bytes


def attribute(parts: Mapping[str, int], tensors: Iterable[StoredTensor]) -> Ledger:
    """The ledger of a file whose sections have the lengths `parts` (see container.Encoded).

    One stream holds the codes of many tensors, so its bytes are shared out by the tensors' zero-order entropy, and
    those of the kept tensors by their plain size; scales, tokenizer, manifest and container are exact.
    """
    tensors = list(tensors)
    quantised = [t for t in tensors if t.spec.bits]
    kept = [t for t in tensors if not t.spec.bits]
    groups: dict[str, int] = {}
    _share(groups, parts["codes"], [(group_of(t.name), entropy_bits(t.values)) for t in quantised])
    _share(groups, parts["kept"], [(group_of(t.name), float(t.spec.nbytes)) for t in kept])
    groups["scales"] = parts["scales"]
    for key in ("tokenizer", "manifest", "container"):
        groups[key] = parts[key]
    extra = sum(size for key, size in parts.items() if key.startswith("extra "))
    if extra:
        groups["extra"] = extra
    payload = sum(t.spec.nbytes for t in tensors)
    weights = sum(t.spec.size for t in tensors if not _CORRECTION.search(t.name))  # those the model was trained with
    return Ledger(groups, payload_bytes=payload, weights=weights)


def entropy_bits(codes: np.ndarray) -> float:
    """Zero-order entropy of a whole integer array in bits, at least one bit so that no tensor is free."""
    counts = np.bincount(codes.reshape(-1).astype(np.int16) + 128, minlength=256)
    counts = counts[counts > 0]
    return max(1.0, float(counts @ np.log2(codes.size / counts))) if codes.size else 1.0


def _share(groups: dict[str, int], total: int, weights: list[tuple[str, float]]) -> None:
    """Add `total` bytes to the groups in proportion to the weights, whole bytes, nothing lost."""
    sums: dict[str, float] = {}
    for group, weight in weights:
        sums[group] = sums.get(group, 0.0) + weight
    if not sums:
        return
    names, values = list(sums), np.cumsum(list(sums.values()))
    edges = np.rint(values / values[-1] * total).astype(np.int64) if values[-1] > 0 else np.full(len(names), total)
    for name, size in zip(names, np.diff(edges, prepend=0), strict=True):
        groups[name] = groups.get(name, 0) + int(size)
