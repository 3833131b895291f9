"""The coders of the weight bench; each is measured in a process of its own, on one core: python -m bench.weight_coders.

The process prints one JSON object: bytes, encode and decode seconds, and the most memory it (or the program it ran)
held, the payload itself and the interpreter included.
"""

from __future__ import annotations

import json
import lzma
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = list[tuple[str, np.ndarray]]
Coder = tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]

OURS = ("ours", "with-scales")
PLAIN = ("zlib-9", "zstd-22", "lzma-9e", "brotli-11", "lrzip-z")
PEERS = tuple(name + turn for name in PLAIN for turn in ("", "-T"))  # T = every tensor transposed
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


def general(name: str) -> Coder | None:
    """(compress, expand) of a general compressor at its strongest; None where it is not installed."""
    if name == "zlib-9":
        return lambda b: zlib.compress(b, 9), zlib.decompress
    if name == "lzma-9e":
        return lambda b: lzma.compress(b, preset=9 | lzma.PRESET_EXTREME), lzma.decompress
    if name == "lrzip-z":
        if not shutil.which("lrzip"):
            return None
        return (lambda b: _lrzip("-z -L 9 -p 1", b)), (lambda b: _lrzip("-d -p 1", b))
    try:
        if name == "zstd-22":
            import zstandard

            return zstandard.ZstdCompressor(level=22).compress, zstandard.ZstdDecompressor().decompress
        if name == "brotli-11":
            import brotli

            return (lambda b: brotli.compress(b, quality=11, lgwin=24)), brotli.decompress
    except ImportError:
        return None
    raise SystemExit(f"no coder '{name}'; known: {', '.join((*OURS, *PEERS))}")


def installed(name: str) -> bool:
    return name in OURS or general(name.removesuffix("-T")) is not None


def _lrzip(flags: str, data: bytes) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in"), Path(folder, "out")
        source.write_bytes(data)
        arguments = ["lrzip", "-q", "-f", *flags.split(), "-o", str(target), str(source)]
        subprocess.run(arguments, check=True, capture_output=True)
        return target.read_bytes()


def flat(arrays: Arrays, transposed: bool) -> bytes:
    """One byte a weight, tensor after tensor."""
    return b"".join(np.ascontiguousarray(q.T if transposed else q).tobytes() for _, q in arrays)


def run_general(name: str, arrays: Arrays) -> dict[str, Any]:
    coder = general(name.removesuffix("-T"))
    assert coder is not None
    payload = flat(arrays, name.endswith("-T"))
    began = time.perf_counter()
    coded = coder[0](payload)
    middle = time.perf_counter()
    right = coder[1](coded) == payload
    return _result(name, len(coded), began, middle, right)


def run_ours(name: str, arrays: Arrays, scales: list[np.ndarray] | None) -> dict[str, Any]:
    """`with-scales`: as in an artifact, where the decoder has the row scales before the codes."""
    from paramgolf.pack.codecs.base import CodeSpec, CodeTensor
    from paramgolf.pack.codecs.rans import RansCodec

    known = scales if name == "with-scales" and scales is not None else [None] * len(arrays)
    specs = [CodeSpec(n, q.shape, 6, scale=s) for (n, q), s in zip(arrays, known, strict=True)]
    began = time.perf_counter()
    coded = RansCodec().encode([CodeTensor(spec, q) for spec, (_, q) in zip(specs, arrays, strict=True)])
    middle = time.perf_counter()
    back = RansCodec().decode(coded, specs)
    right = all(np.array_equal(b, q) for b, (_, q) in zip(back, arrays, strict=True))
    return _result(name, len(coded), began, middle, right)


def _result(name: str, size: int, began: float, middle: float, right: bool) -> dict[str, Any]:
    end = time.perf_counter()
    if not right:
        raise SystemExit(f"{name} does not give its input back")
    peak = max(own_peak(), 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    return {"bytes": size, "encode_s": round(middle - began, 3), "decode_s": round(end - middle, 3), "peak_bytes": peak}


def own_peak() -> int:
    """Most memory this process held, in bytes. Linux counts in `ru_maxrss` what the parent held when it forked, too."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def save(path: Path, arrays: Arrays, scales: list[np.ndarray] | None) -> None:
    """The payload as a file that `measure`'s process reads."""
    found = {f"q/{name}": q for name, q in arrays}
    found |= {f"s/{name}": s for (name, _), s in zip(arrays, scales or [], strict=False)}
    np.savez(path, **found)  # type: ignore[arg-type]


def measure(name: str, payload: Path, limit_seconds: float, core: int = 0) -> dict[str, Any]:
    """One coder on one payload in its own process, on the `core`-th of the processors that this one may use;
    {"stopped_after": seconds} where it takes longer than the limit."""
    command = [sys.executable, "-m", "bench.weight_coders", name, str(payload), str(core)]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **ONE_THREAD},
            capture_output=True,
            text=True,
            timeout=limit_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"stopped_after": limit_seconds}
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def main() -> None:
    name, payload, core = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[core % len(allowed)]})
    with np.load(payload) as file:
        arrays = [(key[2:], file[key]) for key in file.files if key.startswith("q/")]
        scales = [file[key] for key in file.files if key.startswith("s/")] or None
    print(json.dumps(run_ours(name, arrays, scales) if name in OURS else run_general(name, arrays)))


if __name__ == "__main__":
    main()
