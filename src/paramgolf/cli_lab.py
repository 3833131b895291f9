"""`golf verify`, `golf runs`, `golf compare`: what to make of runs that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from paramgolf.cli_output import AsJson, emit
from paramgolf.errors import CheckFailed

app = typer.Typer()


@app.command("verify", epilog="Example: golf verify runs/pocket-1 --score")
def verify_command(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    score: Annotated[bool, typer.Option("--score", help="Also measure the score of model.golf again.")] = False,
    data: Annotated[
        str, typer.Option(help="Prepared folder or shards with the validation text. Default: the data cache.")
    ] = "",
    source: Annotated[
        bool, typer.Option("--source", help="Fail if the installed code is not the code of the run.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Recompute seal, hashes, sizes, ledger and counts of a run; exit code 1 names every mismatch."""
    from paramgolf.lab.verify import findings_text, verify

    findings = verify(run, score=score, data=data or None, source=source)
    emit(findings.as_dict(), as_json, findings_text(findings))
    if findings.mismatches:
        names = ", ".join(check.name for check in findings.mismatches)
        raise CheckFailed(f"{findings.run} does not agree with its record: {names}")


@app.command("runs", epilog="Example: golf runs --filter recipe=pocket --filter 'val_bpb<2.2' --sort val_bpb")
def runs_command(
    root: Annotated[Path, typer.Option(help="The folder that holds the run folders.")] = Path("runs"),
    filters: Annotated[
        list[str] | None, typer.Option("--filter", help="key=value, also != < <= > >= and '*'; may be repeated.")
    ] = None,
    sort: Annotated[str, typer.Option(help="A key of the records, e.g. val_bpb. Default: when finished.")] = "",
    reverse: Annotated[bool, typer.Option("--reverse", help="The other way round.")] = False,
    as_json: AsJson = False,
) -> None:
    """List finished runs: filtered and sorted by any key of their records."""
    from paramgolf.lab.store import index_runs, runs_text, select

    runs, problems = index_runs(root)
    for problem in problems:
        typer.echo(f"note: left out: {problem}", err=True)
    chosen = select(runs, list(filters or []), sort, reverse=reverse)
    emit({"runs": chosen}, as_json, runs_text(chosen))


@app.command("compare", epilog="Example: golf compare 'runs/pocket-*' 'runs/wider-*'  or: ... --against 1.2194")
def compare_command(
    runs: Annotated[
        list[str], typer.Argument(help="Run folders (grouped by recipe), folders of runs, quoted patterns.")
    ],
    against: Annotated[
        float | None, typer.Option(min=0, help="A published BPB. Without it the first group is the baseline.")
    ] = None,
    metric: Annotated[str, typer.Option(help="val_bpb, val_bpb_sliding, val_bpb_ngram or val_bpb_float.")] = "val_bpb",
    margin: Annotated[float, typer.Option(min=0, help="Better by at least so many nats a token.")] = 0.005,
    alpha: Annotated[float, typer.Option(min=1e-6, max=0.5, help="Significance asked for.")] = 0.01,
    power: Annotated[float, typer.Option(min=0.05, max=0.999, help="Of the number of runs still needed.")] = 0.8,
    allow: Annotated[list[str] | None, typer.Option(help="Compare although this differs, e.g. budget.steps.")] = None,
    until: Annotated[
        bool, typer.Option("--until-significant", help="Run further seeds until a sequential test is sure.")
    ] = False,
    max_seeds: Annotated[int, typer.Option(min=2, help="With it: at most so many seeds of each.")] = 10,
    workers: Annotated[int, typer.Option(min=1, help="With it: runs at a time.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Is one recipe better than another, or than a published number, by more than chance?"""
    from paramgolf.lab.compare import compare, open_groups
    from paramgolf.lab.compare_text import compare_text
    from paramgolf.lab.further import until_significant

    groups = open_groups(runs)
    asked: dict[str, Any] = {
        "against": against, "metric": metric, "margin_nats": margin, "alpha": alpha, "power": power,
        "allow": list(allow or []),
    }  # fmt: skip
    if until:
        result = until_significant(
            groups, **asked, max_seeds=max_seeds, workers=workers, note=lambda text: typer.echo(text, err=True)
        )
    else:
        result = compare(groups, **asked)
    emit(result, as_json, compare_text(result))


@app.command("report", epilog="Example: golf report 'runs/pocket-*' sweeps/pocket -o report.html")
def report_command(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Run folders, folders of runs, quoted patterns, sweeps. Default: runs.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    as_json: AsJson = False,
) -> None:
    """One self-contained page: table, loss curves, bytes, frontier, seeds, sweeps, seals."""
    from paramgolf.lab.report import report_text, write_report

    result = write_report(list(runs or ["runs"]), out)
    emit(result, as_json, report_text(result))
