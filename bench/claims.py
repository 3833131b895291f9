"""The published systems' claims at pocket scale: `python -m bench.claims --json FILE [--seeds 3] [--tokens 1500000]`.

One recipe (bench/claims.toml: PR 114's method with every size divided) and one arm for each side of a claim; all arms
train on the same tokens with the same seeds, so differences are paired by seed. The text is the shared web text; scores
are taken on a part of its training text, never on its validation set. Runs are appended to FILE as they end, seed by
seed over all arms; a stopped bench goes on where it was. `--table` only prints what FILE holds.
"""

from __future__ import annotations

import argparse
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.runs import golf_run, on_cores
from bench.webtext import SEPARATOR, train_text, tuning_split
from paramgolf.data.cache import cache_root
from paramgolf.lab import stats
from paramgolf.runner.environment import environment

RECIPE = str(Path(__file__).with_name("claims.toml"))
SLIDING, BLOCKS, GAP = "val_bpb_sliding", "val_bpb", "gap"
KEYS = (SLIDING, BLOCKS, "val_bpb_float", "total_bytes", "params", "steps", "train_tokens")
HELD_BYTES = 150_000
EQUAL = 0.005  # BPB within which two settings count as equal
_INT6 = '{ store = "int6" }'
_CONTROL = '{ match = "@control", store = "float32" }, { max_size = 4096, store = "float16" }'
_LATE_K = '{ match = "@last_layers:2&*.attn.c_k.weight", store = "float16" }'

# Arm -> overrides of the base recipe.
ARMS: dict[str, list[str]] = {
    "base": [],
    "train 2x longer": ["train.seq_len=512", "score.seq_len=512"],
    "no clip": ["optim.grad_clip=0"],
    "clip 1.0": ["optim.grad_clip=1.0"],
    "half batch": ["train.batch_tokens=6144"],
    "larger batch": ["train.batch_tokens=15872"],
    "stride / 4": ["score.stride=8"],
    "int8 embedding": [
        f'quant.rules=[{{ match = "tok_emb.weight", store = "int8" }}, {_LATE_K}, {_CONTROL}, {_INT6}]'
    ],
    "int6 embedding": [f"quant.rules=[{_LATE_K}, {_CONTROL}, {_INT6}]"],
    "late K in int6": [f'quant.rules=[{{ match = "tok_emb.weight", store = "float16" }}, {_CONTROL}, {_INT6}]'],
    "QAT": ["quant.qat=export"],
    "EMA 0.98": ["average.kind=ema", "average.decay=0.98"],
    "NorMuon": ["optim.matrix=normuon"],
}  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """`better` is said to be better than `worse` (`equal`: as good) by `metric`; `published` in its own words."""

    name: str
    published: str
    better: str
    worse: str
    metric: str = SLIDING
    equal: bool = False


CLAIMS = [
    Claim("train 2048 = train 4096 under sliding scoring", "1.1764 and 1.1765 (PR 114)", "base", "train 2x longer",
          equal=True),
    Claim("clip 0.3 better than none", "best of 0 to 1.0 (PR 114), no figure", "base", "no clip"),
    Claim("clip 0.3 better than 1.0", "best of 0 to 1.0 (PR 114), no figure", "base", "clip 1.0"),
    Claim("batch 786k better than 393k", "best of 393k to 1M (PR 114), no figure", "base", "half batch"),
    Claim("batch 786k better than 1M", "best of 393k to 1M (PR 114), no figure", "base", "larger batch"),
    Claim("stride 256 better than 64", "1.1574 and 1.1579 (PR 114)", "base", "stride / 4"),
    Claim("fp16 embedding better than int8", "quantisation costs 0.0005 instead of 0.007 (FP16Embed)", "base",
          "int8 embedding"),
    Claim("fp16 embedding better than int6", "none: int6 was not tried there", "base", "int6 embedding"),
    Claim("late K in fp16", "no figure (PR 114)", "base", "late K in int6"),
    Claim("QAT closes the quantisation gap", "0.0015 with QAT (PR 128), 0.0064 without (PR 114)", "QAT", "base", GAP),
    Claim("QAT gives the better score", "none like for like", "QAT", "base"),
    Claim("averaging", "EMA 0.998, dropped by its own validation score (PR 137)", "EMA 0.98", "base"),
    Claim("NorMuon better than Muon", "none like for like (PR 137: 1.1666)", "NorMuon", "base"),
]  # fmt: skip


def held_text(folder: Path) -> str:
    """The first documents of the tuning split, so that a stride of 8 takes a minute less."""
    folder.mkdir(parents=True, exist_ok=True)
    head = Path(tuning_split(folder)).read_bytes()[:HELD_BYTES]
    path = folder / "webtext_claims_split.txt"
    path.write_bytes(head[: head.rindex(SEPARATOR)] + b"\n")
    return str(path)


def value(row: dict[str, Any], metric: str) -> float:
    return row[BLOCKS] - row["val_bpb_float"] if metric == GAP else row[metric]


def measured(claim: Claim, runs: dict[str, dict[str, Any]], confidence: float) -> dict[str, Any] | None:
    """Ours for a claim: mean of worse - better over common seeds, its interval, and the verdict; None without runs."""
    sides = [{k.rpartition(" ")[2]: r for k, r in runs.items() if k.rpartition(" ")[0] == arm and r[BLOCKS] is not None}
             for arm in (claim.better, claim.worse)]  # fmt: skip
    seeds = sorted(sides[0].keys() & sides[1].keys())
    if not seeds:
        return None
    gains = np.array([value(sides[1][s], claim.metric) - value(sides[0][s], claim.metric) for s in seeds])
    test = stats.one_sample(gains, 0.0, confidence)
    verdict = judge(claim, test.low, test.high, gains)
    return {"seeds": len(seeds), "gain": float(gains.mean()), "low": test.low, "high": test.high, "verdict": verdict}


def judge(claim: Claim, low: float | None, high: float | None, gains: np.ndarray) -> str:
    """What the interval of the gain says about the claim."""
    if low is None or high is None:
        if len(gains) > 1 and not gains.std():  # the very same in all seeds
            low = high = float(gains[0])
        else:
            return "one seed: not determined"
    if claim.equal:
        if low >= -EQUAL and high <= EQUAL:
            return f"holds: equal within {EQUAL:g}"
        return "does not hold here" if low > EQUAL or high < -EQUAL else "not shown"
    if low > 0:
        return "holds"
    return "does not hold here: the opposite" if high < 0 else "not shown"


def table(data: dict[str, Any], confidence: float = 0.95) -> str:
    """The claims as the rows of a Markdown table."""
    lines = [
        f"| claim | published | ours: gain in BPB, {100 * confidence:g} % interval | seeds | verdict |",
        "|---|---|---|---|---|",
    ]
    for claim in CLAIMS:
        ours = measured(claim, data["runs"], confidence)
        if ours is None:
            lines.append(f"| {claim.name} | {claim.published} | not run | 0 | |")
            continue
        interval = "" if ours["low"] is None else f" ({ours['low']:+.4f} to {ours['high']:+.4f})"
        gain = f"{ours['gain']:+.4f}{interval}"
        lines.append(f"| {claim.name} | {claim.published} | {gain} | {ours['seeds']} | {ours['verdict']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.claims", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("results/claims.json"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1_500_000)
    parser.add_argument("--only", default="", help="arms, comma between them")
    parser.add_argument("--workers", type=int, default=1, help="runs at once, each on a core of its own")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    writing = threading.Lock()
    path: Path = options.json
    data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": {}, "tokens": options.tokens}
    if data["tokens"] != options.tokens and not options.table:
        parser.error(f"{path} holds runs of {data['tokens']:,} tokens; choose another --json")
    arms = [arm for arm in ARMS if not options.only or arm in options.only.split(",")]
    if not options.table:
        data["machine"] = environment()
        path.parent.mkdir(parents=True, exist_ok=True)
        held = held_text(cache_root())

        def run(job: tuple[int, str]) -> None:
            seed, arm = job
            overrides = [f"budget.tokens={options.tokens}", f"train.seed={seed}", *ARMS[arm]]
            record = golf_run(RECIPE, overrides, train=train_text(), val=held)
            with writing:
                data["runs"][f"{arm} {seed}"] = {name: record.get(name) for name in KEYS}
                path.write_text(json.dumps(data, indent=1) + "\n")
                print(f"{arm} {seed}: {json.dumps(data['runs'][f'{arm} {seed}'])}", flush=True)

        jobs = [(seed, arm) for seed in range(1, options.seeds + 1) for arm in arms]
        on_cores(run, [(seed, arm) for seed, arm in jobs if f"{arm} {seed}" not in data["runs"]], options.workers)
    print(table(data))


if __name__ == "__main__":
    main()
