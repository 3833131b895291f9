"""`report.html`: one self-contained page a person reads. No scripts, no network, prints well."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paramgolf.files import atomic_write
from paramgolf.runner.folder import RunFolder
from paramgolf.runner.form import LogPoint, log_point, read_frontier
from paramgolf.runner.summary import byte_table_lines, proof_coders, score_rows, seconds_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write_report(folder: RunFolder, record: dict[str, Any], title: str) -> None:
    """Write the page for a finished run."""
    from jinja2 import Environment, PackageLoader

    page = Environment(loader=PackageLoader("paramgolf.runner"), autoescape=True).get_template("run.html.j2")
    html = page.render(
        record=record,
        title=title,
        headline=_headline(record),
        coders=_coders(record),
        proof=record.get("proof"),
        proof_coders=proof_coders(record["proof"]) if record.get("proof") else [],
        loss_svg=loss_svg(read_log(folder.log)),
        ledger=_ledger(record),
        grids=_grids(record),
        frontier_svg=frontier_svg(read_frontier(folder.frontier)),
        kilobyte=record.get("fit", {}).get("nats_per_kilobyte", 0.0),
        seconds=seconds_rows(record),
        causes=_causes(record),
    )
    atomic_write(folder.report, html.encode(errors="backslashreplace"))


def read_log(path: Path) -> list[LogPoint]:
    """The lines of a train.jsonl; one that a kill cut off is left out."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [point for point in map(log_point, lines) if point is not None]


def loss_svg(points: Sequence[LogPoint]) -> str:
    """Training loss against counted seconds, as inline SVG."""
    if not points:
        return "<p>No step was logged.</p>"

    def draw(axes: Axes) -> None:
        axes.plot([point.elapsed for point in points], [point.loss for point in points], color="#3465a4", linewidth=1.2)
        axes.set_xlabel("training seconds")
        axes.set_ylabel("training loss (nats per token)")

    return _svg(draw)


def frontier_svg(frontier: dict[str, Any]) -> str:
    """Bytes of the file against bits per byte, measured and predicted, as inline SVG; "" without a frontier."""
    if not frontier:
        return ""
    points, floats = frontier["points"], frontier["float_bpb"]
    sizes = [point["total_bytes"] / 1000 for point in points]

    def draw(axes: Axes) -> None:
        axes.plot(sizes, [floats + p["measured_bpb"] for p in points], "o-", color="#3465a4", label="measured")
        axes.plot(sizes, [floats + p["predicted_bpb"] for p in points], ".--", color="#c17d11", label="predicted")
        axes.axhline(floats, color="#566173", linewidth=0.8, label="before quantisation")
        axes.axvline(frontier["chosen_bytes"] / 1000, color="#73a946", linewidth=0.8, label="the cap asked for")
        axes.set_xlabel("kilobytes of the file")
        axes.set_ylabel("bits per byte (training text)")
        axes.legend(frameon=False)

    return _svg(draw)


def _svg(draw: Callable[[Axes], None]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text and ids do not change from run to run: the same record gives the same page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "paramgolf", "font.family": "sans-serif"}):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)


def _headline(record: dict[str, Any]) -> list[tuple[str, str]]:
    ours = len(score_rows(record)) - len(record["peers"])
    rows = [(f"{name}: bits per byte", f"{value:.4f}") for name, value in score_rows(record)[:ours]]
    cap = record["cap_bytes"]
    rows += [
        ("size of model.golf", f"{record['artifact_bytes']:,} bytes"),
        ("counted against the cap", f"{record['total_bytes']:,} bytes" + (f" of {cap:,}" if cap else "")),
        ("parameters", f"{record['params']:,}"),
        (
            "training",
            f"{record['steps']:,} steps, {record['train_tokens']:,} tokens, {record['step_ms']:.1f} ms a step",
        ),
        ("scored", f"{record['scored_tokens']:,} tokens, {record['scored_bytes']:,} bytes"),
        *(("byte table of the tokenizer", line) for line in byte_table_lines(record)[:1]),
        ("peak memory", f"{record['peak_memory_bytes'] / 2**20:,.0f} MiB"),
    ]
    return rows


def _coders(record: dict[str, Any]) -> list[dict[str, Any]]:
    best = score_rows(record)[0][1]  # the best comes first
    ours = {"name": "model.golf", "bpb": best, "bytes": best * record["scored_bytes"] / 8, "ours": True}
    rows = [ours] + [{"name": name, **peer, "ours": False} for name, peer in record["peers"].items()]
    rows.sort(key=lambda row: row["bpb"])
    return [row | {"bpb": f"{row['bpb']:.4f}", "bytes": f"{row['bytes']:,.0f}"} for row in rows]


def _ledger(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Every byte of the file by group, largest first, their sum, and the code that a challenge counts beside them."""
    total = record["artifact_bytes"]
    rows = [(name, size) for name, size in sorted(record["ledger"].items(), key=lambda item: -item[1]) if size]
    rows.append(("the file", sum(record["ledger"].values())))
    if record.get("code_bytes"):
        rows.append(("code, beside the file", record["code_bytes"]))
    return [
        {
            "name": name,
            "bytes": f"{size:,}",
            "share": f"{100 * size / total:.1f} %",
            "width": f"{18 * min(size, total) / total:.2f}",
        }
        for name, size in rows
    ]


def _grids(record: dict[str, Any]) -> list[dict[str, str]]:
    """What the solver chose for each group of tensors; empty without it."""
    groups = record.get("fit", {}).get("groups", {})
    return [
        {
            "name": name,
            "bits": str(group.get("bits", "")),
            "step": f"{group.get('step', 0.0):.3f}",
            "bytes": f"{group['bytes']:,}",
            "loss": f"{group['loss']:.5f}",
        }
        for name, group in groups.items()
    ]


def _causes(record: dict[str, Any]) -> list[tuple[str, str]]:
    machine = record["environment"]
    rows = [(f"sha256 of {name}", value) for name, value in record["sha256"].items()]
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    return [*rows, ("machine", f"{machine['cpu']}, {machine['cpu_count']} cores, {gpus}"), ("torch", machine["torch"])]
