"""What a study holds: its trials, the best of them, what mattered; and how `golf sweep` prints it."""

from __future__ import annotations

import math
from typing import Any

from paramgolf.lab.storage import optuna_module


def given_back(trial: Any) -> bool:
    return bool(trial.user_attrs.get("given_back"))


def feasible(trial: Any) -> bool:
    """Whether a finished trial kept the limits on bytes and seconds."""
    return all(value <= 0 for value in trial.user_attrs.get("over", {}).values())


def summary(study: Any, facts: dict[str, str]) -> dict[str, Any]:
    """JSON-able: `facts`, the best trial within the limits, all trials, and how much each key matters."""
    trials = [t for t in study.get_trials(deepcopy=False) if not given_back(t)]
    rows = [
        {
            "number": t.number, "state": t.state.name.lower(), "value": t.value, "params": t.params,
            "feasible": feasible(t), "run": t.user_attrs.get("run"), "results": t.user_attrs.get("results", {}),
            "why": t.user_attrs.get("why", ""),
        }
        for t in trials if t.state.is_finished()
    ]  # fmt: skip
    good = [row for row in rows if row["state"] == "complete" and row["feasible"]]
    best = min(good, key=lambda row: row["value"], default=None)
    return {**facts, "best": best, "trials": rows, "importance": importance(study)}


def importance(study: Any) -> dict[str, float]:
    """How much of the difference between good and other trials each key explains (PED-ANOVA); {} for few trials."""
    optuna = optuna_module()
    complete = [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
    if len(complete) < 6:
        return {}
    try:
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (ValueError, RuntimeError):  # a space that changed, or values that are all equal
        return {}
    return {key: float(value) for key, value in found.items() if math.isfinite(value)}


def short(params: dict[str, Any]) -> str:
    return "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in params.items())


def sweep_text(result: dict[str, Any]) -> str:
    """The best trials and what mattered, as tables."""
    from paramgolf.runner.summary import table_text

    complete = sorted((r for r in result["trials"] if r["state"] == "complete"), key=lambda r: r["value"])
    pruned = sum(r["state"] == "pruned" for r in result["trials"])
    keys = list(complete[0]["params"]) if complete else []
    shown_rows = [
        (
            str(r["number"]), f"{r['value']:.5f}", f"{r['results'].get('total_bytes', 0):,}",
            "" if r["feasible"] else "over a limit",
            *(f"{r['params'][k]:.4g}" if isinstance(r["params"][k], float) else str(r["params"][k]) for k in keys),
        )
        for r in complete[:10]
    ]  # fmt: skip
    head = f"{result['study']}: {len(complete)} trials finished, {pruned} pruned, objective {result['objective']}"
    head += " on a split of the training text" if result["on"] == "split" else " on the validation text"
    parts = [table_text(shown_rows, header=("trial", result["objective"], "bytes", "", *keys), title=head)]
    if result["importance"]:
        rows = [(key, f"{value:.2f}") for key, value in result["importance"].items()]
        parts.append(table_text(rows, title="importance (PED-ANOVA, of 1)"))
    best = result["best"]
    parts.append(f"best: trial {best['number']}, {best['run']}" if best else "no trial ended within the limits")
    return "\n\n".join(parts)
