"""The parts of a training run made from a recipe and its tokens, and its final model."""

from __future__ import annotations

import numpy as np
import torch

from paramgolf.data.loader import Loader
from paramgolf.dist import Dist
from paramgolf.model.gpt import GPT
from paramgolf.optim.averaging import build_average
from paramgolf.optim.groups import build_optimizers
from paramgolf.recipe.sections import Recipe, trained_seq_len
from paramgolf.train import runtime
from paramgolf.train.budget import shape_at
from paramgolf.train.callbacks import Callback
from paramgolf.train.checkpoint import Store
from paramgolf.train.clock import Clock
from paramgolf.train.finish import HELD_OUT_FRACTION, HELD_OUT_TOKENS
from paramgolf.train.loop import Parts
from paramgolf.train.modes import ModeSwitch
from paramgolf.train.signals import Interrupts
from paramgolf.train.step import Stepper


def assemble(
    recipe: Recipe,
    tokens: list[np.ndarray],
    vocab_size: int,
    dtype: torch.dtype,
    clock: Clock,
    dist: Dist,
    callback: Callback,
    interrupts: Interrupts,
    store: Store | None = None,
) -> tuple[Parts, np.ndarray | None]:
    """Everything the step loop works with, at its start, and the tokens held out to choose an average by.

    Args:
        tokens: the training shards, uint16.
        dtype: the type of activations.
        store: of checkpoints; None = the run writes none.
    """
    section = recipe.train
    model = GPT(recipe.model, vocab_size)
    model.init_weights(section.seed)
    model.to(dist.device)
    model.compute_dtype = dtype
    model.use_attention(section.attention, dist.device)
    held_out = None
    if recipe.average.kind != "none" and recipe.average.select == "train":
        tokens, held_out = hold_out(tokens, section.seq_len)
    first = shape_at(recipe, 0.0)
    loader = Loader(
        tokens, seq_len=first.seq_len, batch_tokens=first.batch_tokens, rank=dist.rank, world=dist.world,
        seed=section.seed, order=recipe.data.order, vocab_size=vocab_size,
    )  # fmt: skip
    micro_tokens = runtime.micro_tokens(section, recipe.model, dist.device)
    stepper = Stepper(model, dist, micro_tokens, packed=recipe.data.order == "packed")
    opts = build_optimizers(model, recipe.optim, dist)
    if recipe.optim.exchange == "reduce_scatter" and dist.world > 1:
        stepper.scatter_to(opts.matrix)
        opts.scattered = True
    average = build_average(recipe.average, model)
    modes = ModeSwitch(model, recipe)
    parts = Parts(recipe, model, opts, loader, stepper, modes, average, dist, clock, callback, store, interrupts)
    return parts, held_out


def hold_out(tokens: list[np.ndarray], seq_len: int) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Split the end of the training stream off; (all of it, None) where the text is too short to spare any."""
    size = min(HELD_OUT_TOKENS, int(sum(map(len, tokens)) * HELD_OUT_FRACTION))
    last = tokens[-1]
    if size <= seq_len or len(last) - size <= seq_len:
        return tokens, None
    return [*tokens[:-1], last[:-size]], np.asarray(last[-size:])


def final_model(trained: GPT, recipe: Recipe, vocab_size: int, device: torch.device) -> GPT:
    """The trained weights in a model of their own: nothing compiled, no fake quantisation, evaluation mode."""
    model = GPT(recipe.model, vocab_size).to(device)
    model.load_state_dict(trained.state_dict())
    model.compute_dtype = trained.compute_dtype
    model.context_len = trained_seq_len(recipe)  # as load_model: scored in windows of any length
    model.use_attention(recipe.train.attention, device)
    return model.eval()
