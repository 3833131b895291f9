"""`golf ablate`: each component of a recipe off in turn, several seeds, and what it was worth with an interval."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from paramgolf.data.cache import cache_root
from paramgolf.errors import GolfError
from paramgolf.files import atomic_write
from paramgolf.lab import stats
from paramgolf.lab.jobs import GOLF, Job, run_all
from paramgolf.lab.tuning import tuning_data
from paramgolf.recipe.load import from_table, resolve, to_table, to_toml
from paramgolf.recipe.sections import Recipe
from paramgolf.registry import close_match

# Component -> what it is set to when it is off. A component is in a recipe if any of its keys has another value.
OFF: dict[str, dict[str, Any]] = {
    "skips": {"model.skips": "none", "model.skip_gates": False},
    "skip_gates": {"model.skip_gates": False},
    "lanes": {"model.lanes_from": -1},
    "ln_scale": {"model.ln_scale": False},
    "logit_softcap": {"model.logit_softcap": 0.0},
    "partial_rope": {"model.rope_dims": 0},
    "rope_stretch": {"model.rope_ref_len": 0},
    "init": {"model.init": "default"},
    "matrix_optimizer": {"optim.matrix": "muon"},
    "nesterov": {"optim.nesterov": False},
    "weight_decay": {"optim.weight_decay": 0.0, "optim.embed_weight_decay": 0.0, "optim.scalar_weight_decay": 0.0},
    "grad_clip": {"optim.grad_clip": 0.0},
    "lr_warmup": {"schedule.lr_warmup_steps": 0},
    "warmdown": {"schedule.warmdown_iters": 0, "schedule.warmdown_frac": 0.0},
    "momentum_warmup": {"schedule.momentum_warmup_steps": 0, "schedule.momentum_warmup_frac": 0.0},
    "averaging": {"average.kind": "none"},
    "qat": {"quant.qat": ""},
    "post_qat": {"quant.post_qat": ""},
    "quantizer": {"quant.method": "rtn"},
    "fit": {"pack.fit": False},
    "stages": {"stages": []},
}


@dataclass(frozen=True)
class Variant:
    """The recipe without one component, or with one value of the user's."""

    name: str
    recipe: Recipe


def components(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Components that this recipe has, each with the keys that switch it off."""
    table = to_table(recipe)
    parts = table["model"]["parts"]
    found = {f"parts.{name}": {"model.parts": {k: v for k, v in parts.items() if k != name}} for name in parts}
    return found | {name: keys for name, keys in OFF.items() if any(_get(table, k) != v for k, v in keys.items())}


def variants(recipe: Recipe, only: list[str], own: list[str], base: Callable[[list[str]], Recipe]) -> list[Variant]:
    """What is to be tried: the components in `only` (all if empty), and each override in `own` by itself."""
    known = components(recipe)
    for name in only:
        if name not in known:
            raise GolfError(f"--only {name}: no such component in this recipe{close_match(name, known)}")
    made = []
    for name in only or ([] if own else list(known)):
        table = copy.deepcopy(to_table(recipe))
        for key, value in known[name].items():
            _set(table, key, value)
        made.append(Variant(f"no {name}", from_table(table)))
    made += [Variant(word, base([word])) for word in own]
    if not made:
        raise GolfError("this recipe has no component that could be switched off; name one as section.key=value")
    same = [v.name for v in made if to_table(v.recipe) == to_table(recipe)]
    if same:
        raise GolfError(f"{same[0]} changes nothing in this recipe; leave it out")
    return made


def _get(table: dict[str, Any], key: str) -> Any:
    node: Any = table
    for part in key.split("."):
        node = node[part]
    return node


def _set(table: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        table = table[part]
    table[last] = value


def ablate(
    name: str, overrides: list[str], *, own: list[str], only: list[str], seeds: int, out: Path, workers: int = 1,
    steps: int = 0, on: str = "split", objective: str = "val_bpb", confidence: float = 0.95,
    program: tuple[str, ...] = GOLF,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """Run the recipe and every variant with the same seeds; returns JSON-able facts. Finished runs are not repeated.

    Args:
        own: overrides that are variants of their own. overrides: overrides of the recipe itself.
        steps: train so many steps instead of the recipe's budget. on: "split" or "validation".
    """
    if seeds < 2:
        raise GolfError("--seeds: an interval needs at least two seeds")
    fixed = [*overrides, *(["budget.seconds=0", "budget.tokens=0", f"budget.steps={steps}"] if steps else [])]

    def base(words: list[str]) -> Recipe:
        return resolve(name, [*fixed, *words]).recipe

    recipe = base([])
    tried = [Variant("as it is", recipe), *variants(recipe, only, own, base)]
    numbers = [recipe.train.seed + i for i in range(seeds)]
    jobs = [replace(job, program=program) for job in _jobs(tried, numbers, out, on)]
    records = [outcome.record for outcome in run_all(jobs, workers, note)]
    by_variant = [records[i * seeds : (i + 1) * seeds] for i in range(len(tried))]
    values = [np.array([_number(r, objective) for r in found]) for found in by_variant]
    rows = []
    for variant, found, worse in zip(tried, by_variant, values, strict=True):
        test = stats.one_sample(worse - values[0], 0.0, confidence)
        rows.append({
            "variant": variant.name, "mean": float(worse.mean()), "values": worse.tolist(),
            "worse_by": float((worse - values[0]).mean()), "low": test.low, "high": test.high, "p": test.p,
            "bytes": fmean(r["total_bytes"] for r in found if r), "step_ms": fmean(r["step_ms"] for r in found if r),
        })  # fmt: skip
    for row, p in zip(rows, stats.holm([None, *(row["p"] for row in rows[1:])]), strict=True):
        row["p_holm"] = p
    return {
        "recipe": recipe.name, "objective": objective, "on": on, "seeds": numbers, "confidence": confidence,
        "rows": rows, "out": str(out),
    }  # fmt: skip


def _jobs(tried: list[Variant], seeds: list[int], out: Path, on: str) -> Iterator[Job]:
    """One recipe file and one run folder for each variant and seed."""
    for variant in tried:
        stem = "".join(c if c.isalnum() or c in "._-" else "-" for c in variant.name)
        data = str(tuning_data(variant.recipe.data, cache_root())) if on == "split" else ""
        path = out / f"{stem}.toml"
        atomic_write(path, to_toml(variant.recipe).encode())
        for seed in seeds:
            yield Job(str(path), (f"train.seed={seed}",), out / f"{stem}-seed{seed}", data)


def _number(record: dict[str, Any] | None, key: str) -> float:
    value = (record or {}).get(key)
    if not isinstance(value, int | float):
        raise GolfError(f"--objective {key}: the record of a run has no such number")
    return float(value)


def ablate_text(result: dict[str, Any]) -> str:
    """The table: positive = worse without the component, so the component helps."""
    from paramgolf.runner.summary import table_text

    percent = f"{100 * result['confidence']:g} %"
    header = ("variant", result["objective"], "worse by", f"{percent} interval", "p (Holm)", "bytes", "ms a step")
    rows = []
    for i, row in enumerate(result["rows"]):
        interval = "-" if row["low"] is None else f"{row['low']:+.4f} to {row['high']:+.4f}"
        p = "-" if row["p_holm"] is None else f"{row['p_holm']:.3g}"
        change = [f"{row['worse_by']:+.4f}", interval, p] if i else ["", "", ""]
        rows.append((row["variant"], f"{row['mean']:.4f}", *change, f"{row['bytes']:,.0f}", f"{row['step_ms']:.1f}"))
    where = "a split of the training text" if result["on"] == "split" else "the validation text"
    title = f"{result['recipe']} on {where}, seeds {', '.join(map(str, result['seeds']))}"
    note = "p: one-sided, paired by seed, 'worse without it'; Holm's correction for the number of variants"
    return f"{table_text(rows, header=header, title=title)}\n{note}"
