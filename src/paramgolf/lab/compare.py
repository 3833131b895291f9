"""`golf compare`: groups of runs against a baseline or a published number, and what the difference is worth."""

from __future__ import annotations

import glob
import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from paramgolf.errors import GolfError
from paramgolf.lab import stats
from paramgolf.lab.records import find_runs, identity, read_record, recipe_table, run_folder
from paramgolf.runner.folder import RunFolder

CHALLENGE_MARGIN = 0.005  # nats a token: what a record must win by
ALPHA = 0.01  # and at which significance
_LARGEST = 1e15  # as of the numbers of a record


@dataclass(frozen=True)
class Run:
    """A finished run whose seal holds, with the hash of its recipe without the seed."""

    path: Path
    record: dict[str, Any]
    recipe: dict[str, Any]
    identity: str

    @property
    def seed(self) -> int:
        return int(self.record["seed"])


@dataclass(frozen=True)
class Group:
    """Runs that are compared as one: seeds of a recipe, or what one argument names."""

    name: str
    runs: list[Run]
    notes: tuple[str, ...] = ()


def open_run(path: Path) -> Run:
    """The finished run in a folder, or of the record file `path`. GolfError if there is none whose seal holds."""
    folder = run_folder(path)
    table = recipe_table(folder)
    return Run(folder.root, read_record(folder), table, identity(table))


def open_groups(arguments: list[str]) -> list[Group]:
    """A pattern, or a folder of runs, is a group. Run folders are grouped by recipe (all but the seed equal); two
    run folders alone are two groups. GolfError where nothing is found."""
    groups: list[Group] = []
    single: list[Run] = []
    for text in arguments:
        path = Path(text)
        if (path / "record.json").is_file() or path.is_file():
            single.append(open_run(path))
            continue
        roots = [path] if path.is_dir() else [Path(p) for p in sorted(glob.glob(text))]
        records = [record for root in roots for record in find_runs(root)]
        if not records:
            raise GolfError(f"no finished run at {text}; give run folders, a folder of runs or a quoted pattern")
        groups.append(Group(text, [open_run(record) for record in records]))
    if len(single) == 2 and not groups:
        groups = [Group(str(run.path), [run]) for run in single]
    else:
        by_recipe: dict[str, list[Run]] = {}
        for run in single:
            by_recipe.setdefault(run.identity, []).append(run)
        own = [Group(f"{runs[0].record['recipe']} ({runs[0].path})", runs) for runs in by_recipe.values()]
        groups = own + groups if own and (Path(arguments[0]) / "record.json").is_file() else groups + own
    return [_without_copies(group) for group in groups]


def _without_copies(group: Group) -> Group:
    """Runs with the same artifact are one run: a copy adds no evidence."""
    kept: dict[str, Run] = {}
    for run in group.runs:
        kept.setdefault(run.record.get("sha256", {}).get("artifact", str(run.path)), run)
    copies = len(group.runs) - len(kept)
    notes = [f"{copies} runs with the artifact of another are left out"] if copies else []
    if len({run.identity for run in kept.values()}) > 1:
        notes.append("its runs have different recipes")
    return replace(group, runs=list(kept.values()), notes=tuple(notes))


def conditions(run: Run) -> dict[str, Any]:
    """What must be equal for two scores to be comparable."""
    record, data, budget = run.record, run.record["data"], run.recipe.get("budget", {})
    sources = [source.get("sha256") for source in data.get("source", [])]
    shards = {side: tuple(shard["sha256"] for shard in data[side]["shards"]) for side in ("train", "val")}
    return {
        "val_text": data["val"].get("sha256") or shards["val"],
        "train_text": tuple(sources) if sources and all(sources) else shards["train"],
        "scored_bytes": record["scored_bytes"],
        "bytes_from": record["bytes_from"],
        "cap_bytes": record["cap_bytes"],
        "pack.count": run.recipe.get("pack", {}).get("count"),
        **{f"budget.{key}": budget.get(key) for key in ("seconds", "steps", "tokens", "clock", "count_packing")},
    }


def refuse_unlike(groups: list[Group], allow: list[str]) -> None:
    """GolfError naming every condition in which the runs differ and that is not allowed to."""
    runs = [run for group in groups for run in group.runs]
    try:
        first, rest = conditions(runs[0]), [(run, conditions(run)) for run in runs[1:]]
    except (KeyError, TypeError, AttributeError) as error:
        raise GolfError(f"a record lacks what a comparison needs ({error}); see `golf verify`") from None
    if unknown := [key for key in allow if key not in first]:
        raise GolfError(f"--allow {unknown[0]}: known are {', '.join(first)}")
    for run, other in rest:
        differ = [key for key in first if first[key] != other[key] and key not in allow]
        if differ:
            shown = "; ".join(f"{key}: {_short(first[key])} and {_short(other[key])}" for key in differ)
            raise GolfError(
                f"{runs[0].path} and {run.path} cannot be compared, they differ in {shown}"
                f" (to compare all the same: {' '.join(f'--allow {key}' for key in differ)})"
            )


def _short(value: Any) -> str:
    text = ",".join(str(v)[:12] for v in value) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 24 else f"{text[:20]} ..."


def compare(
    groups: list[Group], *, against: float | None = None, metric: str = "val_bpb",
    margin_nats: float = CHALLENGE_MARGIN, alpha: float = ALPHA, power: float = 0.8, allow: list[str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Every group against the first one, or all of them against a published number.

    Args:
        against: a published BPB; None = the first group is the baseline.
        metric: val_bpb or another score of the record, e.g. val_bpb_sliding, val_bpb_ngram, val_bpb_float.
        margin_nats: how much better, in nats a token, the p-values ask for.
        power: with which the runs still needed are to find the improvement seen.

    Returns JSON-able facts. Raises GolfError for runs under different conditions (see `conditions`) not in `allow`, and
    for a number that is none to compute with.
    """
    for name, value in (("against", against), ("margin", margin_nats), ("alpha", alpha), ("power", power)):
        if value is not None and not abs(value) <= _LARGEST:
            raise GolfError(f"--{name} {value} is no number to compute with; give one that is finite, at most 1e15")
    if against is None and len(groups) < 2:
        raise GolfError("one group of runs has nothing to be compared with; give another, or --against BPB")
    refuse_unlike(groups, allow or [])
    reference = groups[0].runs[0].record
    nats = math.log(2) * reference["scored_bytes"] / reference["scored_tokens"]  # a token, for one bit a byte
    result: dict[str, Any] = {
        "metric": metric, "against": against, "baseline": None if against is not None else groups[0].name,
        "margin_nats": margin_nats, "margin_bpb": margin_nats / nats, "nats_per_bpb": nats, "alpha": alpha,
        "power": power, "allowed": allow or [], "groups": [_group_facts(group, metric, nats) for group in groups],
    }  # fmt: skip
    if len({run.record["data"]["tokenizer"]["sha256"] for group in groups for run in group.runs}) > 1:
        result["note"] = "the tokenizers differ: nats a token are those of the first run's tokenizer"
    candidates = groups if against is not None else groups[1:]
    tests = [_test(None if against is not None else groups[0], group, result) for group in candidates]
    for test, adjusted in zip(tests, stats.holm([test["t"]["p"] for test in tests]), strict=True):
        test["p_holm"] = adjusted
        test["better_by_margin"] = adjusted is not None and adjusted <= alpha
    return result | {"comparisons": tests}


def _values(group: Group, metric: str) -> np.ndarray:
    values = [run.record.get(metric) for run in group.runs]
    for run, value in zip(group.runs, values, strict=True):
        if not isinstance(value, float) or not math.isfinite(value):
            raise GolfError(f"{run.path} has no {metric}; choose another --metric")
    return np.array(values, np.float64)


def _group_facts(group: Group, metric: str, nats: float) -> dict[str, Any]:
    values = _values(group, metric)
    return {
        "name": group.name,
        "runs": [{"path": str(r.path), "seed": r.seed, metric: r.record[metric]} for r in group.runs],
        "mean": float(values.mean()),
        "mean_nats": float(values.mean()) * nats,
        "deviation": float(values.std(ddof=1)) if len(values) > 1 else None,
        "notes": [*group.notes, *selected_seeds(group, metric)],
    }


def selected_seeds(group: Group, metric: str) -> list[str]:
    """A warning where the group leaves out other seeds of its recipe that lie in the same folders."""
    taken = {run.path.resolve() for run in group.runs}
    names = {run.record["recipe"] for run in group.runs}
    kinds = {(run.identity, str(conditions(run))) for run in group.runs}
    others: list[Run] = []
    for parent in sorted({path.parent for path in taken}):
        for record in find_runs(parent, depth=1):
            if record.parent.resolve() not in taken:
                try:
                    run = open_run(record) if read_record(RunFolder(record.parent)).get("recipe") in names else None
                    if run and (run.identity, str(conditions(run))) in kinds and isinstance(run.record[metric], float):
                        others.append(run)
                except (GolfError, KeyError, TypeError, AttributeError):
                    continue  # not a run to go by, and not one that was asked for
    if not others:
        return []
    total, best = len(others) + len(group.runs), min(float(v) for v in _values(group, metric))
    seeds = ", ".join(str(run.seed) for run in others[:8]) + (" ..." if len(others) > 8 else "")
    if all(best <= run.record[metric] for run in others):
        what = "the best" if len(group.runs) == 1 else f"{len(group.runs)}, the best among them,"
        return [f"WARNING: this is {what} of {total} seeds of the recipe; left out: seeds {seeds}. Report them all"]
    return [f"{len(others)} more seeds of the recipe are left out: {seeds}"]


def _test(baseline: Group | None, candidate: Group, result: dict[str, Any]) -> dict[str, Any]:
    metric, margin, alpha, power = (result[key] for key in ("metric", "margin_bpb", "alpha", "power"))
    values, confidence = _values(candidate, metric), 1 - alpha
    seeds: list[int] = []
    if baseline is None:
        improvements = result["against"] - values
        t = stats.one_sample(improvements, margin, confidence, "one-sample t")
    elif seeds := paired_seeds(baseline, candidate):
        old, new = ({r.seed: r.record[metric] for r in group.runs} for group in (baseline, candidate))
        improvements = np.array([old[seed] - new[seed] for seed in seeds])
        t = stats.one_sample(improvements, margin, confidence, "paired t")
    else:
        return _facts(candidate, result, *_unpaired(_values(baseline, metric), values, result))
    needed = stats.runs_needed(t.improvement - margin, t.deviation, alpha, power) if t.deviation else None
    return _facts(candidate, result, t, stats.sign_flip(improvements, margin), needed, len(improvements), seeds)


def _unpaired(
    old: np.ndarray, new: np.ndarray, result: dict[str, Any]
) -> tuple[stats.TTest, stats.Permutation, int | None, int]:
    margin, alpha = result["margin_bpb"], result["alpha"]
    t, needed = stats.welch(old, new, margin, 1 - alpha), None
    if t.p is not None:
        variances = (float(old.var(ddof=1)), float(new.var(ddof=1)))
        needed = stats.runs_needed_each(t.improvement - margin, variances, alpha, result["power"])
    return t, stats.exchange(old, new, margin), needed, min(len(old), len(new))


def paired_seeds(baseline: Group, candidate: Group) -> list[int]:
    """The seeds to pair by: those of the smaller group, if each occurs once and the other group has them all."""
    counts = [Counter(run.seed for run in group.runs) for group in (baseline, candidate)]
    smaller, larger = sorted(counts, key=len)
    if len(smaller) < 2 or max(*smaller.values(), *larger.values()) > 1 or not smaller.keys() <= larger.keys():
        return []
    return sorted(smaller)


def _facts(
    candidate: Group, result: dict[str, Any], t: stats.TTest, permutation: stats.Permutation, needed: int | None,
    have: int, seeds: list[int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    return {
        "candidate": candidate.name,
        "paired_seeds": seeds or [],
        "improvement": t.improvement,
        "improvement_nats": t.improvement * result["nats_per_bpb"],
        "t": asdict(t),
        "permutation": asdict(permutation),
        "runs": have,
        "runs_needed": needed,
        "runs_still_needed": None if needed is None else max(0, needed - have),
    }
