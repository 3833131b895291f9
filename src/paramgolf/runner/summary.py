"""What the commands print: plain tables of results, made with rich so that columns line up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def table_text(rows: Iterable[Sequence[str]], header: Sequence[str] = (), title: str = "") -> str:
    """A borderless table: the first column left, the others right."""
    table = Table(box=None, show_header=bool(header), pad_edge=False)
    rows = [list(row) for row in rows]
    for i in range(max((len(row) for row in rows), default=len(header))):
        table.add_column(header[i] if i < len(header) else "", justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(width=200, no_color=True, highlight=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().rstrip("\n").splitlines()]
    return "\n".join([title, *(f"  {line}" for line in lines)] if title else lines)


def summary_text(record: dict[str, Any]) -> str:
    """The table at the end of `golf run`: size, score, peers, time, paths."""
    cap = record["cap_bytes"]
    size = f"{record['total_bytes']:,}" + (f" of {cap:,} ({100 * record['total_bytes'] / cap:.2f} %)" if cap else "")
    score = [
        ("before quantisation", f"{record['val_bpb_float']:.4f}"),
        ("the file", f"{record['val_bpb']:.4f}"),
    ]
    if record.get("val_bpb_sliding") is not None:
        score.append((f"the file, sliding (stride {record['stride']})", f"{record['val_bpb_sliding']:.4f}"))
    score += [(name, f"{peer['bpb']:.4f}") for name, peer in record["peers"].items()]
    seconds = [(name, f"{value:.1f}") for name, value in record["seconds"].items()]
    size_rows = [("bytes against the cap", size)]
    size_rows += [(f"  {name}", f"{count:,}") for name, count in record["ledger"].items() if count]
    return "\n\n".join(
        [
            table_text(
                size_rows, title=f"{record['recipe']}: {record['params']:,} parameters, {record['steps']:,} steps"
            ),
            table_text(
                score, title=f"val_bpb, bits per byte over {record['scored_bytes']:,} bytes of text (lower is better)"
            ),
            table_text(seconds, title="seconds"),
            table_text([("artifact", record["paths"]["artifact"]), ("report", record["paths"]["report"])]),
        ]
    )


def score_text(result: dict[str, Any]) -> str:
    rows = [("standard", f"{result['val_bpb']:.6f}", f"{result['val_loss']:.6f}")]
    if result.get("val_bpb_sliding") is not None:
        rows.append(
            (
                f"sliding, stride {result['stride']}",
                f"{result['val_bpb_sliding']:.6f}",
                f"{result['val_loss_sliding']:.6f}",
            )
        )
    title = f"{result['scored_tokens']:,} tokens, {result['scored_bytes']:,} bytes"
    return table_text(rows, header=("windows", "val_bpb", "val_loss"), title=title)


def artifact_facts(path: Path) -> dict[str, Any]:
    """What `golf inspect` reports of an artifact, read without building the model."""
    from paramgolf.files import sha256_file
    from paramgolf.pack.container import describe_artifact

    return {"path": str(path), "bytes": path.stat().st_size, "sha256": sha256_file(path), **describe_artifact(path)}


def inspect_text(facts: dict[str, Any]) -> str:
    """The facts of an artifact as tables."""
    model = [(key, str(value)) for key, value in facts["model"].items()]
    ledger = [(name, f"{size:,}") for name, size in facts["ledger"].items() if size]
    head = [
        ("file", facts["path"]),
        ("bytes", f"{facts['bytes']:,}"),
        ("sha256", facts["sha256"]),
        ("codec", facts["codec"]),
    ]
    return "\n\n".join([table_text(head), table_text(model, title="model"), table_text(ledger, title="bytes by group")])
