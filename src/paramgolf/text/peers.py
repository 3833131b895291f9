"""The same text under general compressors, so that a score has something to stand beside."""

from __future__ import annotations

import bz2
import lzma
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import zstandard

PEERS: dict[str, Callable[[bytes], bytes]] = {
    "xz -9e": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    "zstd -22": lambda data: zstandard.ZstdCompressor(level=22).compress(data),
    "bzip2 -9": lambda data: bz2.compress(data, 9),
}
PEER_TEXT_LIMIT = 64 * 2**20  # larger texts are not put through the general compressors
PROGRAM_TEXT_LIMIT = 8 * 2**20  # nor those above this through the slow ones
PROGRAM_SECONDS = 600


def compress_peers(text: Path, size: int) -> dict[str, dict[str, float]]:
    """Compressed bytes of the file under each peer, and their bits per byte of the `size` bytes that a score of it
    counts: the documents' own, without what separates them. Each sees the whole text at once. 7-Zip's PPMd and zpaq
    are among them where they are installed."""
    data = text.read_bytes()
    sizes = {name: len(compress(data)) for name, compress in PEERS.items()}
    if len(data) <= PROGRAM_TEXT_LIMIT:
        sizes |= _programs(text)
    return {name: {"bytes": made, "bpb": 8 * made / max(size, 1)} for name, made in sizes.items()}


def _programs(text: Path) -> dict[str, int]:
    sizes = {}
    seven, zpaq = _program("7zz", "7z", "7za"), _program("zpaq")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "text")  # an archive holds name and date: the same ones for the same size
        shutil.copyfile(text, copy)
        os.utime(copy, (10**9, 10**9))
        if seven is not None:
            line = [seven, "a", "-m0=PPMd:o=16:mem=1g", "-bso0", "-bsp0", "text.7z", "text"]
            sizes["7z PPMd, order 16, 1 GB"] = _size(line, Path(folder, "text.7z"))
        if zpaq is not None:
            sizes["zpaq -m5"] = _size([zpaq, "a", "text.zpaq", "text", "-m5"], Path(folder, "text.zpaq"))
    return {name: size for name, size in sizes.items() if size}


def _program(*names: str) -> str | None:
    """The first of them that is installed, by its absolute path."""
    found = next(filter(None, map(shutil.which, names)), None)
    return None if found is None else os.path.abspath(found)


def _size(line: list[str], made: Path) -> int:
    """Bytes of the archive, 0 if the program does not make one (for want of memory, say)."""
    try:
        done = subprocess.run(
            line, cwd=made.parent, capture_output=True, stdin=subprocess.DEVNULL, timeout=PROGRAM_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return made.stat().st_size if done.returncode == 0 and made.is_file() else 0
