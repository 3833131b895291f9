"""Steps of the later records' whole training: loader, loop switch, schedules, clipping, all optimizers, EMA."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paramgolf.data.loader import Loader, TokenStream
from paramgolf.data.orders import Packed, Place
from paramgolf.dist import Dist
from paramgolf.model.gpt import GPT
from paramgolf.optim import schedule
from paramgolf.optim.averaging import EMA
from paramgolf.optim.groups import OptimizerSet, build_optimizers
from paramgolf.recipe.sections import ScheduleSection
from paramgolf.train.budget import Position, Window
from tests.parity.frontier_d_fullsize import THEIR_GROUPS, optim_of
from tests.parity.frontier_models import BANKS, build, config_of, our_arrays, their_arrays
from tests.parity.harness import Check, exact, worst

LOSS, RELATIVE, PARAMETER, AVERAGE, SMALL = 1e-3, 1e-3, 2e-3, 5e-4, 1e-5
LEAST_WAY = 1e-3  # of the weights: of a shorter way float32 keeps fewer than three digits


def check(path: Path, z: Any) -> list[Check]:
    with np.load(path.parent / str(z["weights_file"]), allow_pickle=False) as weights:
        config = config_of(weights)
        hyper = config | json.loads(str(z["hyper_json"]))
        packed = config["system"] == "pr1855"
        model = build(weights, packed=packed, train_seq_len=hyper["train_seq_len"]).train()
    if model.context_len:
        model.context_len = micro_tokens(hyper)
    optimizers = build_optimizers(model, optim_of(hyper), Dist())
    optimizers.adams["head"].weight_decay = 0.0  # plain Adam there
    start, average = tensors(model, z, config), EMA(model, hyper["ema_decay"])
    batches = (packed_batches if packed else shuffled_batches)(z, hyper)
    checks = check_groups(z, config, optimizers) + train(model, optimizers, average, batches, z, hyper)
    final = tensors(model, z, config)
    average.apply(model)
    for kind, found, allowed in (("final", final, PARAMETER), ("ema", tensors(model, z, config), AVERAGE)):
        checks += check_weights(kind, found, start, z, allowed)
    return checks


def micro_tokens(hyper: dict[str, Any]) -> int:
    return hyper["train_batch_tokens"] // hyper["grad_accum_steps"]


def shards_of(z: Any) -> list[np.ndarray]:
    return [z[name] for name in sorted((n for n in z.files if n.startswith("shard")), key=lambda n: int(n[5:]))]


def packed_batches(z: Any, hyper: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The micro-batches of the document packing loader on one rank: one row each."""
    shards, length = shards_of(z), micro_tokens(hyper)
    stream, order, place = TokenStream(shards), Packed(shards, length, 1, None), Place(length, length)
    while True:
        rows, place = order.take(place)
        tokens = torch.from_numpy(stream.read(int(rows[0]), length + 1).astype(np.int64))
        yield tokens[None, :-1], tokens[None, 1:]


def shuffled_batches(z: Any, hyper: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The micro-batches of the loader with shuffled windows on rank 0 of one."""
    seq_len = hyper["train_seq_len"]
    batch_tokens = micro_tokens(hyper) // seq_len * seq_len
    loader = Loader(shards_of(z), seq_len=seq_len, order="shuffled_shards", seed=0, batch_tokens=batch_tokens)
    try:
        while True:
            yield loader.next_batch()
    finally:
        loader.close()


def check_groups(z: Any, config: dict[str, Any], optimizers: OptimizerSet) -> list[Check]:
    """Every parameter is trained by the optimizer that trains it there."""
    wrong = 0
    for name, group in zip(z["opt_param"].tolist(), z["opt_group"].tolist(), strict=True):
        wrong += any(THEIR_GROUPS[optimizers.group_of(n)] != group for n in our_names(name, config))
    return [Check("optimizer groups", float(wrong), 0.0)]


def our_names(name: str, config: dict[str, Any]) -> list[str]:
    return list(our_arrays({name: [None] * 2 * config["num_layers"]}, config))


def train(
    model: GPT, optimizers: OptimizerSet, average: EMA, batches: Iterator[tuple[Tensor, Tensor]], z: Any,
    hyper: dict[str, Any],
) -> list[Check]:  # fmt: skip
    section = ScheduleSection(
        warmdown_frac=hyper["warmdown_frac"], warmdown_iters=0, min_lr=hyper["min_lr"],
        momentum_warmup_start=hyper["muon_momentum_warmup_start"],
        momentum_warmup_steps=hyper["muon_momentum_warmup_steps"], loop_at=(hyper["enable_looping_at"],),
    )  # fmt: skip
    window, count = Window(seconds=float(z["effective_ms"])), hyper["grad_accum_steps"]  # in milliseconds
    state, extra, named = model.state_dict(), model.section.loop_extra, dict(model.named_parameters())
    # What no optimizer of the script has, or never gets a gradient, stays; the gradients of the first add up.
    names = [n for name in z["params_in_no_optimizer"].tolist() if name for n in our_names(name, hyper)]
    unreached = [name for name in named if name.startswith("lanes.") and model.section.lanes_from < 0]
    fixed = {name: named[name].detach().clone() for name in [*names, *unreached]}
    losses, first, norms, rates, momenta, loops = [], [], [], [], [], []
    for step, milliseconds in enumerate(z["elapsed_ms"].tolist()):
        at = Position(step, elapsed=milliseconds)
        model.set_loops(schedule.loop_passes(section, extra, window.fraction(at)))
        loops.append(len(model.order.layers) > len(model.blocks))
        added_up = {name: named[name].grad for name in names}
        optimizers.zero_grad()
        for name, grad in added_up.items():
            named[name].grad = grad
        for x, y in (next(batches) for _ in range(count)):
            loss = model(x, y)
            (loss / count).backward()
            losses.append(loss.item())
            first.append(int(x[0, 0]))
        mul = schedule.lr_mul(section, step=step, elapsed=at.elapsed, budget_seconds=window.seconds)
        momenta.append(schedule.momentum(section, hyper["muon_momentum"], step=step))
        rates.append([optimizers.base_lr(group) * mul for group in ("embed", "matrix", "scalar")])
        norms.append(float(optimizers.clip(hyper["grad_clip_norm"])))
        optimizers.step(mul, momenta[-1])
        with torch.no_grad():
            for name, value in fixed.items():
                state[name].copy_(value)
        average.update(model, step, mul)
    theirs = z["grad_norm_before_clip"]
    return [
        exact("first tokens", np.reshape(first, z["first_token"].shape), z["first_token"]),
        exact("loop", loops, z["loop_active"]),
        worst("rates", rates, z["lr_tok_muon_scalar"], 1e-9),
        worst("momentum", momenta, z["momentum"], 1e-9),
        worst("micro loss", np.reshape(losses, z["micro_loss"].shape), z["micro_loss"], LOSS),
        worst("loss", np.reshape(losses, z["micro_loss"].shape).mean(1), z["loss"], LOSS),
        worst("gradient norm", np.array(norms) / theirs, np.ones_like(theirs), RELATIVE),
    ]


def tensors(model: GPT, z: Any, config: dict[str, Any]) -> dict[str, np.ndarray]:
    names = [str(name) for name in z["param_names"]]
    found = their_arrays(model.state_dict(), names, config)
    return {name: value.astype(np.float64) for name, value in found.items()}


def check_weights(
    kind: str, found: dict[str, np.ndarray], start: dict[str, np.ndarray], z: Any, allowed: float
) -> list[Check]:
    names = [str(name) for name in z["param_names"]]
    norms = np.array([np.linalg.norm(found[n]) for n in names])
    moved = np.array([np.linalg.norm(found[n] - start[n]) for n in names])
    least = SMALL + LEAST_WAY * np.array([np.linalg.norm(start[n]) for n in names])
    checks = [
        worst(f"{kind} {what}", ours / (z[key] + small), z[key] / (z[key] + small), RELATIVE)
        for what, ours, key, small in (
            ("norms", norms, f"{kind}_l2", SMALL),
            ("ways", moved, f"{kind}_delta_l2", least),
        )
    ]
    for key in (k for k in z.files if k.startswith(f"{kind}/")):
        name, stored = key.removeprefix(f"{kind}/"), z[key]
        ours = found[name][:, 1] if name in BANKS else found[name]
        ours = ours.reshape(stored.shape) if ours.size == stored.size else ours[: stored.shape[0]]
        checks.append(worst(key, ours, stored, allowed))
    return checks
