"""Where prepared data is kept between runs, and hashes of large files that need not be read again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from pathlib import Path

from paramgolf.errors import GolfError
from paramgolf.files import atomic_write, sha256_file

_TEMPORARY = re.compile(r"\.[0-9a-f]{20}\.\w{8}|\.hashes\.json\.\w{8}\.tmp|stdin\..*")
_ABANDONED = 7 * 86_400.0  # seconds
_SMALL = 1 << 22  # bytes; hashing less is not worth remembering


def cache_root() -> Path:
    """$PARAMGOLF_CACHE, else the user's cache folder."""
    if base := os.environ.get("PARAMGOLF_CACHE"):
        return Path(base)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "paramgolf"
    try:
        return Path.home() / ".cache" / "paramgolf"
    except RuntimeError:  # a container's user without a name
        raise GolfError("there is no home folder to keep prepared data in; set PARAMGOLF_CACHE to a folder") from None


def remembered_sha256(path: Path, cache: Path) -> str:
    """SHA-256 of a file; for a large one it is remembered in `cache` under its path, size and times of change."""
    try:
        state = path.stat()
        if state.st_size < _SMALL:
            return sha256_file(path)
        memory = cache / "hashes.json"
        # ctime too: a copy may bring its mtime along
        key = f"{path.resolve()}|{state.st_size}|{state.st_mtime_ns}|{state.st_ctime_ns}"
        known = _known(memory)
        if key not in known:
            known = {**_known(memory), key: sha256_file(path)}
            with contextlib.suppress(GolfError):  # a cache that cannot be written only costs time
                atomic_write(memory, json.dumps(known).encode())
        return known[key]
    except OSError as error:
        raise GolfError(f"cannot read {path}: {error.strerror or error}") from error


def sweep(cache: Path) -> None:
    """Remove what processes that were killed left in the cache more than a week ago."""
    for stray in [*cache.glob(".*"), *cache.glob("stdin.*")]:
        with contextlib.suppress(OSError):
            if time.time() - stray.stat().st_mtime < _ABANDONED or not _TEMPORARY.fullmatch(stray.name):
                continue
            if stray.is_dir():
                shutil.rmtree(stray)
            else:
                stray.unlink()


def _known(memory: Path) -> dict[str, str]:
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
