"""What the commands print: plain tables of results, made with rich so that columns line up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from paramgolf.errors import GolfError

# What each clock and phase of a record measures, in words.
SECONDS = {
    "strict": "counted by the budget",
    "challenge": "by the challenge's clock, from the first step on",
    "process": "everything, from the start of the process",
    "data": "preparing the data",
    "kernels": "building kernels",
    "compile": "compiling",
    "warmup": "warming up",
    "train": "training",
    "average": "averaging weights",
    "post_qat": "training on the quantisation grid",
    "checkpoint": "writing checkpoints",
    "calibrate": "calibrating",
    "pack": "quantising and coding",
    "read": "reading the file back",
    "score_floats": "scoring before quantisation",
    "score": "scoring the file",
    "peers": "other compressors",
}


def table_text(rows: Iterable[Sequence[str]], header: Sequence[str] = (), title: str = "", numbers: bool = True) -> str:
    """A borderless table: the first column left, the others right (left if they are not `numbers`)."""
    table = Table(box=None, show_header=bool(header), pad_edge=False)
    rows = [list(row) for row in rows]
    for i in range(max((len(row) for row in rows), default=len(header))):
        justify: Literal["left", "right"] = "right" if i and numbers else "left"
        table.add_column(header[i] if i < len(header) else "", justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))  # no markup: a path may hold brackets
    console = Console(width=1000, no_color=True, highlight=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().rstrip("\n").splitlines()]
    return "\n".join([title, *(f"  {line}" for line in lines)] if title else lines)


def score_rows(record: dict[str, Any]) -> list[tuple[str, float]]:
    """What was scored and its bits per byte: the file, the weights before quantisation, other compressors."""
    rows = [("model.golf", record["val_bpb"])]
    if "val_bpb_sliding" in record:
        name = f"model.golf, windows sliding by {record['stride']} tokens"
        rows = [(name, record["val_bpb_sliding"]), ("model.golf, windows side by side", record["val_bpb"])]
    learning = [(f"model.golf, {name}", record[f"val_bpb_{key}"]) for key, name in adapted_keys(record).items()]
    rows = sorted(learning, key=lambda row: row[1]) + rows
    rows += table_rows(record, "model.golf, by the tokenizer's byte table")
    rows.append(("the weights before quantisation", record["val_bpb_float"]))
    proof = record.get("proof") or {}
    if proof.get("validation"):
        name = f"proved: {proof['file_bytes']:,} bytes were decoded back to the text"
        rows.append((f"{name} (stride {proof['stride']})", proof["proved_bpb"]))
    return rows + [(f"{name}, for comparison", peer["bpb"]) for name, peer in record["peers"].items()]


def adapted_keys(result: dict[str, Any]) -> dict[str, str]:
    """The scores that learn as they go: the end of their result keys and what they are."""
    pauses = f", {result['ttt_pauses']} pauses" if "ttt_pauses" in result else ""
    training = f"test-time training ({result.get('ttt')}{pauses})"
    names = {"ngram": "n-gram cache", "tilt": "n-gram tilt", "ttt": training, "ttt_tilt": f"{training} and n-gram tilt"}
    return {key: name for key, name in names.items() if f"val_bpb_{key}" in result}


def table_rows(result: dict[str, Any], name: str) -> list[tuple[str, float]]:
    """The score by the tokenizer's byte table, where that is another than by the bytes of the documents."""
    by_table = result.get("val_bpb_table")
    return [(name, by_table)] if by_table is not None and result["table_bytes"] != result["scored_bytes"] else []


def byte_table_lines(result: dict[str, Any]) -> list[str]:
    """Where the tokenizer's byte table differs from the documents; nothing if it does not, or there are none."""
    from paramgolf.data.byte_oracle import table_lines

    check = result.get("byte_table")
    return table_lines(check) if check and check["documents_that_differ"] else []


def proof_coders(proof: dict[str, Any]) -> list[dict[str, Any]]:
    """The proved file and other compressors on its text, the smallest first: name, bpb, bytes (str), ours (bool)."""
    ours = {"name": "the proved file", "bpb": proof["proved_bpb"], "bytes": proof["file_bytes"], "ours": True}
    rows = [ours] + [{"name": name, **peer, "ours": False} for name, peer in proof.get("peers", {}).items()]
    rows.sort(key=lambda row: row["bpb"])
    return [row | {"bpb": f"{row['bpb']:.4f}", "bytes": f"{row['bytes']:,}"} for row in rows]


def seconds_rows(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Every clock and phase that took noticeable time."""
    rows = [(SECONDS.get(name, name), f"{value:.1f}") for name, value in record["seconds"].items() if value >= 0.05]
    return rows or [("everything", "0.0")]


def summary_text(record: dict[str, Any]) -> str:
    """The tables at the end of `golf run`: score beside other compressors, size, time, and where things are."""
    cap, counted = record["cap_bytes"], record["total_bytes"]
    size = f"{record['artifact_bytes']:,} bytes in model.golf"
    size += f", {counted:,} of them counted" if counted != record["artifact_bytes"] else ""
    size += f" ({100 * counted / cap:.2f} % of the cap of {cap:,})" if cap else ""
    score = [(name, f"{value:.4f}") for name, value in score_rows(record)]
    largest = sorted(record["ledger"].items(), key=lambda item: -item[1])
    sizes = [(name, f"{count:,}") for name, count in largest if count]
    scored = f"{record['scored_bytes']:,} bytes of validation text"
    head = f"{record['recipe']}: {record['params']:,} parameters, {record['steps']:,} steps"
    where = [("artifact", record["paths"]["artifact"]), ("report", record["paths"]["report"])]
    return "\n\n".join(
        [
            f"{head}, {record['train_tokens']:,} tokens",
            table_text(score, title=f"bits per byte over {scored} (val_bpb; lower is better, unpacked text has 8)"),
            *(["\n".join(lines)] if (lines := byte_table_lines(record)) else []),
            table_text(sizes, title=size),
            table_text(seconds_rows(record), title="seconds"),
            table_text(where, numbers=False),
        ]
    )


def score_text(result: dict[str, Any]) -> str:
    rows = [("standard", f"{result['val_bpb']:.6f}", f"{result['val_loss']:.6f}")]
    if "val_bpb_sliding" in result:
        name, bpb, loss = f"sliding, stride {result['stride']}", result["val_bpb_sliding"], result["val_loss_sliding"]
        rows.append((name, f"{bpb:.6f}", f"{loss:.6f}"))
    for key, name in adapted_keys(result).items():
        rows.append((name, f"{result[f'val_bpb_{key}']:.6f}", f"{result[f'val_loss_{key}']:.6f}"))
    rows += [(name, f"{value:.6f}", "") for name, value in table_rows(result, "standard, by the byte table")]
    title = f"{result['scored_tokens']:,} tokens, {result['scored_bytes']:,} bytes"
    lines = [table_text(rows, header=("windows", "val_bpb", "val_loss"), title=title), *byte_table_lines(result)]
    return "\n".join(lines + legality_lines(result))


def legality_lines(result: dict[str, Any]) -> list[str]:
    """A line for each path to a score that was checked, and one for each condition that does not pass."""
    lines = []
    for name, legality in result.get("legality", {}).items():
        how = f"{legality['texts']} texts of {legality['tokens']:,} tokens"
        lines.append(f"legality of {name}: {legality['verdict']} ({how})")
        lines += [
            f"  {condition}: {finding['verdict']}: {finding['evidence']}"
            for condition, finding in legality["conditions"].items()
            if finding["verdict"] != "pass"
        ]
    return lines


def artifact_facts(path: Path) -> dict[str, Any]:
    """What `golf inspect` reports of an artifact, read without building the model."""
    from paramgolf.files import sha256_file
    from paramgolf.pack.container import describe_artifact

    facts = describe_artifact(path)
    if not isinstance(facts.get("model"), dict):
        raise GolfError(f"{path} says nothing of a model; give an artifact that golf run or golf pack wrote")
    return {**facts, "path": str(path), "bytes": path.stat().st_size, "sha256": sha256_file(path)}  # as measured, last


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
    return "\n\n".join(
        [table_text(head, numbers=False), table_text(model, title="model"), table_text(ledger, title="bytes by group")]
    )
