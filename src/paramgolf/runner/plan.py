"""`golf plan`: bytes, parameters, steps and time of a recipe on this machine, before anything is trained.

Bytes come from `forecast.plan_bytes`. Time comes from a finished run of the same recipe on the same machine where there
is one, else from what the machine remembers of such runs, else from a few timed training steps on made-up tokens; steps
then follow from the budgets as the training loop applies them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from paramgolf.dist import init as init_dist
from paramgolf.errors import GolfError
from paramgolf.pack.forecast import SizePlan, plan_bytes
from paramgolf.recipe.load import load_recipe, to_table
from paramgolf.recipe.sections import Recipe
from paramgolf.runner import machine
from paramgolf.runner.environment import environment
from paramgolf.runner.folder import RunFolder
from paramgolf.runner.reserve import packing_seconds
from paramgolf.runner.run import check
from paramgolf.runner.summary import table_text
from paramgolf.script.generate import code_bytes
from paramgolf.train import runtime
from paramgolf.train.budget import Position, Shape, Window, all_shapes, shape_at, training_window
from paramgolf.train.timing import StepTiming, time_steps

STARTUP_SECONDS = 6.0  # imports and building the model on a slow disk, where no run says better
TOKENIZER_BYTES_A_PIECE = 2.0  # of a tokenizer trained here, coded; where no run says better
HISTORY_MARGIN = 0.02  # of the bytes of a run whose weights are stored in the same way
_STORED = ("model", "quant", "pack")  # sections that decide how many bytes come out


@dataclass(frozen=True)
class History:
    """A finished run of the same recipe on a machine like this one."""

    path: str
    record: dict[str, Any]
    same_bytes: bool  # its weights are stored as the plan's would be, under the same cap
    same_text: bool  # trained on the same budget


def make_plan(
    recipe: Recipe, *, runs: Path = Path("runs"), measure: bool = True, say: Callable[[str], None] | None = None
) -> dict[str, Any]:  # fmt: skip
    """Everything that can be said before training, as plain data. Raises GolfError for a recipe that cannot run."""
    check(recipe)
    device = init_dist(recipe.train.device).device
    history = find_history(recipe, runs)
    ledger = history.record["ledger"] if history else {}
    vocab_size = recipe.data.vocab_size
    guess = round(TOKENIZER_BYTES_A_PIECE * vocab_size)
    code = history.record["code_bytes"] if history else code_bytes(recipe, own_tokenizer=False)
    sizes = plan_bytes(recipe, vocab_size, tokenizer_bytes=int(ledger.get("tokenizer", guess)), code_bytes=code)
    facts: dict[str, Any] = {
        "recipe": recipe.name,
        "params": sizes.params,
        "payload_bytes": sizes.payload_bytes,
        "cap_bytes": sizes.cap_bytes,
        **_bytes(recipe, sizes, history),
    }
    timings: Mapping[tuple[int, int], float] = {}
    before, how = STARTUP_SECONDS, ""
    if history:
        before, timings, how = _from_history(recipe, history.record)
        how = f"from {history.path}"
    elif known := _from_machine(recipe, device):
        before, timings, how = known
    elif measure:
        if say is not None:
            say("timing a few training steps")
        timing = time_steps(recipe, vocab_size, init_dist(recipe.train.device))
        before, timings, how = _from_timing(recipe, timing), timing.seconds, timing.how
    after = packing_seconds(recipe, vocab_size, device)
    if timings:
        facts |= predict_steps(recipe, timings, before, after)
    return facts | {"timing": how, "seconds_before": before, "seconds_after": after}


def _bytes(recipe: Recipe, sizes: SizePlan, history: History | None) -> dict[str, Any]:
    """Predicted bytes: the interval, its middle, by group, and where they come from."""
    groups = {
        name: {key: round(value) for key, value in dataclasses.asdict(part).items()}
        for name, part in sizes.groups.items()
    }
    low, typical, high = sizes.low_bytes, sizes.typical_bytes, sizes.high_bytes
    how = "weights of Gaussian rows; the interval is for trained ones"
    if recipe.pack.fit and recipe.budget.bytes and high <= recipe.budget.bytes:
        how = "the solver fills the cap; the groups at one step for all of them"
    elif history is not None and history.same_bytes:
        typical = history.record["total_bytes"]
        margin = HISTORY_MARGIN if history.same_text else 4 * HISTORY_MARGIN
        low, high = max(low, round(typical * (1 - margin))), min(high, round(typical * (1 + margin)))
        groups = {name: {"typical": size} for name, size in history.record["ledger"].items()}
        how = f"as {history.path} came out"
    return {
        "bytes": typical, "bytes_low": low, "bytes_high": high, "bytes_from": how, "groups": groups,
        "fits": not sizes.cap_bytes or low <= sizes.cap_bytes,
    }  # fmt: skip


def find_history(recipe: Recipe, runs: Path) -> History | None:
    """The newest finished run below `runs` whose steps would take as long as this recipe's, on this machine."""
    here = environment()
    found = []
    for path in runs.glob("*/record.json"):
        folder = RunFolder(path.parent)
        try:
            record = folder.read_record() or {}
            other = load_recipe(str(folder.root / "recipe.toml"))
            table, there = to_table(other), record["environment"]
            same = machine.workload(other, threads=0) == machine.workload(recipe, threads=0)
            if same and all(there[key] == here[key] for key in ("cpu", "cpu_count", "gpus")):
                found.append((path.stat().st_mtime, folder, record, table))
        except (GolfError, KeyError, TypeError, OSError):
            continue  # another version's, or none of ours: no history
    if not found:
        return None
    _, folder, record, table = max(found, key=lambda item: item[0])
    own = to_table(recipe)
    stored = all(table[key] == own[key] for key in _STORED) and table["data"]["vocab_size"] == own["data"]["vocab_size"]
    same_bytes = stored and (not recipe.pack.fit or table["budget"]["bytes"] == recipe.budget.bytes)
    return History(str(folder.root), record, same_bytes, table["budget"] == own["budget"])


def _from_history(recipe: Recipe, record: dict[str, Any]) -> tuple[float, dict[tuple[int, int], float], str]:
    """(seconds before the first step, seconds a step by shape, where from)."""
    seconds, training = record["seconds"], record["training"]
    inside = ("train", "average", "post_qat", "checkpoint", "calibrate", "pack")
    before = max(0.0, seconds["strict"] - sum(seconds.get(key, 0.0) for key in inside))
    a_token = training["train_seconds"] / max(1, record["train_tokens"])
    return before, {(s.seq_len, s.batch_tokens): a_token * s.step_tokens for s in all_shapes(recipe)}, ""


def _from_machine(
    recipe: Recipe, device: torch.device
) -> tuple[float, dict[tuple[int, int], float], str] | None:  # fmt: skip
    """The same from what this machine remembers of runs of this kind, wherever their folders are."""
    shapes = all_shapes(recipe)
    speeds = machine.history(recipe, threads=runtime.configure(recipe.train, device).threads)
    if not speeds or len(shapes) > 1:  # a mean over several shapes says nothing about each
        return None
    seconds = median(speed.step_ms for speed in speeds) / 1e3
    how = f"from {len(speeds)} earlier runs on this machine"
    before = median(speed.setup_seconds for speed in speeds)
    return before, {(shapes[0].seq_len, shapes[0].batch_tokens): seconds}, how


def _from_timing(recipe: Recipe, timing: StepTiming) -> float:
    """Seconds before the first step: start, compilation, warm-up."""
    shapes = all_shapes(recipe)
    steps = max(recipe.schedule.warmup_steps, len(shapes)) if recipe.schedule.warmup_steps else 0
    return STARTUP_SECONDS + timing.compile_seconds + steps * timing.seconds[shapes[0].seq_len, shapes[0].batch_tokens]


def predict_steps(
    recipe: Recipe, step_seconds: Mapping[tuple[int, int], float], before: float, after: float
) -> dict[str, Any]:  # fmt: skip
    """Steps, tokens and seconds of the main loop, and what ends it.

    Args:
        step_seconds: of one step by (seq_len, batch_tokens).
        before: seconds until the first step. after: seconds kept for packing.
    """
    window = training_window(recipe, before if recipe.budget.clock == "strict" else 0.0, after)
    at, edges = Position(), [*sorted({stage.at for stage in recipe.stages if 0 < stage.at < 1}), 1.0]
    reason = ""
    while not reason:
        fraction = window.fraction(at)
        shape = shape_at(recipe, fraction)
        seconds = step_seconds[shape.seq_len, shape.batch_tokens]
        edge = next((e for e in edges if e > fraction + 1e-12), 1.0)
        at = _go(window, at, shape, seconds, _steps_until(window, at, shape, seconds, edge))
        reason = window.stop_reason(at, shape.step_tokens, seconds)
        if not (window.seconds or window.steps or window.tokens):
            break
    return {
        "steps": at.step,
        "train_tokens": at.tokens,
        "step_ms": 1e3 * at.elapsed / max(1, at.step),
        "train_seconds": at.elapsed,
        "total_seconds": before + at.elapsed + after,
        "stop_reason": reason,
    }


def _steps_until(window: Window, at: Position, shape: Shape, seconds: float, edge: float) -> int:
    """How many steps of one shape until the fraction `edge` of the window is passed, or nothing more may be taken."""
    counts = []
    if window.seconds:
        last = window.seconds if edge == 1.0 else edge * window.seconds
        counts.append((last - at.elapsed) / seconds)
    if window.steps:
        counts.append(edge * window.steps - at.step)
    if window.tokens:
        counts.append((edge * window.tokens - at.tokens) / shape.step_tokens)
    least = min(counts, default=1.0)
    return max(1, int(least) if edge == 1.0 else int(least) + 1)


def _go(window: Window, at: Position, shape: Shape, seconds: float, steps: int) -> Position:
    return Position(at.step + steps, at.tokens + steps * shape.step_tokens, at.elapsed + steps * seconds)


def plan_text(plan: dict[str, Any]) -> str:
    """The tables of `golf plan`."""
    cap = plan["cap_bytes"]
    size = f"{plan['bytes']:,} bytes, {plan['bytes_low']:,} to {plan['bytes_high']:,}"
    size += f" (cap {cap:,}{'' if plan['fits'] else ': too small'})" if cap else ""
    groups = sorted(plan["groups"].items(), key=lambda item: -item[1]["typical"])
    keys = [key for key in ("low", "typical", "high") if groups and key in groups[0][1]]
    rows = [(name, *(f"{part[key]:,}" for key in keys)) for name, part in groups if part["typical"]]
    blocks = [
        f"{plan['recipe']}: {plan['params']:,} parameters, {plan['payload_bytes']:,} bytes unpacked",
        table_text(rows, header=("group", *keys), title=f"{size}; {plan['bytes_from']}"),
    ]
    if "steps" in plan:
        rows_time = [
            ("steps", f"{plan['steps']:,}"),
            ("tokens", f"{plan['train_tokens']:,}"),
            ("ms a step", f"{plan['step_ms']:,.1f}"),
            ("seconds before the first step", f"{plan['seconds_before']:,.1f}"),
            ("seconds of training", f"{plan['train_seconds']:,.1f}"),
            ("seconds kept for packing", f"{plan['seconds_after']:,.1f}"),
            ("seconds in all", f"{plan['total_seconds']:,.1f}"),
        ]
        blocks.append(table_text(rows_time, title=f"time, ended by {plan['stop_reason']}; {plan['timing']}"))
    return "\n\n".join(blocks)
