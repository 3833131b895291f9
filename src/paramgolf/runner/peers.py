"""The same text under general compressors, so that a score has something to stand beside."""

from __future__ import annotations

import bz2
import lzma
from collections.abc import Callable
from pathlib import Path

import zstandard

PEERS: dict[str, Callable[[bytes], bytes]] = {
    "xz -9e": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    "zstd -22": lambda data: zstandard.ZstdCompressor(level=22).compress(data),
    "bzip2 -9": lambda data: bz2.compress(data, 9),
}


def compress_peers(text: Path) -> dict[str, dict[str, float]]:
    """Compressed bytes and bits per byte of the file under each peer; each sees the whole text at once."""
    data = text.read_bytes()
    sizes = {name: len(compress(data)) for name, compress in PEERS.items()}
    return {name: {"bytes": size, "bpb": 8 * size / max(len(data), 1)} for name, size in sizes.items()}
