"""The training script of a submission under the official layout: environment in, log lines and one artifact out.

    DATA_PATH=... TOKENIZER_PATH=... SEED=1337 torchrun --standalone --nproc_per_node=8 train_gpt.py

This is where `generate` starts collecting the package. `main` does what a run does from its data to its score, in the
same order, without a run folder: no checkpoints, no resume, no report. Its steps stand here in the form that serves
every recipe, by the package's own pieces; `facts` takes the plain forms of script/plain for recipes that they fit.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from paramgolf.data.official import shard_files
from paramgolf.data.shards import open_shard
from paramgolf.data.tokenizer import Tokenizer
from paramgolf.dist import Dist, init
from paramgolf.model.gpt import GPT
from paramgolf.pack.container import Artifact, decode_known, encode_artifact
from paramgolf.pack.packer import manifest_of
from paramgolf.quant.export import export, restore
from paramgolf.quant.hessian import collect
from paramgolf.quant.plan import tensor_table
from paramgolf.quant.registry import calibrated
from paramgolf.recipe.sections import Recipe, trained_seq_len
from paramgolf.score.scorer import Score, score
from paramgolf.script.plain.process import Stopwatch
from paramgolf.train import runtime
from paramgolf.train.assemble import assemble, final_model
from paramgolf.train.budget import all_shapes, training_window
from paramgolf.train.callbacks import Callback, StepInfo
from paramgolf.train.finish import finish, selection_seconds
from paramgolf.train.loop import Parts, Trainer
from paramgolf.train.signals import Interrupts

ARTIFACT = Path("final_model.golf")
PACK_SECONDS = 8.0  # a million weights, where the budget must also hold quantising and coding


def main(recipe: Recipe) -> None:
    """Train, pack, read back and score; every rank of a torchrun calls it."""
    seed = int(os.environ.get("SEED", recipe.train.seed))
    recipe = replace(recipe, train=replace(recipe.train, seed=seed))
    clock, dist = Stopwatch(), init(recipe.train.device)
    log = Log(dist, recipe)
    begun = time.monotonic()
    tokenizer = Tokenizer.load(os.environ.get("TOKENIZER_PATH", "./data/tokenizers/fineweb_1024_bpe.model"))
    train, val = shard_files(Path(os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")))
    shards: list[np.ndarray] = [open_shard(path) for path in train]
    tokens = np.concatenate([open_shard(path, tokenizer.vocab_size) for path in val])
    clock.zero += time.monotonic() - begun  # reading is outside the budget
    log.note(f"seed:{seed} world_size:{dist.world} train_shards:{len(train)} val_tokens:{len(tokens) - 1}")
    model, dtype = train_model(recipe, shards, tokenizer.vocab_size, dist, clock, log)
    floats = measure(model, tokens, tokenizer, recipe, dist, stride=0)
    log.note(f"step:{log.step}/{log.step} val_loss:{floats.val_loss:.4f} val_bpb:{floats.val_bpb:.4f} {log.times()}")
    size = pack(model, shards, recipe, tokenizer, dtype, dist, ARTIFACT)
    log.sizes(model, size, recipe.pack.codec)
    dist.barrier()
    decoded = unpack(ARTIFACT, recipe, tokenizer.vocab_size).to(dist.device).eval()
    decoded.compute_dtype, decoded.context_len = model.compute_dtype, trained_seq_len(recipe)
    for stride in dict.fromkeys((0, recipe.score.stride)):
        log.round_trip(measure(decoded, tokens, tokenizer, recipe, dist, stride=stride), recipe.pack.codec)
    dist.close()


class Log:
    """The lines of the official log, on the main rank: on standard output and, with the source above, in a file."""

    def __init__(self, dist: Dist, recipe: Recipe) -> None:
        self.on, self.every, self.steps = dist.is_main, recipe.train.log_every, recipe.budget.steps
        self.source = Path(__file__).read_bytes()
        self.path = Path("logs") / f"{os.environ.get('RUN_ID') or f'seed{recipe.train.seed}-{int(time.time())}'}.txt"
        self.step, self.seconds = 0, 0.0
        if self.on:
            self.path.parent.mkdir(exist_ok=True)
            self.path.write_bytes(self.source + b"\n" + b"=" * 100 + b"\n")

    def note(self, text: str) -> None:
        if self.on:
            print(text, flush=True)
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(f"{text}\n")

    def took(self, step: int, loss: float, seconds: float) -> None:
        """Step number `step` is done, `seconds` after the first one began."""
        self.step, self.seconds = step, seconds
        if step == 1 or step % self.every == 0:
            self.note(f"step:{step}/{self.steps or '?'} train_loss:{loss:.6f} {self.times()}")

    def times(self) -> str:
        """Training time so far, as the official lines have it."""
        return f"train_time:{1e3 * self.seconds:.0f}ms step_avg:{1e3 * self.seconds / max(self.step, 1):.2f}ms"

    def sizes(self, model: nn.Module, size: int, codec: str) -> None:
        """What counts towards the cap: this file and the coded weights."""
        self.note(f"Serialized model: {4 * sum(p.numel() for p in model.parameters())} bytes")
        self.note(f"Code size: {len(self.source)} bytes")
        self.note(f"Serialized model {codec}: {size} bytes")
        self.note(f"Total submission size {codec}: {size + len(self.source)} bytes")

    def round_trip(self, result: Score, codec: str) -> None:
        name = f"final_{codec}_roundtrip" + ("_sliding" if result.sliding else "")
        facts = f"targets:{result.scored_tokens} bytes:{result.scored_bytes}"
        seconds = f"eval_time:{1e3 * result.seconds:.0f}ms"
        self.note(f"{name} val_loss:{result.val_loss:.4f} val_bpb:{result.val_bpb:.4f} {seconds} {facts}")
        self.note(f"{name}_exact val_loss:{result.val_loss:.8f} val_bpb:{result.val_bpb:.8f}")


class StepLines(Callback):
    """The log as the training loop of the package calls it."""

    def __init__(self, log: Log) -> None:
        self.log = log

    def note(self, text: str) -> None:
        self.log.note(text)

    def on_step(self, info: StepInfo, fraction: float, model: nn.Module) -> None:
        self.log.took(info.step, info.loss, info.elapsed)


# -- the steps, for every recipe -------------------------------------------------------------------------------


def train_model(
    recipe: Recipe, shards: list[np.ndarray], vocab_size: int, dist: Dist, clock: Stopwatch, log: Log
) -> tuple[GPT, str]:
    """The trained weights in a model of their own, in evaluation mode, and the name of the activations' type."""
    section, lines = recipe.train, StepLines(log)
    chosen = runtime.configure(section, dist.device)
    # A stopwatch has what the training loop uses of a clock.
    parts, held_out = assemble(recipe, shards, vocab_size, chosen.dtype, clock, dist, lines, Interrupts())  # type: ignore[arg-type]
    if section.compile == "on" or (section.compile == "auto" and dist.device.type == "cuda"):
        warm_up(parts)  # and again from the start: the compiled code stays
        runtime.seed_all(section.seed)
        parts, held_out = assemble(recipe, shards, vocab_size, chosen.dtype, clock, dist, lines, Interrupts())  # type: ignore[arg-type]
        parts.model.compile_regions()
    model, trainer = parts.model, Trainer(parts)
    log.note(f"model_params:{sum(p.numel() for p in model.parameters())}")
    model.train()
    reserve = reserve_seconds(recipe, model)
    trainer.begin(lambda origin: training_window(recipe, origin, reserve))
    reason = trainer.run()
    log.note(f"stopping: {reason} {log.times()} step:{trainer.at.step}")
    finish(trainer, held_out, reserve)
    return final_model(model, recipe, vocab_size, dist.device), str(chosen.dtype).removeprefix("torch.")


def reserve_seconds(recipe: Recipe, model: nn.Module) -> float:
    """What follows training, where the budget must hold it too (`budget.count_packing`)."""
    return selection_seconds(recipe) + 1.0 + PACK_SECONDS * sum(p.numel() for p in model.parameters()) / 1e6


def warm_up(parts: Parts) -> None:
    """Throw-away steps in every mode and shape that training will see, so that nothing is compiled later."""
    recipe, modes = parts.recipe, parts.modes
    parts.model.compile_regions()
    parts.model.train()
    for mode in reversed(modes.states):
        for shape in all_shapes(recipe):
            modes.set(mode)
            parts.stepper.enter(shape.seq_len)
            parts.loader.set_shape(shape.seq_len, shape.batch_tokens)
            for _ in range(max(1, recipe.schedule.warmup_steps // len(modes.states))):
                parts.stepper.accumulate(parts.loader.next_batch, shape.step_tokens)
                parts.opts.clip(recipe.optim.grad_clip)
                parts.opts.step(1.0, recipe.optim.momentum)
                parts.stepper.report()
                parts.opts.zero_grad()


def pack(
    model: GPT, shards: list[np.ndarray], recipe: Recipe, tokenizer: Tokenizer, dtype: str, dist: Dist, path: Path
) -> int:
    """Quantise, code and write the artifact on the main rank; its bytes as the challenge counts them: no tokenizer."""
    hessians = None
    if calibrated(recipe.quant):
        hessians = collect(
            model, shards, seq_len=trained_seq_len(recipe), tokens=recipe.quant.calibration_tokens, dist=dist
        )
    if not dist.is_main:
        return 0
    tensors = export(model.state_dict(), recipe.quant, recipe.model.num_layers, hessians)
    vocabulary = tokenizer.compact()
    artifact = Artifact(manifest_of(recipe, tokenizer.vocab_size, dtype), tensors, vocabulary)
    data = encode_artifact(artifact, recipe.pack.codec, recipe.pack.level).data
    path.write_bytes(data)
    return len(data) - len(vocabulary)


def unpack(path: Path, recipe: Recipe, vocab_size: int) -> GPT:
    """The model that a file of this recipe holds."""
    model = GPT(recipe.model, vocab_size)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    specs = tensor_table(shapes, recipe.quant, recipe.model.num_layers)
    model.load_state_dict(restore(decode_known(path.read_bytes(), specs, recipe.pack.codec)))
    return model


def measure(model: GPT, tokens: np.ndarray, tokenizer: Tokenizer, recipe: Recipe, dist: Dist, stride: int) -> Score:
    """The score of the whole validation stream; `stride` 0 = windows side by side."""
    section = recipe.score
    return score(
        model, tokens, token_bytes=tokenizer.token_bytes, seq_len=section.seq_len or recipe.train.seq_len,
        stride=stride, batch_tokens=section.batch_tokens, dist=dist, windows=section.windows, lane_count=section.lanes,
        limit_seconds=recipe.budget.eval_seconds,
    )  # fmt: skip
