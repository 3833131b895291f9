"""Evaluation: window rules, losses token by token, counts and bits per byte, as each system scores and as it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from paramgolf.data.token_bytes import TokenBytes
from paramgolf.model.gpt import GPT
from paramgolf.score.scorer import Score, score
from paramgolf.score.windows import Plan, plan
from tests.parity.harness import Check, exact, worst
from tests.parity.systems import load_model

NLL, RESULT = 2e-4, 1e-5
# The window rule of each script (our recipes score every target once instead), and whose windows are dealt to ranks
# one by one rather than in blocks.
RULES = {"pr107": "with_tail", "pr114": "full_only", "pr128": "with_tail", "pr137": "full_only"}
ROUND_ROBIN = ("pr114", "pr137")


def check(path: Path, z: Any) -> list[Check]:
    with np.load(path.parent / str(z["weights_file"]), allow_pickle=False) as weights:
        model = load_model(weights).eval()
        system = json.loads(str(weights["config_json"]))["system"]
    with np.load(path.parent / "D_prefix_bytes.npz", allow_pickle=False) as prefix:
        tokens = prefix["first_tokens"]
    table = TokenBytes(z["lut_base_bytes"], z["lut_has_leading_space"], z["lut_is_boundary"])
    whole = tokens[: int(z["val_tokens_after_trim"])]
    seq_len, stride = int(z["seq_len"]), int(z["stride"])
    standard = score(model, whole, token_bytes=table, seq_len=seq_len, keep_nll=True)
    checks = [*_totals("standard/", standard, z), worst("standard nll", standard.nll, z["standard/nll"], NLL)]
    for name in ("sliding", "sliding_uneven"):
        if f"{name}/nll" in z.files:
            given = tokens[: int(z[f"{name}/n_tokens_given"])]
            checks += _check_sliding(name, model, system, given, table, seq_len, stride, z)
    return checks


def _totals(prefix: str, result: Score, z: Any) -> list[Check]:
    """`prefix` ends in the separator: "standard/", "sliding/unique_"."""
    return [
        worst(f"{prefix}val_loss", result.val_loss, z[f"{prefix}val_loss"], RESULT),
        worst(f"{prefix}val_bpb", result.val_bpb, z[f"{prefix}val_bpb"], RESULT),
        exact(f"{prefix}token_count", result.scored_tokens, z[f"{prefix}token_count"]),
        exact(f"{prefix}byte_count", result.scored_bytes, z[f"{prefix}byte_count"]),
    ]


def _check_sliding(
    name: str, model: GPT, system: str, tokens: np.ndarray, table: TokenBytes, seq_len: int, stride: int, z: Any
) -> list[Check]:
    rule = RULES[system]
    windows = plan(len(tokens), seq_len, stride, rule)
    scored = dict(token_bytes=table, seq_len=seq_len, stride=stride)
    theirs = score(model, tokens, **scored, windows=rule, keep_nll=True)
    ours = score(model, tokens, **scored, keep_nll=True)
    times = np.bincount(windows.targets(), minlength=len(tokens))
    lost = np.flatnonzero(times[1:] == 0) + 1
    repeated = np.flatnonzero(times > 1)
    checks = [
        *_totals(f"{name}/", theirs, z),
        worst(f"{name} nll", theirs.nll, z[f"{name}/nll"], NLL),
        exact(f"{name} target_pos", windows.targets(), z[f"{name}/target_pos"]),
        exact(f"{name} context", windows.context(), z[f"{name}/context"]),
        exact(f"{name} unscored_targets", lost, z[f"{name}/unscored_targets"]),
        exact(f"{name} multi_scored_targets", repeated, z[f"{name}/multi_scored_targets"]),
        exact(f"{name} multi_scored_times", times[repeated], z[f"{name}/multi_scored_times"]),
    ]
    if f"{name}_world4/local_val_loss" in z.files:
        checks += _check_ranks(name, windows, theirs, system in ROUND_ROBIN, z)
    # Our own rule scores what theirs loses, so it can be compared with "each target once" only where nothing is lost.
    if not len(lost):
        checks += _totals(f"{name}/unique_", ours, z)
    else:
        checks.append(exact(f"{name} ours covers the tail", ours.scored_tokens, len(tokens) - 1))
    return checks


def _check_ranks(name: str, windows: Plan, result: Score, round_robin: bool, z: Any) -> list[Check]:
    """What each of four ranks scores: our scorer always takes contiguous blocks, so dealt windows are picked here."""
    assert result.nll is not None
    world = len(z[f"{name}_world4/local_val_loss"])
    owner = np.empty(len(windows), dtype=np.int64)
    for rank in range(world):
        low = sum(len(windows.part(r, world)) for r in range(rank))
        owner[low : low + len(windows.part(rank, world))] = rank
    if round_robin:
        owner = np.arange(len(windows)) % world
    of_target = np.repeat(owner, windows.counts)
    parts = [result.nll[of_target == rank] for rank in range(world)]
    losses = [part.mean(dtype=np.float64) for part in parts]
    return [
        worst(f"{name} ranks' losses", losses, z[f"{name}_world4/local_val_loss"], RESULT),
        exact(f"{name} ranks' tokens", [len(p) for p in parts], z[f"{name}_world4/local_token_count"]),
    ]
