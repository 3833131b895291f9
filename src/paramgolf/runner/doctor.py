"""`golf doctor`: what this machine has, what a run would use, and what is missing."""

from __future__ import annotations

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

from paramgolf.runner.environment import environment

# What each optional package is for; without it the rest works.
OPTIONAL = {
    "huggingface_hub": "golf data fetch (pip install 'paramgolf[data]')",
    "pyarrow": "parquet files (pip install 'paramgolf[data]')",
    "scipy": "statistics of comparisons (pip install 'paramgolf[lab]')",
    "optuna": "sweeps (pip install 'paramgolf[lab]')",
    "flash_attn_interface": "FlashAttention-3 on Hopper GPUs (torch's own kernels serve otherwise)",
}


def examine() -> dict[str, Any]:
    """Facts as plain values; a missing piece carries the reason it is missing."""
    facts = environment()
    missing: dict[str, str] = {}
    for name, purpose in OPTIONAL.items():
        try:
            import_module(name)
        except Exception as error:  # a broken installation raises what it likes
            missing[name] = f"{purpose}; import says: {error}"
    compiler = shutil.which("g++") or shutil.which("clang++")
    facts["compiler"] = compiler or "none: training runs uncompiled"
    facts["device"] = "cuda" if facts["gpus"] else "cpu"
    facts["free_disk_bytes"] = shutil.disk_usage(Path.cwd()).free
    facts["missing"] = missing
    return facts


def doctor_text(facts: dict[str, Any]) -> str:
    rows = [
        ("python, torch", f"{facts['python']}, {facts['torch']}"),
        ("processor", f"{facts['cpu']}, {facts['cpu_count']} cores, {facts['threads']} threads used"),
        ("memory", f"{facts['memory_bytes'] / 2**30:.1f} GiB"),
        ("accelerator", ", ".join(facts["gpus"]) or "none: training runs on the processor"),
        ("compiler", facts["compiler"]),
        ("free disk here", f"{facts['free_disk_bytes'] / 2**30:.1f} GiB"),
    ]
    lines = [f"{name:15} {value}" for name, value in rows]
    lines += [f"{'missing':15} {name}: {why}" for name, why in facts["missing"].items()]
    return "\n".join(lines)
