"""`golf compare --until-significant`: further seeds, a pair at a time, until the answer is clear or enough were run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from paramgolf.errors import GolfError
from paramgolf.lab.compare import ALPHA, CHALLENGE_MARGIN, Group, compare, open_run
from paramgolf.lab.jobs import GOLF, Job, run_all
from paramgolf.lab.sequential import MOST, look


def until_significant(
    groups: list[Group], *, against: float | None = None, metric: str = "val_bpb",
    margin_nats: float = CHALLENGE_MARGIN, alpha: float = ALPHA, power: float = 0.8, allow: list[str] | None = None,
    max_seeds: int, workers: int = 1, program: tuple[str, ...] = GOLF, note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """Run further seeds of a candidate (and of the baseline, in pairs) until the sequential test says "better" or
    each has `max_seeds`. Returns what `compare` returns, with `sequential` beside it.

    Raises GolfError unless there is one candidate, each group is one recipe, and each seed occurs once in a group.
    """
    if len(groups) != (1 if against is not None else 2):
        raise GolfError("--until-significant compares one candidate with one baseline, or one group with --against")
    if not 2 <= max_seeds <= MOST:
        raise GolfError(f"--max-seeds {max_seeds}: 2 to {MOST} seeds")
    looks: list[dict[str, Any]] = []
    while True:
        _check(groups)
        result = compare(
            groups, against=against, metric=metric, margin_nats=margin_nats, alpha=alpha, power=power, allow=allow
        )
        improvements = _improvements(groups, against, metric)
        if len(improvements) > max_seeds:
            raise GolfError(f"there are {len(improvements)} seeds already; --max-seeds must be at least that")
        seen = look(improvements, result["margin_bpb"], max_seeds, alpha) if len(improvements) > 1 else None
        if seen is not None:
            looks.append(asdict(seen))
            reached = "-" if seen.statistic is None else f"{seen.statistic:.2f}"
            note(f"{seen.n} of at most {max_seeds} seeds: t = {reached}, needed {seen.boundary:.2f}")
        if seen is not None and (seen.better or seen.n == max_seeds):
            return result | {"sequential": {"max_seeds": max_seeds, "looks": looks, "better_by_margin": seen.better}}
        groups = _with_more(groups, workers, program, note)


def _check(groups: list[Group]) -> None:
    for group in groups:
        seeds = [run.seed for run in group.runs]
        if len({run.identity for run in group.runs}) > 1 or len(set(seeds)) < len(seeds):
            raise GolfError(f"{group.name}: --until-significant needs runs of one recipe, each seed once")


def _improvements(groups: list[Group], against: float | None, metric: str) -> np.ndarray:
    """Of the seeds that both groups have, or of all against a number; float64 (n,)."""
    scores = [{run.seed: float(run.record[metric]) for run in group.runs} for group in groups]
    if against is not None:
        return np.array([against - bpb for bpb in scores[0].values()])
    return np.array([scores[0][seed] - scores[1][seed] for seed in sorted(scores[0].keys() & scores[1].keys())])


def _with_more(groups: list[Group], workers: int, program: tuple[str, ...], note: Callable[[str], None]) -> list[Group]:
    """The groups with one more seed that all of them have: partners of unpaired runs first, then a new seed."""
    seeds = [{run.seed for run in group.runs} for group in groups]
    everyone = {seed for own in seeds for seed in own}
    unpaired = sorted(seed for seed in everyone if not all(seed in own for own in seeds))
    seed = unpaired[0] if unpaired else max(everyone) + 1
    missing = [i for i, own in enumerate(seeds) if seed not in own]
    jobs = []
    for i in missing:
        first = groups[i].runs[0].path
        folder = first.with_name(f"{first.name}-seed{seed}")
        jobs.append(Job(str(first / "recipe.toml"), (f"train.seed={seed}",), folder, "", program))
    run_all(jobs, workers, note)
    grown = list(groups)
    for i, job in zip(missing, jobs, strict=True):
        grown[i] = replace(groups[i], runs=[*groups[i].runs, open_run(job.folder)])
    return grown
