"""The machine and the software a run saw: the part of a record that explains differences."""

from __future__ import annotations

import io
import lzma
import platform
import tarfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import paramgolf
from paramgolf.errors import GolfError
from paramgolf.files import atomic_write, sha256_bytes
from paramgolf.processors import cpu_count

SOURCE_SUFFIXES = (".py", ".toml", ".json", ".c", ".j2")
MAX_SOURCE = 64 * 2**20  # bytes unpacked; ours are about one and a half million
PACKAGES = ("numpy", "sentencepiece", "safetensors", "zstandard", "brotli")


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def source_sha256() -> str:
    """One hash over every source and recipe file of the installed package, names included."""
    return sources_sha256(installed_source())


def installed_source() -> dict[str, bytes]:
    """Every source, recipe and template file of the installed package, by its path in it."""
    root = Path(paramgolf.__file__).parent
    files = sorted(p for p in root.rglob("*") if p.suffix in SOURCE_SUFFIXES)
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in files}


def sources_sha256(files: Mapping[str, bytes]) -> str:
    """The hash `source_sha256` gives, of files kept elsewhere."""
    lines = [f"{name} {sha256_bytes(data)}" for name, data in sorted(files.items(), key=lambda f: PurePosixPath(f[0]))]
    return sha256_bytes("\n".join(lines).encode())


def archive_source(path: Path, files: Mapping[str, bytes]) -> None:
    """Keep the code of a run beside it: a tar.xz file of the package's files, the same bytes for the same code."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"paramgolf/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    atomic_write(path, lzma.compress(buffer.getvalue()))


def read_source(path: Path) -> dict[str, bytes]:
    """The files in such an archive. GolfError if it is none, damaged, or larger than any package of ours."""
    try:
        unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_SOURCE)
        data = unpacker.decompress(path.read_bytes(), MAX_SOURCE)
        if not unpacker.eof or unpacker.unused_data:
            raise GolfError(f"{path}: not the code of a run: too large, cut off, or with something after it")
        files = {}
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isreg() else None
                if content is None:
                    raise GolfError(f"{path}: {member.name} is no plain file")
                files[member.name.removeprefix("paramgolf/")] = content.read()
        return files
    except (OSError, ValueError, tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise GolfError(f"{path} cannot be read: {error}") from None


def environment() -> dict[str, Any]:
    """Versions, processor, memory and accelerator, as plain values."""
    import psutil
    import torch

    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpus else None,
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "cpu": cpu_name(),
        "cpu_count": cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
    }
