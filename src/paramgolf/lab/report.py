"""`golf report`: one page about many runs, self-contained, readable without a server, fit to print."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from paramgolf.errors import GolfError
from paramgolf.files import atomic_write
from paramgolf.lab import stats
from paramgolf.lab.report_data import RunFacts, collect
from paramgolf.lab.report_study import study_section
from paramgolf.lab.svg import COLOURS, Chart, padded, without_outliers

MOST_BARS = 40
CONFIDENCE = 0.95
_COLUMNS = (
    ("run", True), ("recipe", True), ("seed", False), ("BPB", False), ("side by side", False), ("before quant.", False),
    ("bytes counted", False), ("of cap", False), ("parameters", False), ("steps", False), ("M tokens", False),
    ("ms a step", False), ("seconds", False), ("finished", True),
)  # fmt: skip


def write_report(arguments: list[str], out: Path) -> dict[str, Any]:
    """Write the page about these runs, folders, patterns and sweeps; returns what is on it, JSON-able."""
    runs, studies, problems = collect(arguments)
    if not runs:
        reasons = f": {problems[0]}" if problems else ""
        raise GolfError(f"none of these runs can be shown{reasons}")
    page = render(runs, [study_section(folder) for folder in studies], problems)
    data = page.encode(errors="backslashreplace")  # names of folders need not be UTF-8
    atomic_write(out, data)
    return {
        "report": str(out), "runs": len(runs), "studies": len(studies), "bytes": len(data),
        "left_out": problems,
    }  # fmt: skip


def render(runs: list[RunFacts], studies: list[dict[str, Any]], problems: list[str]) -> str:
    """The page as text. `runs` best first."""
    from jinja2 import Environment, PackageLoader

    groups = _groups(runs)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(groups)}
    of_run = {run.path: name for name, members in groups.items() for run in members}
    shown, bytes_svg, bytes_key = _bytes(runs)
    sections = [("runs", "runs"), ("loss", "loss"), ("bytes", "bytes"), ("frontier", "frontier"), ("seeds", "seeds")]
    sections += [(f"study-{i}", "sweep") for i, _ in enumerate(studies, 1)] + [("seals", "seals")]
    page = Environment(loader=PackageLoader("paramgolf.lab"), autoescape=True).get_template("report.html.j2")
    return page.render(
        title="Runs" if len(runs) > 1 else runs[0].name,
        subtitle=_subtitle(runs, groups),
        sections=sections,
        problems=problems,
        columns=_COLUMNS,
        rows=[_row(run) for run in runs],
        curves=_curves(runs, of_run, colours),
        key=[(colours[name], f"{name} ({len(members)})") for name, members in list(groups.items())[:20]],
        bytes_svg=bytes_svg,
        bytes_key=bytes_key,
        bytes_note=f"The {shown} best of {len(runs)} runs." if shown < len(runs) else "",
        frontier_svg=_frontier(runs, of_run, colours),
        seeds_svg=_seeds(groups, colours),
        interval=f"{100 * CONFIDENCE:g} %",
        studies=studies,
        seals=[_seal(run) for run in runs],
    )


def _groups(runs: list[RunFacts]) -> dict[str, list[RunFacts]]:
    """Runs by recipe without the seed, best mean first. Recipes of one name are told apart by settings that differ."""
    by_identity: dict[str, list[RunFacts]] = {}
    for run in runs:
        by_identity.setdefault(run.identity, []).append(run)
    ordered = sorted(by_identity.values(), key=lambda members: sum(r.bpb for r in members) / len(members))
    several = [members[0] for members in ordered if len(members) > 1]
    named: dict[str, list[RunFacts]] = {}
    for members in ordered:
        own = members[0].name if len(members) == 1 else _told_apart(members[0], several)
        name, count = own, 1
        while name in named:
            count += 1
            name = f"{own} {count}"
        named[name] = members
    return named


def _told_apart(run: RunFacts, others: list[RunFacts]) -> str:
    """The recipe's name, with up to two settings in which it differs from others of that name."""
    name = str(run.record["recipe"])
    alike = [other for other in others if other.record["recipe"] == name]
    keys = [key for key, value in run.settings.items() if any(o.settings.get(key) != value for o in alike)]
    return ", ".join([name, *(f"{key.rpartition('.')[2]}={run.settings[key][:16]}" for key in keys[:2])])


def _subtitle(runs: list[RunFacts], groups: dict[str, list[RunFacts]]) -> str:
    best = runs[0]
    several = f"{len(runs)} runs of {len(groups)} recipes; the best: " if len(runs) > 1 else ""
    return f"{several}{best.name} with {best.bpb:.4f} BPB in {int(best.record['total_bytes']):,} bytes"


def _row(run: RunFacts) -> list[tuple[Any, str, str]]:
    """(sort key, text, class) of each column."""
    r = run.record
    cap, tokens = r.get("cap_bytes"), r.get("train_tokens")
    share = 100 * r["total_bytes"] / cap if cap else None
    return [
        (run.name, run.name, "l"),
        (r["recipe"], str(r["recipe"]), "l"),
        _number(r.get("seed"), "d"),
        _number(run.bpb, ".4f"),
        _number(r["val_bpb"], ".4f"),
        _number(r.get("val_bpb_float"), ".4f"),
        _number(r["total_bytes"], ",d"),
        _number(share, ".1f", " %"),
        _number(r.get("params"), ",d"),
        _number(r.get("steps"), ",d"),
        _number(tokens / 1e6 if tokens is not None else None, ".2f"),
        _number(r.get("step_ms"), ".1f"),
        _number(r.get("seconds", {}).get("strict"), ".1f"),
        (run.finished, run.finished, "l"),
    ]


def _number(value: Any, form: str, unit: str = "") -> tuple[Any, str, str]:
    return ("", "-", "") if value is None else (value, f"{value:{form}}{unit}", "")


def _curves(runs: list[RunFacts], of_run: dict[str, str], colours: dict[str, str]) -> list[dict[str, str]]:
    drawn = [run for run in reversed(runs) if run.curve]  # the best on top
    if not drawn:
        return []
    losses = sorted(point[3] for run in drawn for point in run.curve)
    top = losses[int(0.985 * (len(losses) - 1))]  # the first steps would flatten everything else
    low, high = padded([losses[0], max(top, losses[0] * 1.02)])
    made = []
    for index, name, title in ((2, "time", "seconds"), (0, "steps", "optimizer steps"), (1, "tokens", "tokens")):
        most = max(run.curve[-1][index] for run in drawn) or 1.0
        chart = Chart((0.0, most), (low, high), title, "training loss, nats a token")
        for run in drawn:
            points = [(point[index], point[3]) for point in run.curve]
            chart.line(points, colours[of_run[run.path]], f"{run.name}: {run.bpb:.4f} BPB")
        made.append({"name": name, "svg": chart.render(f"training loss against {title}")})
    return made


def _bytes(runs: list[RunFacts]) -> tuple[int, str, list[tuple[str, str]]]:
    """(how many runs, stacked bars, key) of the size ledgers of the best runs."""
    shown = [run for run in runs if run.record.get("ledger")][:MOST_BARS]
    if not shown:
        return 0, "", []
    totals: dict[str, int] = {}
    for run in shown:
        for name, size in run.record["ledger"].items():
            totals[name] = totals.get(name, 0) + int(size)
    names = [name for name in sorted(totals, key=lambda n: -totals[n]) if totals[name]]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    most = max(sum(run.record["ledger"].values()) for run in shown)
    chart = Chart(
        (0.0, float(most)), (len(shown) - 0.4, -0.6), "bytes of model.golf", "", left=190,
        height=70 + 18 * len(shown), y_names=[_cut(run.name) for run in shown],
    )  # fmt: skip
    for i, run in enumerate(shown):
        at = 0.0
        for name in names:
            size = run.record["ledger"].get(name, 0)
            chart.rect((at, at + size), (i + 0.35, i - 0.35), colours[name], f"{run.name}, {name}: {size:,} bytes")
            at += size
    return len(shown), chart.render("bytes by group"), [(colours[name], name) for name in names]


def _cut(name: str, most: int = 26) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _frontier(runs: list[RunFacts], of_run: dict[str, str], colours: dict[str, str]) -> str:
    places = [(float(run.record["total_bytes"]), run.bpb) for run in runs]
    frame = padded(without_outliers(p[1] for p in places))
    chart = Chart(padded(p[0] for p in places), frame, "bytes counted", "bits per byte")
    best, edge = math.inf, []
    for size, bpb in sorted(places):
        if bpb < best:
            best = bpb
            edge.append((size, bpb))
    chart.line(edge, "#5f6b73", "no smaller run is better", dashed=True)
    for run, (size, bpb) in zip(reversed(runs), reversed(places), strict=True):
        chart.point(size, bpb, colours[of_run[run.path]], f"{run.name}: {bpb:.4f} BPB, {size:,.0f} bytes")
    return chart.render("bits per byte against bytes")


def _seeds(groups: dict[str, list[RunFacts]], colours: dict[str, str]) -> str:
    several = sorted(groups.items(), key=lambda item: len(item[1]) < 2)[:MOST_BARS]
    several = [item for item in groups.items() if item in several]
    intervals = {name: _interval([run.bpb for run in members]) for name, members in several}
    # An interval of two runs may be a hundred times as wide as everything else: it is cut at the frame.
    low, high = padded(without_outliers(run.bpb for _, members in several for run in members))
    room = 0.75 * (high - low)
    ends = [end for pair in intervals.values() if pair for end in pair] or [low, high]
    frame = (max(min(low, *ends), low - room), min(max(high, *ends), high + room))
    frame = padded(frame, 0.03)
    chart = Chart(
        frame, (len(several) - 0.4, -0.6), "bits per byte", "", left=190, height=70 + 24 * len(several),
        y_names=[_cut(name) for name, _ in several],
    )  # fmt: skip
    for i, (name, members) in enumerate(several):
        if pair := intervals[name]:
            low, high = max(pair[0], frame[0]), min(pair[1], frame[1])
            mean = sum(run.bpb for run in members) / len(members)
            words = f"{name}: mean {mean:.4f}, {pair[0]:.4f} to {pair[1]:.4f}, {len(members)} runs"
            chart.rect((low, high), (i + 0.12, i - 0.12), f"{colours[name]}55", words)
            half = (frame[1] - frame[0]) / 600
            chart.rect((mean - half, mean + half), (i + 0.28, i - 0.28), colours[name], words)
        for run in members:
            chart.point(run.bpb, float(i), colours[name], f"{run.name}: {run.bpb:.4f}", hollow=True)
    return chart.render("scores of the seeds of each recipe")


def _interval(values: list[float]) -> tuple[float, float] | None:
    """Of the mean; None for a single run or equal ones."""
    if len(values) < 2:
        return None
    test = stats.one_sample(np.array(values), 0.0, CONFIDENCE)
    return None if test.low is None or test.high is None else (test.low, test.high)


def _seal(run: RunFacts) -> dict[str, Any]:
    hashes = run.record.get("sha256")
    hashes = hashes if isinstance(hashes, dict) else {}
    machine = run.record.get("environment", {})
    where = ", ".join(machine.get("gpus") or []) or machine.get("cpu", "-")
    return {
        "name": run.name, "state": run.seal, "ok": run.seal == "sealed",
        "seal": str(run.record.get("seal_sha256", "-"))[:16], "artifact": str(hashes.get("artifact", "-"))[:16],
        "source": str(hashes.get("source", "-"))[:12], "machine": where,
    }  # fmt: skip


def report_text(result: dict[str, Any]) -> str:
    lines = [f"left out: {problem}" for problem in result["left_out"]]
    return "\n".join([*lines, f"{result['report']}: {result['runs']} runs, {result['bytes']:,} bytes"])
