"""What a run sets up in the process: threads, number types, seeds; and what it reads back: memory, other GPU users."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch

from paramgolf.model.order import order_of
from paramgolf.optim.newton_schulz import fast_dtype
from paramgolf.processors import cpu_count
from paramgolf.recipe.sections import ModelSection, TrainSection

CPU_MICRO_TOKENS = 8192
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


@dataclass(frozen=True)
class Runtime:
    """What was chosen."""

    device: str
    dtype: torch.dtype
    threads: int


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The activation type: bfloat16 where matrix products in it are faster, else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    return fast_dtype(device)  # a CPU with bfloat16, measured: products 2 to 2.5 times as fast, a whole step 1.6 times


def configure(section: TrainSection, device: torch.device) -> Runtime:
    """Set threads, TF32 and seeds for this process; returns what was chosen."""
    _keep_freed_memory()
    threads = section.threads or _default_threads()
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    seed_all(section.seed)
    return Runtime(str(device), choose_dtype(section.dtype, device), threads)


def _keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks for reuse: without page faults a CPU step is about 5 % faster."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc: nothing to tell
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _default_threads() -> int:
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if "OMP_NUM_THREADS" in os.environ and local_ranks == 1:
        return torch.get_num_threads()
    allowed = cpu_count()
    return max(1, min(allowed, physical_cores() or allowed) // local_ranks)


def physical_cores() -> int:
    """Cores without their second threads; 0 = unknown."""
    return psutil.cpu_count(logical=False) or 0


def seed_all(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All random states: tensors (torch, the CUDA device in use) and JSON-able numbers (python, numpy)."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        tensors["cuda"] = torch.cuda.get_rng_state()
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    numbers = {
        "python": [version, list(words), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
    }
    return tensors, numbers


def restore_rng(tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
    """Put back what `rng_state` returned (also after a round trip through JSON)."""
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, words, gauss = numbers["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = numbers["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def peak_memory_bytes(device: torch.device) -> dict[str, int]:
    """Highest memory use so far: of the process, and of the GPU by this process."""
    scale = 1 if sys.platform == "darwin" else 1024
    peak = {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}
    if device.type == "cuda":
        peak["cuda"] = torch.cuda.max_memory_allocated(device)
    return peak


def gpu_users(device: torch.device) -> list[str]:
    """What else holds memory on the card, one line each; empty on a CPU or when the card is free."""
    if device.type != "cuda":
        return []
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    lines = [line for line in _nvidia_smi_processes() if not line.startswith(f"{os.getpid()},")]
    held = total - free - own
    if not lines and held < 2 * 2**30:  # a CUDA context of our own takes well under this
        return []
    summary = (
        f"{held / 2**30:.1f} of {total / 2**30:.1f} GiB of {torch.cuda.get_device_name(device)} are in use by others"
    )
    return [summary, *(f"process {line}" for line in lines)]


def _nvidia_smi_processes() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []


def micro_tokens(section: TrainSection, model: ModelSection, device: torch.device) -> int:
    """Tokens of one forward on one rank: the recipe's, else what the device's caches or memory suggest."""
    if section.micro_batch_tokens:
        return section.micro_batch_tokens
    if device.type != "cuda":
        return CPU_MICRO_TOKENS
    # Activations kept for the backward pass, 2 bytes each: about 16 of the width and 6 of the MLP width a layer.
    layers = len(order_of(model, model.loop_extra).layers)
    bytes_a_token = 2 * layers * (16 * model.dim + 6 * model.mlp_hidden)
    most = torch.cuda.get_device_properties(device).total_memory // (2 * bytes_a_token)
    return max(section.seq_len, min(131_072, 1 << max(0, int(most).bit_length() - 1)))
