"""The part of a report that is about a sweep: how it went, what mattered, and the score along each setting."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from paramgolf.errors import GolfError
from paramgolf.lab.storage import JOURNAL, open_storage, optuna_module, read_card, readable
from paramgolf.lab.study import feasible, importance
from paramgolf.lab.svg import Chart, padded

_GOOD, _OTHER, _LINE = "#1f77b4", "#b9c2c8", "#1d2429"


def study_section(folder: Path) -> dict[str, Any]:
    """Charts and words about the study of a sweep's folder. GolfError if its storage cannot be read."""
    card = read_card(folder)
    optuna = optuna_module()
    storage = "" if card["storage"] == JOURNAL else card["storage"]
    with readable(storage or str(folder)):
        if not storage and not (folder / JOURNAL).is_file():
            raise GolfError(f"{folder / JOURNAL} is gone; a report of the sweep needs it")
        study = optuna.load_study(study_name=card["study"], storage=open_storage(storage, folder))
        trials = [t for t in study.get_trials(deepcopy=False) if not t.user_attrs.get("given_back")]
        matters = importance(study)
    return _section(card, trials, matters)


def _section(card: dict[str, Any], trials: list[Any], matters: dict[str, float]) -> dict[str, Any]:
    definition = card["definition"]
    complete = [t for t in trials if t.state.name == "COMPLETE"]
    good = [t for t in complete if feasible(t)]
    best = min(good, key=lambda t: t.value, default=None)
    pruned = sum(t.state.name == "PRUNED" for t in trials)
    judged = "a split of the training text" if definition.get("on") == "split" else "the validation text"
    text = f"{len(complete)} trials finished, {pruned} were stopped early; judged by {definition['objective']} on"
    text += f" {judged}."
    if best is not None:
        values = ", ".join(f"{k} = {_shown(v)}" for k, v in best.params.items())
        text += f" The best, trial {best.number}: {best.value:.4f} with {values}."
    keys = list(matters) or [axis["key"] for axis in definition["over"]]
    slices = [_slice(key, complete, definition) for key in keys] if complete else []
    return {
        "name": card["study"], "text": text, "history": _history(complete, definition["objective"]),
        "importance": _importance(matters), "slices": slices,
    }  # fmt: skip


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _history(complete: list[Any], objective: str) -> str:
    """Every finished trial and the best so far."""
    if not complete:
        return ""
    frame = _range([t.value for t in complete])
    chart = Chart((-0.5, max(t.number for t in complete) + 0.5), frame, "trial", objective, height=240)
    best = math.inf
    line: list[tuple[float, float]] = []
    for trial in sorted(complete, key=lambda t: t.number):
        if feasible(trial) and trial.value < best:
            line += [(float(trial.number), best)] if line else []
            best = float(trial.value)
            line.append((float(trial.number), best))
    if line:
        line.append((max(t.number for t in complete) + 0.5, best))
        chart.line(line, _LINE, "the best so far")
    _points(chart, [(float(t.number), t) for t in complete], frame)
    return chart.render("scores of the trials in order")


def _range(values: list[float]) -> tuple[float, float]:
    """Of the better nine tenths: one wild trial must not flatten the rest."""
    ordered = sorted(values)
    return padded(ordered[: max(2, math.ceil(0.9 * len(ordered)))], 0.1)


def _points(chart: Chart, places: list[tuple[float, Any]], frame: tuple[float, float]) -> None:
    for x, trial in places:
        values = ", ".join(f"{k} = {_shown(v)}" for k, v in trial.params.items())
        words = f"trial {trial.number}: {trial.value:.4f}, {values}" + ("" if feasible(trial) else "; over a limit")
        inside = min(max(trial.value, frame[0]), frame[1])
        chart.point(x, inside, _GOOD if feasible(trial) else _OTHER, words, hollow=trial.value != inside)


def _slice(key: str, complete: list[Any], definition: dict[str, Any]) -> str:
    """The score along one setting; choices that are no numbers stand side by side."""
    axis: dict[str, Any] = next((a for a in definition["over"] if a["key"] == key), {})
    having = [t for t in complete if key in t.params]
    values = [t.params[key] for t in having]
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    frame = _range([t.value for t in having])
    if numbers:
        log = bool(axis.get("log")) and min(values) > 0
        low, high = (min(values) / 1.1, max(values) * 1.1) if log else padded(float(v) for v in values)
        chart = Chart((low, high), frame, key, definition["objective"], width=380, height=250, log_x=log)
        _points(chart, [(float(t.params[key]), t) for t in having], frame)
        return chart.render(f"score along {key}")
    names = sorted({str(v) for v in values})
    words = f"{key}: {', '.join(f'{i} = {name}' for i, name in enumerate(names))}"
    chart = Chart((-0.5, len(names) - 0.5), frame, words, definition["objective"], width=380, height=250)
    _points(chart, [(float(names.index(str(t.params[key]))), t) for t in having], frame)
    return chart.render(f"score along {key}")


def _importance(matters: dict[str, float]) -> str:
    if not matters:
        return ""
    names = list(matters)
    chart = Chart(
        (0.0, max(1.0, *matters.values())), (len(names) - 0.4, -0.6), "importance", "", left=230,
        height=64 + 26 * len(names), y_names=names,
    )  # fmt: skip
    for i, (name, value) in enumerate(matters.items()):
        chart.rect((0.0, value), (i + 0.3, i - 0.3), _GOOD, f"{name}: {value:.2f}")
        chart.text(value, float(i), f"{value:.2f}")
    return chart.render("importance of the settings")
