"""Writing files so that a reader never sees half of one, and hashing them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from paramgolf.errors import GolfError

_LONGEST = 50  # characters of a file's name in that of its temporary sibling; a file system takes 255 bytes


def user_path(path: str | Path) -> Path:
    """`path` with its ~ replaced; ~name stands for itself where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary sibling of `path`, renamed to it when the block succeeds and removed when it does not.

    Raises GolfError when the folder cannot be written or the disk is full, and for a `path` that is no plain file: a
    rename would replace /dev/null itself.
    """
    target = Path(path)
    temporary: Path | None = None
    try:
        if target.exists() and not target.is_file():
            raise GolfError(f"cannot write {target}: it is no plain file; choose another place")
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name[:_LONGEST]}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes 0600; an output is as readable as any file
        with temporary.open("rb") as written:
            os.fsync(written.fileno())  # a power cut after the rename must not leave an empty file
        os.replace(temporary, target)
    except OSError as error:
        reason = error.strerror or error
        raise GolfError(f"cannot write {target}: {reason}; free space or choose another place") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def atomic_write(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
