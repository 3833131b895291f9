"""Training where every step has one shape and the model one mode: train/loop.py, step.py and finish.py without stages,
checkpoints and interrupts."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from paramgolf.dist import Dist
from paramgolf.model.gpt import GPT
from paramgolf.optim.adam import Adam
from paramgolf.optim.averaging import build_average, restore
from paramgolf.optim.groups import build_optimizers, named_parameters
from paramgolf.optim.newton_schulz import fast_dtype
from paramgolf.optim.schedule import decay_mul, lr_mul, momentum
from paramgolf.quant.grid import Grid
from paramgolf.recipe.sections import Recipe
from paramgolf.script.entry import Log, reserve_seconds
from paramgolf.script.plain.data import SequentialRows
from paramgolf.script.plain.pack import weight_grids
from paramgolf.script.plain.process import Stopwatch, default_threads
from paramgolf.train.assemble import final_model, hold_out
from paramgolf.train.budget import LEAST_SECONDS, Position, StepTimer, Window, post_window
from paramgolf.train.finish import FORWARD_SPEED, held_out_loss, selection_seconds
from paramgolf.train.qat import ADAM_BETAS, GridPoint
from paramgolf.train.runtime import micro_tokens, seed_all
from paramgolf.train.step import micro_sizes

TAIL = 4  # numbers after the gradients in the exchanged buffer: the package sends so many


def train_model(
    recipe: Recipe, shards: list[np.ndarray], vocab_size: int, dist: Dist, clock: Stopwatch, log: Log
) -> tuple[GPT, str]:
    """The trained weights in a model of their own, in evaluation mode, and the name of the activations' type."""
    section = recipe.train
    held_out = None
    torch.set_num_threads(section.threads or default_threads())
    seed_all(section.seed)
    if dist.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    dtype = activation_dtype(section.dtype, dist.device)
    if recipe.average.kind != "none" and recipe.average.select == "train":
        shards, held_out = hold_out(shards, section.seq_len)
    trainer = Trainer(recipe, shards, vocab_size, dtype, dist, clock, log)
    if section.compile == "on" or (section.compile == "auto" and dist.device.type == "cuda"):
        trainer.model.compile_regions()
        trainer.warm_up()  # and again from the start: the compiled code stays
        seed_all(section.seed)
        trainer = Trainer(recipe, shards, vocab_size, dtype, dist, clock, log)
        trainer.model.compile_regions()
    log.note(f"model_params:{sum(p.numel() for p in trainer.model.parameters())}")
    trainer.run()
    if trainer.average is not None:
        trainer.settle(held_out)
    if recipe.quant.post_qat:
        trainer.post_train()
    return final_model(trainer.model, recipe, vocab_size, dist.device), str(dtype).removeprefix("torch.")


def activation_dtype(choice: str, device: torch.device) -> torch.dtype:
    """bfloat16 where matrix products in it are faster, unless the recipe names a type."""
    if choice != "auto":
        return torch.bfloat16 if choice == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    return fast_dtype(device)


class Trainer:
    """Everything a run works with at its start, and where it stands."""

    def __init__(
        self, recipe: Recipe, shards: list[np.ndarray], vocab_size: int, dtype: torch.dtype, dist: Dist,
        clock: Stopwatch, log: Log,
    ) -> None:  # fmt: skip
        section = recipe.train
        self.recipe, self.dist, self.clock, self.log = recipe, dist, clock, log
        self.model = GPT(recipe.model, vocab_size)
        self.model.init_weights(section.seed)
        self.model.to(dist.device)
        self.model.compute_dtype = dtype
        self.model.use_attention(section.attention, dist.device)
        self.model.train()
        self.rows = SequentialRows(shards, section.seq_len, section.batch_tokens, dist.rank, dist.world)
        self.tokens = section.batch_tokens // section.seq_len * section.seq_len  # of a step, over all ranks
        self.micro_rows = micro_tokens(section, recipe.model, dist.device) // section.seq_len
        self.params = list(self.model.parameters())
        self.opts = build_optimizers(self.model, recipe.optim, dist)
        self.average = build_average(recipe.average, self.model)
        if recipe.quant.qat == "export":
            self.model.set_qat(weight_grids(self.model, recipe, recipe.quant.qat))
        elif recipe.quant.qat:  # one grid for every linear weight, whatever its export
            self.model.set_qat(Grid(recipe.quant.grids[recipe.quant.qat]))
        self.at, self.timer = Position(), StepTimer()

    # -- one step ----------------------------------------------------------------------------------------------

    def gradients(self) -> Tensor:
        """Forward and backward of the next batch over all ranks; the summed loss in nats, 0-d on the device."""
        x, y = (ids.to(self.dist.device) for ids in self.rows.next_batch())
        total, start = torch.zeros((), device=self.dist.device), 0
        for size in micro_sizes(len(x), self.micro_rows):
            rows, start = slice(start, start + size), start + size
            loss, tokens = self.model(x[rows], y[rows]), size * x.shape[1]
            (loss if tokens == self.tokens else loss * (tokens / self.tokens)).backward()
            total += loss.detach().float() * tokens
        return self.exchanged(total) if self.dist.world > 1 else total

    def exchanged(self, total: Tensor) -> Tensor:
        """Gradients and loss summed over the ranks in one buffer; the summed loss."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        flat = torch.cat([grad.reshape(-1) for grad in grads] + [total.expand(TAIL)])
        self.dist.all_reduce_sum(flat)
        *parts, tail = flat.split([p.numel() for p in self.params] + [TAIL])
        for parameter, part in zip(self.params, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        return tail[0]

    def update(self, lr: float, mu: float, decay: float) -> None:
        """Every optimizer's step with these factors on learning rates and weight decay, at this momentum."""
        if self.recipe.optim.grad_clip:
            self.opts.clip(self.recipe.optim.grad_clip)
        self.opts.step(lr, mu, decay)

    def loss_of(self, total: Tensor, step: int) -> float:
        """Nats a token, and no gradients any more."""
        loss = float(total) / self.tokens
        self.opts.zero_grad()
        if not math.isfinite(loss):
            raise FloatingPointError(f"training diverged at step {step}: the loss is {loss}; lower the learning rates")
        return loss

    def warm_up(self) -> None:
        """Throw-away steps, so that nothing is compiled later."""
        for _ in range(max(1, self.recipe.schedule.warmup_steps)):
            total = self.gradients()
            self.update(1.0, self.recipe.optim.momentum, 1.0)
            self.loss_of(total, 0)

    # -- the run -----------------------------------------------------------------------------------------------

    def spent(self) -> float:
        """Seconds of the budget's clock, the slowest rank's."""
        return self.dist.all_max(self.clock.spent(self.recipe.budget.clock))

    def run(self) -> None:
        """Train until the budget's window is used up."""
        self.clock.start_challenge()
        begun = self.spent()
        window = self.window(begun)
        while not (reason := window.stop_reason(self.at, self.tokens, self.timer.estimate())):
            self.step(window)
            elapsed = self.spent() - begun
            self.timer.add(elapsed - self.at.elapsed)
            self.at = Position(self.at.step + 1, self.at.tokens + self.tokens, elapsed)
            self.log.took(self.at.step, self.loss, elapsed)
        self.log.note(f"stopping: {reason} {self.log.times()} step:{self.at.step}")

    def window(self, spent: float) -> Window:
        """What of the budget is for the main loop (see train/budget.py), with so many seconds of it used before."""
        budget = self.recipe.budget
        quant = self.recipe.quant
        post = quant.post_qat_frac
        used = spent + reserve_seconds(self.recipe, self.model) if budget.count_packing else spent
        seconds = budget.seconds * (1.0 - post) - used if quant.post_qat else budget.seconds - used
        steps = budget.steps - max(1, round(post * budget.steps)) if quant.post_qat else budget.steps
        tokens = budget.tokens - max(1, round(post * budget.tokens)) if quant.post_qat else budget.tokens
        return Window(
            max(LEAST_SECONDS, seconds) if budget.seconds else 0.0,
            max(1, steps) if budget.steps else 0,
            max(1, tokens) if budget.tokens else 0,
        )

    def step(self, window: Window) -> None:
        at, recipe = self.at, self.recipe
        lr = lr_mul(
            recipe.schedule, step=at.step, elapsed=at.elapsed, budget_seconds=window.seconds, budget_steps=window.steps,
            tokens=at.tokens, budget_tokens=window.tokens,
        )  # fmt: skip
        mu = momentum(
            recipe.schedule, recipe.optim.momentum, step=at.step, elapsed=at.elapsed, budget_seconds=window.seconds
        )
        tapered = recipe.schedule.decay_taper_to != 1.0
        decay = decay_mul(recipe.schedule, window.fraction(at)) if tapered else 1.0
        total = self.gradients()
        self.update(lr, mu, decay)
        self.loss = self.loss_of(total, at.step + 1)
        if self.average is not None:
            self.average.update(self.model, at.step, lr)

    # -- after the main loop -----------------------------------------------------------------------------------

    def settle(self, held_out: np.ndarray | None) -> None:
        """The averaged weights; with held-out tokens of the training text only where they are better there."""
        if self.average is None or not self.average.ready:
            return
        if held_out is None:
            self.average.apply(self.model)
            return
        seconds, seq_len = selection_seconds(self.recipe), self.recipe.train.seq_len
        if seconds:  # as much as can be scored twice in the time that is kept for it
            speed = FORWARD_SPEED * self.at.tokens / self.at.elapsed
            held_out = held_out[: max(4 * seq_len, int(speed * seconds / 2)) + 1]
        rows = seq_len, self.micro_rows * seq_len
        raw_loss = held_out_loss(self.model, held_out, *rows, self.dist)
        raw = self.average.apply(self.model)
        average_loss = held_out_loss(self.model, held_out, *rows, self.dist)
        better = average_loss < raw_loss
        if not better:
            restore(self.model, raw)
        verdict = "the average is kept" if better else "the raw weights are kept"
        words = f"raw {raw_loss:.4f}, average {average_loss:.4f} nats per token; {verdict}"
        self.log.note(f"held-out training text: {words}")

    def post_train(self) -> None:
        """PR 107's phase: Adam at a constant rate, with gradients taken at the weights that the file will hold."""
        recipe, main, begun, at, timer = self.recipe, self.at, self.spent(), Position(), StepTimer()
        adam = Adam(named_parameters(self.model), betas=ADAM_BETAS)
        at_grid = GridPoint(self.model, weight_grids(self.model, recipe, recipe.quant.post_qat))
        reserve = reserve_seconds(recipe, self.model) if recipe.budget.count_packing else 0.0
        window = post_window(recipe, main, begun, reserve)
        timer.add(self.timer.mean())
        while not window.stop_reason(at, self.tokens, timer.estimate()):
            with at_grid():
                total = self.gradients()
            adam.step(recipe.quant.post_qat_lr)
            loss = self.loss_of(total, main.step + at.step + 1)
            elapsed = self.spent() - begun
            timer.add(elapsed - at.elapsed)
            at = Position(at.step + 1, at.tokens + self.tokens, elapsed)
            self.log.took(main.step + at.step, loss, main.elapsed + elapsed)
