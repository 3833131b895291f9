"""How long a training step of a recipe takes on this machine: a few steps on made-up tokens, scaled to the batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from paramgolf.dist import Dist
from paramgolf.model.gpt import GPT
from paramgolf.optim.groups import build_optimizers
from paramgolf.recipe.sections import Recipe
from paramgolf.train import compiling, runtime
from paramgolf.train.budget import Shape, all_shapes
from paramgolf.train.modes import ModeSwitch
from paramgolf.train.step import Stepper

MOST_TOKENS = 8192  # of a timed forward and backward; a larger batch is scaled from one of its micro batches
MOST_SECONDS = 4.0  # of timing for each shape, but always one forward and backward
REPEATS = 4


@dataclass(frozen=True)
class StepTiming:
    """`seconds` of one step by (seq_len, batch_tokens)."""

    seconds: dict[tuple[int, int], float]
    compile_seconds: float  # expected, for a run
    how: str


def time_steps(recipe: Recipe, vocab_size: int, dist: Dist) -> StepTiming:
    """Build the model and its optimizers and time them, in the mode in which training ends. Uncompiled on a CPU."""
    chosen = runtime.configure(recipe.train, dist.device)
    model = GPT(recipe.model, vocab_size)
    model.init_weights(recipe.train.seed)
    model.to(dist.device)
    model.compute_dtype = chosen.dtype
    model.use_attention(recipe.train.attention, dist.device)
    shapes = all_shapes(recipe)
    plain = recipe.train.kernels == "plain" or model.use_native(math.gcd(*[shape.seq_len for shape in shapes]))
    modes = ModeSwitch(model, recipe)
    modes.set(modes.states[-1])
    count = sum(p.numel() for p in model.parameters())
    plan = compiling.CompilePlan(False, "")
    if plain:
        plan = compiling.decide(recipe, parameters=count, graphs=len(shapes), device=dist.device.type, spent=0.0)
    compiled = plan.enabled and dist.device.type == "cuda"
    if compiled:
        model.compile_regions()
    stepper = Stepper(model, dist, runtime.micro_tokens(recipe.train, recipe.model, dist.device))
    opts = build_optimizers(model, recipe.optim, dist)
    model.train()
    begun = time.perf_counter()
    seconds = {}
    for shape in shapes:
        a_token = _forward_backward(stepper, shape, vocab_size, dist)
        seconds[shape.seq_len, shape.batch_tokens] = a_token * shape.step_tokens / dist.world
    opts.clip(recipe.optim.grad_clip)
    update = _best(lambda: opts.step(0.0, recipe.optim.momentum), dist)
    opts.zero_grad()
    spent = time.perf_counter() - begun
    kind = "compiled" if compiled else ("uncompiled" if plain else "fused kernels")
    how = f"{spent:.0f} s of steps on made-up tokens, {kind}, {chosen.threads} threads, {dist.device.type}"
    compile_seconds = compiling.cost_seconds(len(shapes), dist.device.type, plan.cache) if plan.enabled else 0.0
    return StepTiming({key: value + update for key, value in seconds.items()}, compile_seconds, how)


def _forward_backward(stepper: Stepper, shape: Shape, vocab_size: int, dist: Dist) -> float:
    """Seconds a token of this rank."""
    rows = max(1, shape.step_tokens // shape.seq_len // dist.world)
    micro = stepper.sizes(rows, shape.seq_len)
    whole = rows * shape.seq_len <= MOST_TOKENS
    timed = rows if whole else min(micro[0], max(1, MOST_TOKENS // shape.seq_len))
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(vocab_size, (timed, shape.seq_len), generator=draw)
    y = torch.randint(vocab_size, (timed, shape.seq_len), generator=draw)
    return _best(lambda: stepper.backward(x, y, x.numel()), dist) / x.numel()


def _best(work: Callable[[], object], dist: Dist) -> float:
    """The least seconds of a few repetitions after one to warm up; a single long one counts itself."""
    least = math.inf
    begun = time.perf_counter()
    for repeat in range(REPEATS + 1):
        start = time.perf_counter()
        work()
        if dist.device.type == "cuda":
            torch.cuda.synchronize(dist.device)
        seconds = time.perf_counter() - start
        late = time.perf_counter() - begun > MOST_SECONDS
        if repeat or late:
            least = min(least, seconds)
        if late:
            break
    return least
