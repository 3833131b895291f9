"""Packing at full size: `python -m bench.full_pack --json results/full_pack.json`.

The weights of `--recipe` (22 million parameters) at trained scale, in a run folder as training would leave it: GPTQ on
100,000 calibration tokens of the built-in corpus, the solver, coding, and the check. Prints the seconds of each phase
and the peak memory. The weights are drawn, not trained (`--run FOLDER` takes a trained run): the time does not depend
on what they predict, the losses say nothing.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch

from paramgolf.data.cache import cache_root
from paramgolf.data.dataset import prepare
from paramgolf.files import atomic_write
from paramgolf.model.gpt import GPT
from paramgolf.model.names import is_control
from paramgolf.recipe.load import load_recipe, to_toml
from paramgolf.recipe.sections import Recipe
from paramgolf.runner.environment import environment
from paramgolf.runner.folder import RunFolder
from paramgolf.runner.repack import repack
from paramgolf.train.checkpoint import Snapshot, Store

LIMIT_SECONDS = 600.0
CALIBRATION = 100_000


def drawn(recipe: Recipe, vocab_size: int) -> dict[str, torch.Tensor]:
    """A state dict with Gaussian matrices at the scale of a fresh model, so that activations stay finite."""
    model = GPT(recipe.model, vocab_size)
    model.init_weights(1)
    draw = torch.Generator().manual_seed(1)
    return {
        name: t if is_control(name) or t.ndim < 2 else torch.randn(t.shape, generator=draw) * t.shape[-1] ** -0.5
        for name, t in model.state_dict().items()
    }


def made_run(recipe: Recipe, root: Path) -> Path:
    """A run folder with a checkpoint of drawn weights."""
    dataset = prepare(recipe.data, cache=cache_root())
    root.mkdir()
    atomic_write(root / "recipe.toml", to_toml(recipe).encode())
    RunFolder(root).same_data(dataset.passport)
    weights = drawn(recipe, dataset.tokenizer.vocab_size)
    (root / "checkpoints").mkdir()
    tensors = {f"model/{name}": tensor for name, tensor in weights.items()}
    Store(root / "checkpoints").save(Snapshot(1, tensors, {"finished": True}))
    return root


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.full_pack", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("results/full_pack.json"))
    parser.add_argument("--recipe", default="pr114")
    parser.add_argument("--run", type=Path, help="a trained run instead of drawn weights")
    parser.add_argument("--bytes", type=int, default=16_000_000)
    parser.add_argument("--override", action="append", default=[], help="of the recipe, e.g. model.dim=128")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = options.run or made_run(load_recipe(options.recipe, options.override), Path(folder, "run"))
        begun = time.perf_counter()
        words = [f"quant.calibration_tokens={CALIBRATION}", "pack.codec=rans", "pack.count=file"]
        result = repack(run, cap=options.bytes, out=Path(folder, "packed.golf"), overrides=words, say=print)
        total = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    del result["artifact"], result["run"]  # in a scratch folder
    result |= {
        "total_seconds": total, "limit_seconds": LIMIT_SECONDS, "peak_memory_bytes": peak,
        "calibration_tokens": CALIBRATION, "machine": environment(),
    }  # fmt: skip
    atomic_write(options.json, json.dumps(result, indent=1).encode() + b"\n")
    weights = sum(group["weights"] for group in result["groups"].values())
    print(f"{weights:,} weights on grids, {result['total_bytes']:,} bytes of {options.bytes:,}")
    for name, seconds in result["seconds"].items():
        print(f"{name:12} {seconds:8.1f} s")
    print(f"{'in all':12} {total:8.1f} s of {LIMIT_SECONDS:.0f}; peak memory {peak / 2**20:,.0f} MiB; "
          f"{result['encodes']} encodes, {torch.get_num_threads()} threads")  # fmt: skip


if __name__ == "__main__":
    main()
