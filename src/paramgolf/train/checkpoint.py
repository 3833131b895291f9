"""Resumable state on disk: one safetensors file a checkpoint, its JSON state in the header. Nothing is unpickled.

A file is written whole or not at all, carries a CRC-32 of every tensor and of its JSON, and the two newest are kept:
a damaged newest one is skipped with a note, and the run goes on from the one before it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from paramgolf import strict_json
from paramgolf.errors import GolfError
from paramgolf.files import atomic_write

FORMAT = 1
KEEP = 2
_PREFIX = "step-"


@dataclass(frozen=True)
class Snapshot:
    """Everything a run needs to go on: `tensors` by flat name ("model/...", "optim/..."), `state` JSON-able."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any] = field(default_factory=dict)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name starts with `prefix/`, without it."""
        return {name[len(prefix) + 1 :]: t for name, t in self.tensors.items() if name.startswith(prefix + "/")}


def tensor_crc(tensor: Tensor) -> int:
    """CRC-32 of a CPU tensor's bytes."""
    flat = tensor.detach().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def encode(snapshot: Snapshot) -> bytes:
    """The file's bytes; equal snapshots give equal bytes."""
    tensors = {name: _on_cpu(t) for name, t in sorted(snapshot.tensors.items())}
    header = {
        "format": FORMAT,
        "step": snapshot.step,
        "state": snapshot.state,
        "crc32": {name: tensor_crc(t) for name, t in tensors.items()},
    }
    text = json.dumps(header, sort_keys=True, allow_nan=False)
    # one key: the order of several is not fixed by the format
    return serialize(tensors, metadata={"paramgolf": f"{zlib.crc32(text.encode())} {text}"})


def _on_cpu(tensor: Tensor) -> Tensor:
    copy = tensor.detach().to("cpu").contiguous()
    return copy.clone() if copy.data_ptr() == tensor.data_ptr() else copy  # views may share memory; safetensors refuses


def read(path: Path) -> Snapshot:
    """Read and check one file. Raises GolfError when it is damaged, cut short or of another format."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as stream:
            crc, _, text = (stream.metadata() or {})["paramgolf"].partition(" ")
            if zlib.crc32(text.encode()) != int(crc):
                raise GolfError(f"checkpoint {path} is damaged (its header does not match its checksum)")
            header = strict_json.loads(text)
            if header["format"] != FORMAT:
                raise GolfError(f"checkpoint {path} has format {header['format']}, this version reads {FORMAT}")
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a dict)
            expected = header["crc32"]
            bad = [name for name in expected if name not in tensors or tensor_crc(tensors[name]) != expected[name]]
            if bad or len(expected) != len(tensors):
                raise GolfError(f"checkpoint {path} is damaged (checksum of {bad[0] if bad else 'the tensor table'})")
            if not isinstance(header["state"], dict):
                raise ValueError("its state is no table")
            return Snapshot(int(header["step"]), tensors, header["state"])
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise GolfError(f"checkpoint {path} cannot be read ({error})") from error


class Store:
    """The checkpoints of one run folder, written by the main rank and read by all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def clean(self) -> None:
        """Remove what a killed writer left behind."""
        for stray in self.folder.glob(f".{_PREFIX}*.tmp"):
            stray.unlink(missing_ok=True)

    def drop_after(self, step: int) -> None:
        """Remove the (damaged) checkpoints beyond the one that is resumed, so that they do not count as the newest."""
        for path in self.paths():
            if path.name > _name(step):
                path.unlink(missing_ok=True)

    def paths(self) -> list[Path]:
        """Checkpoint files, newest first."""
        return sorted(self.folder.glob(f"{_PREFIX}*.safetensors"), reverse=True)

    def save(self, snapshot: Snapshot) -> Path:
        """Write a checkpoint and drop all but the two newest. Raises GolfError (disk full, folder not writable)."""
        path = self.folder / _name(snapshot.step)
        atomic_write(path, encode(snapshot))
        for old in self.paths()[KEEP:]:
            old.unlink(missing_ok=True)
        return path

    def newest(self, note: Callable[[str], None]) -> Snapshot | None:
        """The newest usable checkpoint; `note` is told of each damaged one that was skipped."""
        for path in self.paths():
            try:
                return read(path)
            except GolfError as error:
                note(f"{error}; trying the one before it")
        return None


def _name(step: int) -> str:
    return f"{_PREFIX}{step:09d}.safetensors"


def check_writable(folder: Path) -> None:
    """Fail now, not after an hour of training, when checkpoints could not be written to `folder`."""
    probe = folder / ".probe"
    atomic_write(probe, b"")
    probe.unlink(missing_ok=True)
