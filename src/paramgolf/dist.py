"""The little that paramgolf needs from torch.distributed, the same with one process and with many.

Under `torchrun` the environment (RANK, WORLD_SIZE, LOCAL_RANK) names the processes; without it every call here is a
no-op, so no caller asks how many processes there are. Collectives must be called by all ranks in the same order.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from paramgolf.errors import GolfError

# Newer versions of torch have renamed it and warn about the old name.
_all_gather = getattr(torch_dist, "all_gather_single", None) or torch_dist.all_gather_into_tensor
_reduce_scatter = getattr(torch_dist, "reduce_scatter_single", None) or torch_dist.reduce_scatter_tensor
# One rank may quantise, pack or prove for long while the others wait; a rank that dies is noticed at once anyway.
TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Dist:
    """This process among its peers. `Dist()` is a single process on the CPU."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backend: str = "none"

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes files."""
        return self.rank == 0

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place; returns `tensor`."""
        if self.world > 1:
            torch_dist.all_reduce(tensor, op=torch_dist.ReduceOp.SUM)
        return tensor

    def all_max(self, value: float) -> float:
        """The largest of the ranks' numbers (a stop decision: 1.0 if any rank wants to stop)."""
        return self._reduce_number(value, torch_dist.ReduceOp.MAX) if self.world > 1 else float(value)

    def all_sum(self, value: float) -> float:
        """The sum of the ranks' numbers, in float64."""
        return self._reduce_number(value, torch_dist.ReduceOp.SUM) if self.world > 1 else float(value)

    def barrier(self) -> None:
        """Returns once every rank has arrived."""
        self.all_sum(0.0)

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Overwrite `tensor` (contiguous) with that of rank `src`; returns it."""
        if self.world > 1:
            torch_dist.broadcast(tensor, src=src)
        return tensor

    def broadcast_json(self, value: Any, src: int = 0) -> Any:
        """The JSON-able `value` of rank `src` on every rank."""
        if self.world == 1:
            return value
        text = json.dumps(value).encode() if self.rank == src else b""
        size = torch.tensor([len(text)], dtype=torch.int64, device=self.device)
        self.broadcast(size, src)
        data = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if self.rank == src:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self.broadcast(data, src)
        return json.loads(bytes(data.tolist()))

    def all_gather_into(self, out: Tensor, tensor: Tensor) -> Tensor:
        """`out` (world, *tensor.shape), contiguous, receives every rank's `tensor`; returns it."""
        if self.world > 1:
            _all_gather(out.view(self.world * tensor.numel()), tensor.reshape(-1))
        else:
            out.copy_(tensor.reshape(out.shape))
        return out

    def reduce_scatter_sum(self, out: Tensor, table: Tensor) -> Tensor:
        """`out` receives the sum over ranks of row `rank` of `table` (world, *out.shape), contiguous; returns it."""
        if self.world > 1:
            _reduce_scatter(out.view(-1), table.view(-1))
        else:
            out.copy_(table.reshape(out.shape))
        return out

    def close(self) -> None:
        """Leave the process group; harmless when there is none."""
        if self.world > 1 and torch_dist.is_initialized():
            torch_dist.destroy_process_group()

    def _reduce_number(self, value: float, op: Any) -> float:
        box = torch.tensor([value], dtype=torch.float64, device=self.device)
        torch_dist.all_reduce(box, op=op)
        return float(box)


def pick_device(choice: str | torch.device, local_rank: int = 0) -> torch.device:
    """`auto` (a CUDA device where there is one), `cpu`, `cuda` or `cuda:N` as a device this process can use."""
    name = str(choice)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise GolfError(f"train.device '{name}' is no device; use auto, cpu or cuda") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise GolfError(f"train.device '{name}' is not supported; use auto, cpu or cuda")
    if not torch.cuda.is_available():
        raise GolfError("train.device is 'cuda', but no usable CUDA device is present; use train.device=cpu or auto")
    index = local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise GolfError(
            f"process {local_rank} of this machine wants CUDA device {index}, but there are "
            f"{torch.cuda.device_count()}; start fewer processes (torchrun --nproc_per_node) or use train.device=cpu"
        )
    return torch.device("cuda", index)


def init(device: str | torch.device = "auto") -> Dist:
    """Join the process group that the environment names (torchrun), or stay alone; selects the CUDA device."""
    world, rank, local_rank = (_env_int(name, default) for name, default in _ENV.items())
    chosen = pick_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world == 1:
        return Dist(device=chosen)
    if not 0 <= rank < world:
        raise GolfError(f"RANK is {rank} but WORLD_SIZE is {world}; start the processes with torchrun")
    # Tensors on either device can be exchanged: a CUDA run also broadcasts things that live on the CPU.
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    if not torch_dist.is_initialized():
        try:
            torch_dist.init_process_group(backend, rank=rank, world_size=world, timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise GolfError(
                f"rank {rank} of {world} cannot join the others: {error}; start them with torchrun"
            ) from error
    return Dist(rank=rank, world=world, device=chosen, backend=backend)


_ENV = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}


def _env_int(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise GolfError(f"environment variable {name} is '{text}', not a whole number; start with torchrun") from None
