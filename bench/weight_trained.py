"""A real trained model for the weight codec bench: a small GPT on bytes, Muon with weight decay, trained here."""

from __future__ import annotations

import lzma
import os
import time
from pathlib import Path

import numpy as np

Payload = list[tuple[str, np.ndarray, np.ndarray]]  # name, int8 codes, row scales

LAYERS, WIDTH, SEQ_LEN, BATCH = 4, 256, 256, 4096
GRIDS: dict[str, dict[str, object]] = {"R-max": {"clip": "rowmax"}, "R-k": {"clip": "sdclip", "clip_value": 12.85}}


def training_bytes(limit: int = 12_000_000) -> tuple[np.ndarray, str]:
    """(uint8 text, where it is from): web text of PARAMGOLF_SHARED where present, else the built-in corpus."""
    shared = os.environ.get("PARAMGOLF_SHARED", "")
    path = Path(shared) / "data" / "webtext_train_00.txt.xz"
    if shared and path.is_file():
        with lzma.open(path) as file:
            return np.frombuffer(file.read(limit), np.uint8), "web text of PARAMGOLF_SHARED"
    from paramgolf.data import builtin

    text = b"\n".join(bytes(d.data) for d in builtin.documents())[:limit]
    return np.frombuffer(text, np.uint8), f"built-in corpus {builtin.version()}"


def train(steps: int) -> tuple[dict[str, np.ndarray], str]:
    """(float32 matrices by name, one line saying how they were made)."""
    import torch

    from paramgolf.dist import Dist
    from paramgolf.model.gpt import GPT
    from paramgolf.model.names import is_control
    from paramgolf.optim.groups import build_optimizers
    from paramgolf.recipe.sections import ModelSection, OptimSection

    torch.manual_seed(1)
    text, source = training_bytes()
    model = GPT(
        ModelSection(dim=WIDTH, num_layers=LAYERS, num_heads=4, num_kv_heads=2, mlp_hidden=4 * WIDTH), vocab_size=256
    )
    model.init_weights(1)
    optimizers = build_optimizers(model, OptimSection(matrix_lr=0.04, weight_decay=0.1, ns_dtype="float32"), Dist())
    rng = np.random.default_rng(1)
    began, loss = time.perf_counter(), torch.zeros(())
    for step in range(steps):
        at = rng.integers(0, len(text) - SEQ_LEN - 1, BATCH // SEQ_LEN)
        rows = np.stack([text[a : a + SEQ_LEN + 1] for a in at]).astype(np.int64)
        loss = model(torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy()))
        optimizers.zero_grad()
        loss.backward()
        optimizers.step(min(1.0, 2.0 * (1 - step / steps)), 0.95)
    note = (
        f"{LAYERS} layers x {WIDTH}, {steps} steps of {BATCH} bytes of the {source}, last loss {loss.item():.3f}, "
        f"{time.perf_counter() - began:.0f} s"
    )
    stored = {n: p for n, p in model.named_parameters() if p.ndim == 2 and not is_control(n)}
    return {n: p.detach().numpy().copy() for n, p in stored.items()}, note


def trained(steps: int, kept: Path | None) -> tuple[dict[str, np.ndarray], str]:
    """`train`, or what an earlier run left in the file `kept`."""
    if kept is not None and kept.is_file():
        with np.load(kept) as file:
            return {n: file[n] for n in file.files if n != "note"}, str(file["note"])
    weights, note = train(steps)
    if kept is not None:
        np.savez(kept, note=np.array(note), **weights)  # type: ignore[arg-type]
    return weights, note


def quantised(weights: dict[str, np.ndarray], grid: dict[str, object]) -> Payload:
    """The matrices on a 6-bit grid."""
    import torch

    from paramgolf.quant.grid import Grid
    from paramgolf.recipe.sections import GridSection

    made = Grid(GridSection(bits=6, **grid))  # type: ignore[arg-type]
    out = []
    for name, weight in weights.items():
        codes, scale = made.quantize(torch.from_numpy(weight))
        out.append((name, codes.numpy(), scale.numpy()))
    return out


def scale_bytes(weights: dict[str, np.ndarray], grid: dict[str, object]) -> dict[str, dict[str, float]]:
    """Coded bytes of the row scales by how many mantissa bits they keep, and the squared error against all ten."""
    import torch

    from paramgolf.pack.side import encode_arrays
    from paramgolf.quant.grid import Grid
    from paramgolf.recipe.sections import GridSection

    out: dict[str, dict[str, float]] = {}
    whole = 0.0
    for bits in (10, 6, 5, 4, 3):
        made = Grid(GridSection(bits=6, scale_bits=bits, **grid))  # type: ignore[arg-type]
        scales, error = [], 0.0
        for weight in map(torch.from_numpy, weights.values()):
            codes, scale = made.quantize(weight)
            scales.append(scale.numpy())
            error += float((made.dequantize(codes, scale) - weight).square().sum())
        whole = whole or error
        out[str(bits)] = {"bytes": len(encode_arrays(scales)), "error": round(error / whole, 5)}
    return out
