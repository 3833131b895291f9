"""`golf audit`: what can be said about anybody's submission without running it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paramgolf.cli_output import AsJson, emit

app = typer.Typer()


@app.command("audit", epilog="Example: golf audit records/track_10min_16mb/2026-04-* --json")
def audit_command(
    paths: Annotated[
        list[Path], typer.Argument(help="Folders of submissions (or a folder of such folders), or single scripts.")
    ],
    execute: Annotated[
        bool, typer.Option("--execute", help="Also run the script's model, in a process without network.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check submissions against the public rules by reading them; nothing of them is executed without --execute.

    Exit code 1: there are violations; 0: there are none; 2: a path cannot be read.
    """
    from paramgolf.submit.audit.audit import audit, audit_text, expand

    audits = [audit(path, execute=execute) for path in expand(paths)]
    violations = sum(result.violations for result in audits)
    found = {"violations": violations, "audits": [result.as_dict() for result in audits]}
    emit(found, as_json, audit_text(audits))
    if violations:
        raise typer.Exit(1)
