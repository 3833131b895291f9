"""What follows the main loop: the averaged weights (kept only if better, where asked), and post-training QAT."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from paramgolf.dist import Dist
from paramgolf.model.gpt import GPT
from paramgolf.optim.adam import Adam
from paramgolf.optim.averaging import restore
from paramgolf.optim.groups import named_parameters
from paramgolf.recipe.sections import Recipe, trained_seq_len
from paramgolf.train.budget import Position, StepTimer, post_window
from paramgolf.train.callbacks import StepInfo
from paramgolf.train.loop import Trainer, diverged
from paramgolf.train.qat import ADAM_BETAS, GridPoint, weight_grids
from paramgolf.train.signals import Interrupted, name

HELD_OUT_FRACTION = 0.01
HELD_OUT_TOKENS = 65_536
SELECTION_FRACTION = 0.02  # of a time budget, for scoring raw and averaged weights
FORWARD_SPEED = 2.5  # tokens a second of a forward pass alone, against those of training


def finish(trainer: Trainer, held_out: np.ndarray | None, reserve_seconds: float) -> None:
    """Bring the model to its final weights and write the last checkpoint.

    Args:
        held_out: tokens of the training text that training did not see; None = keep the average unseen.
        reserve_seconds: of the budget, for what comes after training.
    """
    parts = trainer.parts
    parts.model.set_loops(parts.recipe.model.loop_extra)  # as it is scored, however short the run was
    if not trainer.finished:
        if parts.recipe.quant.post_qat:
            trainer.save()  # the phase may be long: a killed run starts it again, not training
        with parts.clock.phase("average"):
            _average(trainer, held_out)
        if parts.recipe.quant.post_qat:
            with parts.clock.phase("post_qat"):
                post_train(trainer, reserve_seconds)
        trainer.finished = True
        trainer.save()


def selection_seconds(recipe: Recipe) -> float:
    """What choosing between raw and averaged weights may take of a time budget."""
    chosen = recipe.average.kind != "none" and recipe.average.select == "train"
    return SELECTION_FRACTION * recipe.budget.seconds if chosen else 0.0


def _affordable(trainer: Trainer, held_out: np.ndarray) -> np.ndarray:
    """As much of the held-out tokens as can be scored twice in the time kept for it; all of them if untimed."""
    seconds = selection_seconds(trainer.parts.recipe)
    if not seconds or not trainer.at.elapsed:
        return held_out
    speed = FORWARD_SPEED * trainer.at.tokens / trainer.at.elapsed
    least = 4 * trained_seq_len(trainer.parts.recipe)
    return held_out[: max(least, int(speed * seconds / 2)) + 1]


def _average(trainer: Trainer, held_out: np.ndarray | None) -> None:
    parts, section = trainer.parts, trainer.parts.recipe.average
    if parts.average is None:
        return
    if not parts.average.ready:
        trainer.extra["average"] = {"used": False, "why": "nothing was collected"}
        return
    if section.select == "always" or held_out is None:
        parts.average.apply(parts.model)
        trainer.extra["average"] = {"used": True, "why": "select = always" if held_out is None else ""}
        return
    held_out = _affordable(trainer, held_out)
    rows = trained_seq_len(parts.recipe), parts.stepper.micro_tokens
    raw_loss = held_out_loss(parts.model, held_out, *rows, parts.dist)
    raw = parts.average.apply(parts.model)
    average_loss = held_out_loss(parts.model, held_out, *rows, parts.dist)
    used = average_loss < raw_loss
    if not used:
        restore(parts.model, raw)
    trainer.extra["average"] = {"used": used, "raw_loss": raw_loss, "average_loss": average_loss}
    if parts.dist.is_main:
        verdict = "the average is kept" if used else "the raw weights are kept"
        words = f"held-out training text: raw {raw_loss:.4f}, average {average_loss:.4f} nats per token; {verdict}"
        parts.callback.note(words)


@torch.no_grad()
def held_out_loss(model: GPT, tokens: np.ndarray, seq_len: int, micro_tokens: int, dist: Dist) -> float:
    """Mean nats per token over whole rows of `tokens` (uint16), as training sees the weights (QAT included).

    The rows are dealt over ranks, `micro_tokens` at once; every rank returns the same number.
    """
    seq_len = min(seq_len, len(tokens) - 1)
    rows, most, total = (len(tokens) - 1) // seq_len, max(1, micro_tokens // seq_len), 0.0
    with model.eager():  # shapes that come once are not worth a compilation
        for first in range(dist.rank * most, rows, dist.world * most):
            starts = np.arange(first, min(first + most, rows)) * seq_len
            batch = np.stack([tokens[s : s + seq_len + 1] for s in starts]).astype(np.int64)
            ids = torch.from_numpy(batch).to(dist.device)
            total += float(model(ids[:, :-1], ids[:, 1:].contiguous(), reduction="sum"))
    return dist.all_sum(total) / (rows * seq_len)


def post_train(trainer: Trainer, reserve_seconds: float) -> None:
    """PR 107's phase: a fresh Adam at a constant rate updates all parameters with gradients taken at the grid points.

    The data goes on where training stopped (the reference replayed its first batches).
    """
    parts, section = trainer.parts, trainer.parts.recipe.quant
    parts.stepper.scatter_to(None)
    adam = Adam(named_parameters(parts.model), betas=ADAM_BETAS)
    at_grid = GridPoint(parts.model, weight_grids(parts.model, parts.recipe, section.post_qat))
    main = trainer.at
    window = post_window(parts.recipe, main, trainer.spent(), reserve_seconds + trainer.save_seconds)
    begun = trainer.spent()
    timer, at = StepTimer(), Position()
    timer.add(trainer.timer.mean())
    tokens = trainer.stage.step_tokens
    while not window.stop_reason(at, tokens, timer.estimate()):
        with at_grid():
            parts.stepper.accumulate(parts.loader.next_batch, tokens, bool(parts.interrupts.pending))
        adam.step(section.post_qat_lr)
        report = parts.stepper.report()
        parts.opts.zero_grad()
        number = main.step + at.step + 1
        if not np.isfinite(report.loss):
            raise diverged(number, f"the loss is {report.loss} in post-training QAT", main.step)
        elapsed = trainer.spent() - begun
        timer.add(elapsed - at.elapsed)
        at = Position(at.step + 1, at.tokens + report.tokens, elapsed)
        if parts.dist.is_main:
            info = StepInfo(number, report.loss, 1.0, ADAM_BETAS[0], main.tokens + at.tokens, main.elapsed + elapsed)
            parts.callback.on_step(replace(info, strict=parts.clock.strict()), window.fraction(at), parts.model)
        if report.interrupted:
            signum = int(parts.dist.all_max(parts.interrupts.pending))
            raise Interrupted(
                f"interrupted by {name(signum)} in post-training QAT; --resume starts that phase again", signum
            )
        trainer.loss = report.loss
    trainer.advance(at)
    trainer.extra["post_qat"] = {"steps": at.step, "seconds": at.elapsed, "matrices": at_grid.count}
