"""What every command's result has in common: `--json`, and the one thing that goes to stdout."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from paramgolf.errors import GolfError

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


def emit(result: dict[str, Any], as_json: bool, text: str) -> None:
    """The one thing a command writes to stdout. GolfError for a number that JSON has no form for."""
    try:
        typer.echo(json.dumps(result, indent=2, allow_nan=False) if as_json else text)
    except ValueError as error:
        raise GolfError(f"the result is no JSON ({error}); leave --json out") from None
