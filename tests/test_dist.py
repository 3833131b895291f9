"""Two and three gloo processes against one: the collectives, and the sharded optimizers on top of them."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import Parameter

from paramgolf.dist import Dist, init, pick_device
from paramgolf.errors import GolfError
from paramgolf.optim.groups import build_optimizers
from paramgolf.recipe.sections import OptimSection

KINDS = ("muon", "muoneq_r", "normuon", "normuon_pr137")
BLOCK = {"c_q": (16, 16), "c_k": (8, 16), "c_v": (8, 16), "proj": (16, 16), "fc": (40, 16), "down": (16, 40)}


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Model(nn.Module):
    """The parameters of a small transformer without its forward."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding.from_pretrained(random(32, 16, seed=0), freeze=False)
        self.blocks = nn.ModuleList()
        for layer in range(layers):
            block = nn.Module()
            for i, (name, shape) in enumerate(BLOCK.items()):
                block.register_parameter(name, Parameter(random(*shape, seed=10 * layer + i + 1)))
            block.register_parameter("attn_scale", Parameter(torch.ones(16)))
            self.blocks.append(block)


def train(dist: Dist, kind: str, state: dict[str, torch.Tensor] | None, steps: range) -> dict[str, torch.Tensor]:
    """Steps on stored gradients; weights and optimizer state as one flat dict (the input of a later call)."""
    model = Model()
    optimizers = build_optimizers(model, OptimSection(matrix=kind, weight_decay=0.1), dist)
    if state is not None:
        model.load_state_dict({k.removeprefix("w/"): v for k, v in state.items() if k.startswith("w/")})
        optimizers.load_state_dict({k.removeprefix("o/"): v for k, v in state.items() if k.startswith("o/")})
    for step in steps:
        for i, param in enumerate(model.parameters()):
            param.grad = random(*param.shape, seed=1000 + 100 * step + i)
        optimizers.clip(0.5)
        optimizers.step(1.0, 0.95)
    out = {f"w/{k}": v for k, v in model.state_dict().items()}
    return out | {f"o/{k}": torch.as_tensor(v) for k, v in optimizers.state_dict().items()}


def collectives(dist: Dist) -> None:
    """Asserted on every rank."""
    rank, world = dist.rank, dist.world
    assert dist.is_main == (rank == 0)
    assert dist.all_reduce_sum(torch.tensor([1.0, rank])).tolist() == [world, world * (world - 1) / 2]
    assert dist.all_max(float(rank)) == world - 1
    assert dist.all_sum(0.5) == world / 2
    assert dist.broadcast(torch.tensor([rank * 10]), src=world - 1).item() == (world - 1) * 10
    value = {"name": "golf ü", "rank": rank, "list": [1, None]}
    assert dist.broadcast_json(value, src=0) == value | {"rank": 0}
    table = dist.all_gather_into(torch.empty(world, 3), torch.full((3,), float(rank)))
    assert table.tolist() == [[float(r)] * 3 for r in range(world)]
    mine = dist.reduce_scatter_sum(torch.empty(2), torch.arange(2.0 * world).view(world, 2))
    assert mine.tolist() == [world * 2.0 * rank, world * (2.0 * rank + 1)]
    dist.barrier()


def worker(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    dist = init("cpu")
    collectives(dist)
    for kind in KINDS:
        half = load_file(Path(folder, f"{kind}-half.safetensors"))
        save_file(train(dist, kind, None, range(4)), Path(folder, f"{kind}-{world}-{rank}.safetensors"))
        save_file(train(dist, kind, half, range(2, 4)), Path(folder, f"{kind}-{world}-{rank}-resumed.safetensors"))
    halves = {kind: train(dist, kind, None, range(2)) for kind in KINDS}
    if rank == world - 1:  # not the main rank: the state must be complete everywhere
        for kind, state in halves.items():
            save_file(state, Path(folder, f"{kind}-{world}-half.safetensors"))
    dist.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("world", [2, 3])
def test_processes_equal_one_process(world: int, tmp_path: Path) -> None:
    single = {kind: train(Dist(), kind, None, range(4)) for kind in KINDS}
    for kind in KINDS:
        save_file(train(Dist(), kind, None, range(2)), tmp_path / f"{kind}-half.safetensors")
    mp.spawn(worker, args=(world, free_port(), str(tmp_path)), nprocs=world, join=True)
    for kind in KINDS:
        for suffix in ("", "-resumed"):
            ranks = [load_file(tmp_path / f"{kind}-{world}-{r}{suffix}.safetensors") for r in range(world)]
            for name, expected in single[kind].items():
                assert all(torch.equal(ranks[0][name], other[name]) for other in ranks[1:]), (kind, name)
                torch.testing.assert_close(ranks[0][name], expected, rtol=1e-5, atol=1e-5, msg=f"{kind} {name}")
        half = load_file(tmp_path / f"{kind}-{world}-half.safetensors")
        for name, value in train(Dist(), kind, half, range(2, 4)).items():
            torch.testing.assert_close(value, single[kind][name], rtol=1e-5, atol=1e-5, msg=f"{kind} {name}")


def test_one_process_needs_no_group() -> None:
    collectives(Dist())
    assert init("cpu") == Dist()


def test_bad_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(GolfError, match="WORLD_SIZE"):
        init("cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(GolfError, match="RANK is 2"):
        init("cpu")


def test_bad_device() -> None:
    for name in ("toaster", "mps"):
        with pytest.raises(GolfError, match=name):
            pick_device(name)
    assert pick_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        assert pick_device("auto").type == "cpu"
        with pytest.raises(GolfError, match="CUDA"):
            pick_device("cuda")
