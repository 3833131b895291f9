"""Four 6-bit codes in three bytes, the layout of PR 107 (little-endian bit order, rows padded to a multiple of 4)."""

from __future__ import annotations

import numpy as np

OFFSET = 31  # codes -31..31 are stored as 0..62; a padding column holds code 0


def packed6_size(rows: int, columns: int) -> int:
    """Bytes of a packed (rows, columns) matrix."""
    return rows * (-(-columns // 4)) * 3


def pack6(codes: np.ndarray) -> np.ndarray:
    """int8 (rows, columns) in [-31, 31] -> uint8 (packed6_size,)."""
    rows, columns = codes.shape
    padded = np.full((rows, -(-columns // 4) * 4), OFFSET, dtype=np.uint32)
    padded[:, :columns] = codes.astype(np.int32) + OFFSET
    four = padded.reshape(-1, 4)
    word = four[:, 0] | four[:, 1] << 6 | four[:, 2] << 12 | four[:, 3] << 18
    return np.stack([word, word >> 8, word >> 16], axis=1).astype(np.uint8).reshape(-1)


def unpack6(packed: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """uint8 (packed6_size,) -> int8 (rows, columns). Raises ValueError on another length."""
    if packed.size != packed6_size(rows, columns):
        raise ValueError(f"{packed.size} bytes for a packed {rows} x {columns} matrix")
    three = packed.reshape(-1, 3).astype(np.uint32)
    word = three[:, 0] | three[:, 1] << 8 | three[:, 2] << 16
    four = np.stack([word >> shift & 63 for shift in (0, 6, 12, 18)], axis=1)
    return (four.astype(np.int16) - OFFSET).astype(np.int8).reshape(rows, -1)[:, :columns].copy()
