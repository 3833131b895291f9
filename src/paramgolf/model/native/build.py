"""Compile kernels.c with the machine's C compiler, once a source and machine, and load it. No torch here."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.c")
COMPILE_FLAGS = ("-c", "-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fopenmp", "-fPIC")
# Linked in a step of its own: with -ffast-math the linker would add start-up code that makes the whole process flush
# subnormal numbers from the moment the library is loaded.
LINK_FLAGS = ("-shared", "-fopenmp")
NEEDED_CPU = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")
COMPILE_SECONDS = 60

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_float
SIGNATURES = {
    "attn_fwd": [_I] * 6 + [_P] * 5 + [_F] + [_P] * 2,
    "attn_bwd": [_I] * 6 + [_P] * 5 + [_F] + [_P] * 5,
    "mix_fwd": [_I] * 3 + [_P] * 2 + [_F] + [_P] * 3,
    "mix_bwd": [_I] * 3 + [_P] * 8,
    "square_fwd": [_L, _F] + [_P] * 2,
    "square_bwd": [_L, _F] + [_P] * 3,
    "softcap_ce": [_I] * 2 + [_P] * 2 + [_F] * 2 + [_P, _I],
}


def why_not() -> str:
    """Why the kernels cannot be had on this machine; "" when they can, compiled and loaded."""
    missing = sorted(set(NEEDED_CPU) - cpu_flags())
    if missing:
        return f"this processor has no {', '.join(missing)}"
    if compiler() is None:
        return "no C compiler (cc, gcc or clang) was found"
    try:
        load()
    except (OSError, subprocess.SubprocessError) as error:
        return f"the kernels did not compile: {error}"
    return ""


def cpu_flags() -> set[str]:
    """Instruction set names of the first processor, as Linux calls them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())


def compiler() -> str | None:
    """The C compiler to use: $CC, else cc, gcc or clang."""
    names = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    return next((path for name in names if name and (path := shutil.which(name.split()[0]))), None)


@cache
def load() -> ctypes.CDLL:
    """The compiled kernels, from the user's cache folder when they are there. Cold: about two seconds."""
    command = compiler()
    assert command is not None, "ask why_not first"
    setting = repr((COMPILE_FLAGS, LINK_FLAGS, command, sorted(cpu_flags()), platform.platform()))
    key = hashlib.sha256(SOURCE.read_bytes() + setting.encode())
    library = cache_folder() / f"kernels-{key.hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            compiled, made = str(Path(folder) / "kernels.o"), str(Path(folder) / library.name)
            compiling = [command, *COMPILE_FLAGS, str(SOURCE), "-o", compiled]
            linking = [command, *LINK_FLAGS, compiled, "-o", made, "-lm"]
            for arguments in (compiling, linking):
                subprocess.run(arguments, check=True, capture_output=True, timeout=COMPILE_SECONDS)
            os.replace(made, library)
    loaded = ctypes.CDLL(str(library))
    for name, types in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = types, None
    return loaded


def cache_folder() -> Path:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/paramgolf, readable by its owner only."""
    root = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(root) if root else Path.home() / ".cache") / "paramgolf"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        usable = os.access(folder, os.W_OK)
    except OSError:
        usable = False
    return folder if usable else Path(tempfile.mkdtemp(prefix="paramgolf-"))
