"""What a training run left behind, as plain numbers: the logs of the public scripts, and our own record.

One side of a comparison is a dict with these keys, None where the run does not say:

    steps, step_ms, curve        of the main loop; curve = {step: training loss in nats of that step's batch}
    val_bpb_float                before quantisation, non-overlapping windows
    val_bpb, val_bpb_sliding     of the quantised file as read back: non-overlapping and sliding windows
    val_bpb_ttt                  the same with test-time training
    artifact_bytes               compressed weights with all that is needed to read them, but the tokenizer
    code_bytes, total_bytes, peak_memory_bytes, params
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

Side = dict[str, Any]
KEYS = (
    "steps", "step_ms", "curve", "val_bpb_float", "val_bpb", "val_bpb_sliding", "val_bpb_ttt", "artifact_bytes",
    "code_bytes", "total_bytes", "peak_memory_bytes", "params",
)  # fmt: skip

_TRAIN = re.compile(r"step:(\d+)/\d+ train_loss:(\S+) train_time:\d+ms step_avg:(\S+)ms")
_VAL = re.compile(r"step:(\d+)/\d+ val_loss:\S+ val_bpb:(\S+) train_time:\d+ms step_avg:(\S+)ms")
_STOP = re.compile(r"stopping_early: wallclock_cap train_time:(\d+)ms step:(\d+)/")
_FINAL = re.compile(r"final_(\w+)_exact val_loss:\S+ val_bpb:(\S+)")
# The later records say the same in other words; their milliseconds follow from tokens a second and the batch.
_LATE_BATCH = re.compile(r"train_batch_tokens: (\d+)")
_LATE_TRAIN = re.compile(r"(\d+)/\d+ train_loss: (\S+) train_time: \S+m tok/s: (\d+)")
_LATE_VAL = re.compile(r"(\d+)/\d+ val_loss: \S+ val_bpb: (\S+)")
_LATE_STOP = re.compile(r"stopping_early: wallclock_cap train_time: (\d+)ms step: (\d+)/")
_LATE_SCORES = {
    "val_bpb_float": re.compile(r"diagnostic pre-quantization post-ema val_loss:\S+ val_bpb:(\S+)"),
    "val_bpb": re.compile(r"diagnostic quantized val_loss:\S+ val_bpb:(\S+)"),
    "val_bpb_ttt": re.compile(r"quantized_ttt_phased val_loss:\S+ val_bpb:(\S+)"),
}
_MODEL = re.compile(r"Serialized model (?:int|mixed|quantized)\S*: (\d+) bytes")
_TOTAL = re.compile(r"Total submission size[^:]*: (\d+) bytes")
_CODE = re.compile(r"Code size(?: \(compressed\))?: (\d+) bytes")
_PARAMS = re.compile(r"model_params:(\d+)")
_PEAK = re.compile(r"peak memory allocated: (\d+) MiB")


def script_side(lines: Iterable[str]) -> Side:
    """One side from what a public `train_gpt.py` printed. Lines it does not know are skipped, later ones win."""
    side: Side = dict.fromkeys(KEYS)
    side["curve"] = {}
    only_sliding = False  # pull requests 107 and 128 name their sliding score like a score over blocks
    batch = 0
    for line in lines:
        line = line.strip()
        only_sliding |= line.startswith("final_eval_mode:sliding_window")
        if m := _TRAIN.match(line):
            side["curve"][int(m[1])] = float(m[2])
            side["steps"], side["step_ms"] = int(m[1]), float(m[3])
        elif m := _VAL.match(line):
            if int(m[1]):
                side["steps"], side["step_ms"] = int(m[1]), float(m[3])
                side["val_bpb_float"] = float(m[2])
        elif m := _STOP.match(line):
            side["steps"], side["step_ms"] = int(m[2]), int(m[1]) / max(1, int(m[2]))
        elif m := _FINAL.match(line):
            sliding = m[1] == "sliding_window" or only_sliding
            side["val_bpb_sliding" if sliding else "val_bpb"] = float(m[2])
        elif m := _PEAK.match(line):
            side["peak_memory_bytes"] = int(m[1]) * 2**20
        elif m := _LATE_BATCH.match(line):
            batch = int(m[1])
        else:
            _late(line, side, batch)
            _sizes(line, side)
    return side


def _late(line: str, side: Side, batch: int) -> None:
    """A line of a later record, whose step has `batch` tokens."""
    if m := _LATE_TRAIN.match(line):
        side["curve"][int(m[1])] = float(m[2])
        side["steps"] = int(m[1])
        side["step_ms"] = 1e3 * batch / int(m[3]) if batch and int(m[3]) else None
    elif m := _LATE_VAL.match(line):
        side["steps"] = int(m[1])
    elif m := _LATE_STOP.match(line):
        side["steps"], side["step_ms"] = int(m[2]), int(m[1]) / max(1, int(m[2]))
    for key, pattern in _LATE_SCORES.items():
        if m := pattern.match(line):
            side[key] = float(m[1])


def _sizes(line: str, side: Side) -> None:
    for key, pattern in (
        ("artifact_bytes", _MODEL),
        ("total_bytes", _TOTAL),  # printed for the float model first, for the quantised one last
        ("code_bytes", _CODE),
        ("params", _PARAMS),
    ):
        if m := pattern.match(line):
            side[key] = int(m[1])


def our_side(record: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> Side:
    """One side from `record.json` and the lines of `train.jsonl`; some facts of our own beside the common keys."""
    side: Side = {key: record.get(key) for key in KEYS}
    # The scripts' artifact holds no tokenizer, so ours is counted without it.
    side["artifact_bytes"] = record["artifact_bytes"] - record["ledger"].get("tokenizer", 0)
    side["file_bytes"] = record["artifact_bytes"]
    training = record["training"]
    side["curve"] = {int(row["step"]): float(row["loss"]) for row in rows}
    side["peak_memory_bytes"] = training["peak_memory_bytes"].get("cuda", record["peak_memory_bytes"])
    side["seconds"] = record["seconds"]
    side["training"] = {key: training[key] for key in ("dtype", "attention", "compiled", "recompiles", "micro_tokens")}
    return side


def compare(ours: Side, theirs: Side, decay_steps: int) -> dict[str, Any]:
    """Speed ratio and the distance of the two loss curves at equal steps.

    Only steps before either side's final decay are compared where it follows the clock: afterwards the two train at
    different learning rates. `decay_steps` is the length of that decay, 0 where it follows the steps.
    """
    out: dict[str, Any] = {"speed_ratio": None, "steps_compared": 0}
    if ours["step_ms"] and theirs["step_ms"]:
        out["speed_ratio"] = theirs["step_ms"] / ours["step_ms"]
    last = min(ours["steps"] or 0, theirs["steps"] or 0) - decay_steps - 1
    common = sorted(s for s in ours["curve"].keys() & theirs["curve"].keys() if s <= last)
    if not common:
        return out
    gaps = [ours["curve"][s] - theirs["curve"][s] for s in common]
    half = gaps[len(gaps) // 2 :]
    return out | {
        "steps_compared": len(common),
        "last_step": common[-1],
        "loss_ours": ours["curve"][common[-1]],
        "loss_theirs": theirs["curve"][common[-1]],
        "largest_gap": max(map(abs, gaps)),
        "mean_gap_second_half": sum(half) / len(half),
    }
