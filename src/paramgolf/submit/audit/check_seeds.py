"""Seeds and statistics: everything claimed in the JSON is recomputed from the logs."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from typing import Any

from paramgolf.submit.audit.catalog import Finding, finding
from paramgolf.submit.audit.check_log import environment_defaults
from paramgolf.submit.audit.folder import Submission
from paramgolf.submit.audit.log import Log

_LOCAL = ("seed", "run_id", "path", "dir", "file", "rank", "port", "host")
_ALWAYS = {"world_size", "grad_accum_steps"}


def check(submission: Submission) -> Iterator[Finding]:
    if submission.single:
        return
    logs = submission.scored_logs
    yield from _names(submission)
    if submission.logs and len(logs) < 3:
        yield finding("seed-few", f"{len(logs)} scored log(s); a claim needs about three seeds", submission.path.name)
    yield from _config(logs, set(environment_defaults(submission.code)) | _ALWAYS)
    if submission.json is not None:
        yield from _score(submission, submission.json, logs)
        yield from _deviation(submission, submission.json, logs)
        yield from _per_seed(submission, submission.json, logs)
        if "p_value" in submission.json:
            claimed = str(submission.json["p_value"])[:40]
            yield finding("stat-p-value", f"claimed p-value {claimed}: not determined", submission.json_name)


def _seed(log: Log) -> int | None:
    return log.seed if log.seed is not None else log.seed_in_name


def _names(submission: Submission) -> Iterator[Finding]:
    by_content: dict[str, Log] = {}
    for log in submission.logs:
        if log.seed is not None and log.seed_in_name is not None and log.seed != log.seed_in_name:
            message = f"the name says seed {log.seed_in_name}, the log ran seed {log.seed}"
            yield finding("seed-name", message, f"{log.name}:{log.hparams['seed'][1]}")
        other = by_content.setdefault(log.sha256, log)
        if other is not log:
            both = None not in (log.seed_in_name, other.seed_in_name) and log.seed_in_name != other.seed_in_name
            yield finding("seed-copied" if both else "log-copy", f"same content as {other.name}", log.name)


def _config(logs: list[Log], settings: set[str]) -> Iterator[Finding]:
    for log in logs[1:]:
        first = logs[0]
        differ = [
            name
            for name, (value, _) in sorted(log.hparams.items())
            if name in settings
            and not any(word in name for word in _LOCAL)
            and first.hparams.get(name, (value, 0))[0] != value
        ]
        if differ:
            shown = ", ".join(f"{n} {first.hparams[n][0]} / {log.hparams[n][0]}" for n in differ[:4])
            evidence = f"{log.name}:{log.hparams[differ[0]][1]} against {first.name}"
            yield finding("seed-config", f"{len(differ)} setting(s) differ between logs: {shown}"[:300], evidence)


def _finals(logs: list[Log]) -> list[float]:
    return [log.final.bpb for log in logs if log.final]


def _agrees(claimed: float, value: float) -> bool:
    """Equal at the digits of the claim (at least four decimals are asked of it), rounded or cut."""
    text = repr(float(claimed))
    digits = min(max(len(text.partition(".")[2]), 4), 8)
    return abs(claimed - value) < 1.01 * 10.0**-digits


def _score(submission: Submission, table: dict[str, Any], logs: list[Log]) -> Iterator[Finding]:
    claimed = _figure(table.get("val_bpb", table.get("mean_val_bpb")))
    finals = _finals(logs)
    if claimed is None or not finals:
        return
    mean = statistics.fmean(finals)
    if any(_agrees(claimed, statistics.fmean(_finals(group))) for group in _series(logs) if len(group) > 1):
        return
    told = f"claimed {claimed:g}; the logs' final scores: mean {mean:.6f}, {min(finals):.6f} to {max(finals):.6f}"
    if _agrees(claimed, mean):
        return
    if any(_agrees(claimed, value) for value in finals):
        code = "stat-best-seed" if _agrees(claimed, min(finals)) else "stat-other-metric"
        yield finding(code, told, submission.json_name)
    elif any(_agrees(claimed, s.bpb) for log in logs for s in log.scores) or _agrees_label_mean(claimed, logs):
        yield finding("stat-other-metric", f"{told}; it is another score of the logs", submission.json_name)
    elif abs(claimed - mean) < 2e-4 and len(finals) > 1:
        yield finding("stat-other-metric", f"{told}; close to the mean but not it", submission.json_name)
    else:
        yield finding("stat-score", told, submission.json_name)


def _series(logs: list[Log]) -> list[list[Log]]:
    """Logs whose names differ only in digits (`seed_0.log`, `seed_42.log`): one set of runs each."""
    groups: dict[str, list[Log]] = {}
    for log in logs:
        groups.setdefault(re.sub(r"\d+", "", log.name), []).append(log)
    return list(groups.values())


def _agrees_label_mean(claimed: float, logs: list[Log]) -> bool:
    by_label: dict[str, list[float]] = {}
    for log in logs:
        for label, bpb in {s.label: s.bpb for s in log.scores}.items():
            by_label.setdefault(label, []).append(bpb)
    return any(_agrees(claimed, statistics.fmean(values)) for values in by_label.values())


def _figure(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e9 < value < 1e9:
        return None
    return float(value)


def _deviation(submission: Submission, table: dict[str, Any], logs: list[Log]) -> Iterator[Finding]:
    claimed, finals = _figure(table.get("val_bpb_std")), _finals(logs)
    if claimed is None or len(finals) < 2:
        return
    sample, population = statistics.stdev(finals), statistics.pstdev(finals)
    if min(abs(claimed - sample), abs(claimed - population)) > max(6e-5, 0.02 * sample):
        message = f"val_bpb_std {claimed:g}; from the logs {sample:.6f} (sample) or {population:.6f} (population)"
        yield finding("stat-std", message, submission.json_name)


def _per_seed(submission: Submission, table: dict[str, Any], logs: list[Log]) -> Iterator[Finding]:
    results = table.get("seed_results")
    if not isinstance(results, dict):
        return
    by_seed: dict[str, list[Log]] = {}
    for log in logs:
        if _seed(log) is not None:
            by_seed.setdefault(str(_seed(log)), []).append(log)
    for seed, value in results.items():
        runs = by_seed.get(str(seed).removeprefix("seed").strip("_- "), [])
        if not runs:
            if by_seed:
                yield finding("seed-no-log", f"no scored log of seed {str(seed)[:20]}", submission.json_name)
            continue
        claimed = _figure(value.get("val_bpb") if isinstance(value, dict) else value)
        last = runs[-1].final
        if claimed is not None and last and not any(_agrees(claimed, s.bpb) for log in runs for s in log.scores):
            message = f"seed {str(seed)[:20]}: claimed {claimed:g}, the log ends at {last.bpb:.8g}"
            yield finding("seed-score", message, f"{runs[-1].name}:{last.line}")
