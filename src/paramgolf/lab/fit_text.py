"""What `golf fit` writes: the recipe, and the tables that say why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tomli_w

from paramgolf.files import user_path
from paramgolf.lab.choice import Choice
from paramgolf.lab.sizing import Rates
from paramgolf.recipe.load import SECTIONS, to_table
from paramgolf.recipe.sections import Recipe
from paramgolf.runner.summary import table_text

_NAMES = {"vocab": "vocabulary", "hidden": "MLP", "seq_len": "row", "batch": "batch"}


def recipe_toml(choice: Choice, base: Recipe, rates: Rates, data: str) -> str:
    """The recipe as a file: what differs from its parent, and why it was chosen."""
    best, budget = choice.best, choice.recipe.budget
    head = {
        "extends": base.name,
        "title": f"Fitted to {budget.bytes:,} bytes and {budget.seconds:g} seconds",
    }
    lines = [
        tomli_w.dumps(head),
        f"# By `golf fit`, of {choice.considered:,} shapes: {best.weights:,} weights and {best.steps:,} steps of",
        f"# {1e3 * best.step_seconds:.0f} ms here; {best.bytes:,} bytes and {best.loss:.3f} bits per byte of web text "
        "expected.",
        f"# Measured on {rates.how or rates.device}.",
        *_sections(to_table(choice.recipe), to_table(base), data),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _sections(table: dict[str, Any], parent: dict[str, Any], data: str) -> Iterator[str]:
    for name in SECTIONS:
        if name == "stages":
            continue
        own = _changed(table[name], parent[name])
        if name == "data" and data:
            own = {"train": _absolute(data)} | own
        grids = {grid: _changed(values, parent[name]["grids"][grid]) for grid, values in own.get("grids", {}).items()}
        if grids:
            own["grids"] = {grid: values for grid, values in grids.items() if values}
        if own:
            yield tomli_w.dumps({name: own})


def _changed(values: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value != before[key]}


def _absolute(data: str) -> str:
    """Where the text lies, wherever the recipe is run from; a glob as it is, from the root."""
    return str(user_path(data).absolute())


def fit_text(result: dict[str, Any]) -> str:
    """Why: the choice and its neighbours, the parts of the expected loss, this machine."""
    best, budget = result["choice"], result["budget"]
    header = ("", "vocabulary", "layers", "width", "MLP", "row", "batch", "grids", "loss", "bytes", "weights", "steps")
    rows = [("chosen", *_row(best))]
    for found in result["alternatives"]:
        knob, value = found["knob"], found["shape"][found["knob"]]
        rows.append((f"{_NAMES.get(knob, knob)} {value}", *_row(found, best)))
    title = (
        f"{budget['bytes']:,} bytes and {budget['seconds']:g} s with {result['text']['bytes'] / 1e6:,.1f} MB of text: "
        f"the best of {result['considered']:,} shapes, and the best with one knob set otherwise"
    )
    blocks = [table_text(rows, header=header, title=title), _notes(result)]
    if result["recipe"]:
        blocks.append(f"recipe   {result['recipe']}")
    elif not result["record"]:
        blocks.append(result["toml"].rstrip())
    return "\n\n".join(blocks)


def _row(found: dict[str, Any], best: dict[str, Any] | None = None) -> tuple[str, ...]:
    shape = found["shape"]
    loss = f"{found['loss']:.4f}" if best is None else f"{found['loss'] - best['loss']:+.4f}"
    return (
        *(f"{shape[key]}" for key in ("vocab", "layers", "dim", "hidden", "seq_len", "batch")),
        f"x{found['coarseness']:.2f}", loss, f"{found['bytes']:,}", f"{found['weights']:,}", f"{found['steps']:,}",
    )  # fmt: skip


def _notes(result: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {value:.3f}" for name, value in result["expected_loss"].items())
    machine, best = result["machine"], result["choice"]
    error = f", fitted to its runs within {result['rule_error']:g}" if result["rule_error"] else ""
    lines = [
        f"loss     bits per byte of web text by the rule{error}: {parts}",
        "grids    steps over pocket's: what fills the cap, by the forecast",
        f"time     {1e3 * best['step_seconds']:.1f} ms a step; {machine['how']}; rates within "
        f"{100 * machine['error']:.0f} % of what was timed",
    ]
    if result["beyond"]:
        lines.append(f"note     the rule has no runs of its own as far out in: {', '.join(result['beyond'])}")
    return "\n".join(lines)


def fitted_text(result: dict[str, Any]) -> str:
    """After the run: what was expected and what came."""
    record, best = result["record"], result["choice"]
    rows = [
        ("bytes", f"{best['bytes']:,}", f"{record['total_bytes']:,}"),
        ("steps", f"{best['steps']:,}", f"{record['steps']:,}"),
        ("ms a step", f"{1e3 * best['step_seconds']:.1f}", f"{record['step_ms']:.1f}"),
        ("bits per byte (expected: of web text)", f"{best['loss']:.4f}", f"{record['val_bpb']:.4f}"),
    ]
    return table_text(rows, header=("", "expected", "came"), title=f"{result['recipe']} as it ran in {result['run']}")
