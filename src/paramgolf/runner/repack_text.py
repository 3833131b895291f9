"""What `golf pack` prints, and the frontier of bytes against bits per byte in a run's report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paramgolf.files import atomic_write
from paramgolf.recipe.load import load_recipe
from paramgolf.runner.folder import RunFolder
from paramgolf.runner.report import write_report
from paramgolf.runner.summary import table_text


def pack_text(result: dict[str, Any]) -> str:
    """The tables of `golf pack`: the file, what each group got and costs, predicted against measured."""
    cap, counted = result["cap_bytes"], result["total_bytes"]
    head = f"{result['artifact']}: {result['artifact_bytes']:,} bytes"
    head += f", {counted:,} of them counted" if counted != result["artifact_bytes"] else ""
    head += f" ({100 * counted / cap:.2f} % of the cap of {cap:,})" if cap else ""
    blocks = [f"{head}; step {result['step']:,}, {result['method']}, {result['codec']}"]
    groups = result.get("groups", {})
    if groups:
        factor = result["predicted_bpb"] / result["predicted_loss"] if result["predicted_loss"] else 0.0
        rows = [
            (name, str(g["bits"]), f"{g['step']:.3f}", f"{g['weights']:,}", f"{g['bytes']:,}",
             f"{8 * g['bytes'] / max(1, g['weights']):.2f}", f"{g['loss'] * factor:.5f}")
            for name, g in groups.items()
        ]  # fmt: skip
        header = ("group", "bits", "step", "weights", "about bytes", "bits each", "BPB it costs")
        blocks.append(table_text(rows, header=header, title="chosen grids (a step in row deviations)"))
    sizes = [(n, f"{size:,}") for n, size in sorted(result["ledger"].items(), key=lambda item: -item[1]) if size]
    blocks.append(table_text(sizes, title="where the bytes are"))
    costs = [("before quantisation", f"{result['float_bpb']:.4f}")]
    if groups:
        costs.append(("predicted increase", f"{result['predicted_bpb']:+.5f}"))
    costs.append(("measured increase", f"{result['measured_bpb']:+.5f}"))
    if groups:
        costs.append(("one more kilobyte would give", f"{-result['bpb_per_kilobyte']:+.7f}"))
    text = f"bits per byte on {result['check_tokens']:,} tokens of training text read for nothing else"
    blocks.append(table_text(costs, title=text))
    if "frontier" in result:
        points = [
            (f"{p['total_bytes']:,}", f"{p['predicted_bpb']:+.4f}", f"{p['measured_bpb']:+.4f}")
            for p in result["frontier"]["points"]
        ]
        blocks.append(table_text(points, header=("bytes", "predicted BPB", "measured BPB"), title="frontier"))
        blocks.append(f"report  {result['report']}" if result["report"] else "no report: the run has not finished")
    return "\n\n".join(blocks)


def frontier_into_report(root: Path, frontier: dict[str, Any]) -> str:
    """Keep the frontier in the run folder and draw it into the report of a finished run; the report's path or ""."""
    folder = RunFolder(root)
    atomic_write(folder.frontier, json.dumps(frontier, indent=1).encode() + b"\n")
    record = folder.read_record()
    if record is None:
        return ""
    write_report(folder, record, load_recipe(str(folder.root / "recipe.toml")).title)
    return str(folder.report)
