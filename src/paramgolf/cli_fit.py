"""`golf fit`: a recipe for your own text and budgets, measured and chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paramgolf.cli_output import AsJson, emit

app = typer.Typer()


@app.command("fit", epilog="Example: golf fit --data notes/ --bytes 250000 --seconds 120 --write mine.toml --dry-run")
def fit_command(
    max_bytes: Annotated[int, typer.Option("--bytes", metavar="N", help="Byte cap of the file.")],
    seconds: Annotated[float, typer.Option(metavar="S", help="Time budget of the run.")],
    data: Annotated[str, typer.Option(help="As of `golf run`. Default: built-in text.")] = "",
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/fit-N-S.")] = None,
    write: Annotated[
        Path | None,
        typer.Option(
            help="Where the recipe goes. Default: beside the run folder; with --dry-run nowhere.", metavar="RECIPE.toml"
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Choose and say why; train nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure this machine, choose vocabulary, shape, batch and bits for these budgets, say why, and run it."""
    from paramgolf.lab.choice import Budget
    from paramgolf.lab.fit import check_budget, fit
    from paramgolf.lab.fit_text import fit_text, fitted_text
    from paramgolf.runner.summary import summary_text

    budget = Budget(max_bytes, seconds)
    check_budget(budget)
    result = fit(
        data, budget, write=write, out=out, dry_run=dry_run, say=lambda text: typer.echo(f"{text}\n", err=True)
    )
    record = result["record"]
    text = fit_text(result) if record is None else f"{summary_text(record)}\n\n{fitted_text(result)}"
    emit(result, as_json, text)
