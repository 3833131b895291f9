"""`report.html`: one self-contained page a person reads. No scripts, no network, prints well."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

from paramgolf.files import atomic_write
from paramgolf.runner.folder import RunFolder
from paramgolf.runner.summary import byte_table_lines, score_rows, seconds_rows


def write_report(folder: RunFolder, record: dict[str, Any], title: str) -> None:
    """Write the page for a finished run."""
    from jinja2 import Environment, PackageLoader

    page = Environment(loader=PackageLoader("paramgolf.runner"), autoescape=True).get_template("run.html.j2")
    html = page.render(
        record=record,
        title=title,
        headline=_headline(record),
        coders=_coders(record),
        loss_svg=loss_svg(read_log(folder.log)),
        ledger=_ledger(record["ledger"], record["artifact_bytes"]),
        seconds=seconds_rows(record),
        causes=_causes(record),
    )
    atomic_write(folder.report, html.encode())


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a train.jsonl; a last line that a kill cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def loss_svg(rows: list[dict[str, Any]]) -> str:
    """Training loss against counted seconds, as inline SVG."""
    points = [(row["elapsed"], row["loss"]) for row in rows if "loss" in row]
    if not points:
        return "<p>No step was logged.</p>"
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text and ids do not change from run to run: the same record gives the same page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "paramgolf", "font.family": "sans-serif"}):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(*zip(*points, strict=True), color="#3465a4", linewidth=1.2)
        axes.set_xlabel("training seconds")
        axes.set_ylabel("training loss (nats per token)")
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
    best = record.get("val_bpb_sliding") or record["val_bpb"]
    ours = {"name": "model.golf", "bpb": best, "bytes": best * record["scored_bytes"] / 8, "ours": True}
    rows = [ours] + [{"name": name, **peer, "ours": False} for name, peer in record["peers"].items()]
    rows.sort(key=lambda row: row["bpb"])
    return [row | {"bpb": f"{row['bpb']:.4f}", "bytes": f"{row['bytes']:,.0f}"} for row in rows]


def _ledger(ledger: dict[str, int], total: int) -> list[dict[str, Any]]:
    rows = sorted(ledger.items(), key=lambda item: -item[1])
    return [
        {
            "name": name,
            "bytes": f"{size:,}",
            "share": f"{100 * size / total:.1f} %",
            "width": f"{18 * size / total:.2f}",
        }
        for name, size in rows
        if size
    ]


def _causes(record: dict[str, Any]) -> list[tuple[str, str]]:
    machine = record["environment"]
    rows = [(f"sha256 of {name}", value) for name, value in record["sha256"].items()]
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    return [*rows, ("machine", f"{machine['cpu']}, {machine['cpu_count']} cores, {gpus}"), ("torch", machine["torch"])]
