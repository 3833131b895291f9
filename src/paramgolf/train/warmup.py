"""Compile and warm up everything training will need, then put everything back as it was.

Works on the first batch of each shape. Afterwards the weights, all optimizer state, every random state and the loader
are what they were, bit for bit: a run with warm-up steps takes the same path as one without.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from paramgolf.optim.groups import OptimizerSet
from paramgolf.train import compiling
from paramgolf.train.budget import Shape
from paramgolf.train.modes import Mode
from paramgolf.train.runtime import restore_rng, rng_state
from paramgolf.train.step import Stepper, TokenSource

Switch = Callable[[Mode], object]


class Saved:
    """A copy of all that a training step changes, taken at construction and put back by `restore`."""

    def __init__(self, model: nn.Module, opts: OptimizerSet) -> None:
        self._model = model
        self._opts = opts
        self._weights = {name: t.detach().clone() for name, t in model.state_dict().items()}
        self._optim: dict[str, Any] = {
            name: value.clone() if isinstance(value, Tensor) else value for name, value in opts.state_dict().items()
        }
        self._rng = rng_state()

    def restore(self) -> None:
        with torch.no_grad():
            for name, tensor in self._model.state_dict().items():
                tensor.copy_(self._weights[name])
        self._opts.load_state_dict(self._optim)
        self._opts.zero_grad()
        restore_rng(*self._rng)


class FirstBatches:
    """The first batch of each shape, read once; the loader is put back at once."""

    def __init__(self, loader: TokenSource) -> None:
        self._loader = loader
        self._kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, shape: Shape) -> tuple[Tensor, Tensor]:
        """(x, y) of this rank for one step of `shape`."""
        key = (shape.seq_len, shape.batch_tokens)
        if key not in self._kept:
            state = self._loader.state_dict()
            self._loader.set_shape(*key)
            self._kept[key] = self._loader.next_batch()
            self._loader.load_state_dict(state)
        return self._kept[key]


def compile_all(
    stepper: Stepper,
    opts: OptimizerSet,
    shapes: list[Shape],
    modes: list[Mode],
    switch: Switch,
    first: FirstBatches,
    stopped: Callable[[], None] = lambda: None,
) -> str:
    """Run every graph once, forward and backward, on this rank only. Returns "" or why compiling failed.

    If it fails on any rank, every rank gets a reason (and should go on uncompiled).
    """
    dist = stepper.dist
    saved = Saved(stepper.model, opts)
    reason = ""
    try:
        for mode in modes:
            switch(mode)
            for shape in shapes:
                stopped()
                x, y = first(shape)
                stepper.enter(shape.seq_len)
                if x.shape[0]:
                    stepper.backward(*_one_of_each(stepper, x, y), expected_tokens=shape.step_tokens)
                    opts.zero_grad()
    except Exception as error:
        if not _is_compile_error(error):
            raise
        reason = compiling.failure_reason(error)
    saved.restore()
    switch(modes[0])
    if dist.all_max(float(bool(reason))):
        reason = reason or "compiling failed on another rank"
    return reason


def _one_of_each(stepper: Stepper, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """As few rows as still give every micro-batch size of the full step (at most two sizes, larger first)."""
    sizes = stepper.sizes(x.shape[0], x.shape[1])
    needed = sum(dict.fromkeys(sizes))
    return x[:needed], y[:needed]


def _is_compile_error(error: BaseException) -> bool:
    """True for what the compiler raises, false for errors of the model itself."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, TorchDynamoException | InductorError):
            return True
        seen = seen.__cause__
    return False


def warm_up(
    stepper: Stepper,
    opts: OptimizerSet,
    shapes: list[Shape],
    modes: list[Mode],
    switch: Switch,
    first: FirstBatches,
    steps: int,
    momentum: float,
    grad_clip: float,
    stopped: Callable[[], None] = lambda: None,
) -> int:
    """Take throw-away steps, at least one for every shape and mode unless `steps` is 0; returns how many.

    A collective: all ranks take the same steps. The model is left in the first of `modes`.
    """
    if steps == 0:
        return 0
    saved = Saved(stepper.model, opts)
    cases = [(shape, mode) for mode in reversed(modes) for shape in reversed(shapes)]
    order = cases + [cases[-1]] * (steps - len(cases))
    for shape, mode in order:
        stopped()
        switch(mode)
        stepper.enter(shape.seq_len)
        stepper.accumulate(partial(first, shape), shape.step_tokens)
        opts.clip(grad_clip)
        opts.step(1.0, momentum)
        stepper.report()
        opts.zero_grad()
    saved.restore()
    switch(modes[0])
    return len(order)
