"""Where prepared data is kept between runs, and hashes of large files that need not be read again."""

from __future__ import annotations

import json
import os
from pathlib import Path

from paramgolf.errors import GolfError
from paramgolf.files import atomic_write, sha256_file

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
    """SHA-256 of a file; for a large one it is remembered in `cache` under its path, size and modification time."""
    try:
        state = path.stat()
        if state.st_size < _SMALL:
            return sha256_file(path)
        memory = cache / "hashes.json"
        key = f"{path.resolve()}|{state.st_size}|{state.st_mtime_ns}"
        known = _known(memory)
        if key not in known:
            known = {**_known(memory), key: sha256_file(path)}
            atomic_write(memory, json.dumps(known).encode())
        return known[key]
    except OSError as error:
        raise GolfError(f"cannot read {path}: {error.strerror or error}") from error


def _known(memory: Path) -> dict[str, str]:
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
