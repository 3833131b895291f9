"""The machine and the software a run saw: the part of a record that explains differences."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import paramgolf
from paramgolf.files import sha256_bytes

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
    root = Path(paramgolf.__file__).parent
    files = sorted(p for p in root.rglob("*") if p.suffix in (".py", ".toml"))
    lines = [f"{p.relative_to(root).as_posix()} {sha256_bytes(p.read_bytes())}" for p in files]
    return sha256_bytes("\n".join(lines).encode())


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
        "cpu_count": len(psutil.Process().cpu_affinity())
        if hasattr(psutil.Process, "cpu_affinity")
        else psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
    }
