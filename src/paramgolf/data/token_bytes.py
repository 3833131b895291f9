"""How many bytes of text a token stands for: the denominator of bits per byte."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paramgolf.data.sp_model import BYTE, CONTROL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, SpModel


@dataclass(frozen=True)
class TokenBytes:
    """Byte table of a vocabulary of V tokens.

    base_bytes: int16 (V,), bytes of the token itself. leading_space: bool (V,), the token adds one byte for its
    leading blank unless the token before it is a boundary. boundary: bool (V,), control, unknown and unused tokens.
    Source of the rule: the evaluation of openai/parameter-golf. Exactly reversible tokenizers have no leading_space
    (a blank is always a byte there), so their count is the true number of bytes in every context.
    """

    base_bytes: np.ndarray
    leading_space: np.ndarray
    boundary: np.ndarray

    def count(self, prev: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Bytes of each target token given the token before it; int64, shape of `target`."""
        extra = self.leading_space[target] & ~self.boundary[prev]
        return self.base_bytes[target].astype(np.int64) + extra

    def total(self, tokens: np.ndarray, chunk: int = 1 << 22) -> int:
        """Bytes of tokens[1:], each with its predecessor: what a score over the whole stream divides by."""
        last = len(tokens) - 1
        spans = ((i, min(i + chunk, last)) for i in range(0, last, chunk))
        return sum(int(self.count(tokens[i:j], tokens[i + 1 : j + 1]).sum()) for i, j in spans)


def table(model: SpModel, reversible: bool, operators: str = "") -> TokenBytes:
    """The byte table of a SentencePiece model; user-defined `operators` stand for no byte."""
    size = len(model.pieces)
    base, space, boundary = np.zeros(size, np.int16), np.zeros(size, bool), np.zeros(size, bool)
    for index, piece in enumerate(model.pieces):
        if piece.kind in (CONTROL, UNKNOWN, UNUSED):
            boundary[index] = True
        elif piece.kind == BYTE:
            base[index] = 1
        elif piece.kind == USER_DEFINED and piece.text in operators:
            continue
        else:
            text = piece.text
            if text.startswith(SPACE) and not reversible:
                space[index] = True
                text = text[1:]
            base[index] = len(text.replace(SPACE, " ").encode())
    return TokenBytes(base, space, boundary)
