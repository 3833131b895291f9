"""`golf pack` and `golf plan`: sizes after training and before it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paramgolf.cli_output import AsJson, emit

app = typer.Typer()


@app.command("pack", epilog="Example: golf pack runs/pocket-1 --bytes 600000 --frontier")
def pack_command(
    checkpoint: Annotated[
        Path, typer.Argument(help="A run folder, its folder of checkpoints, or one .safetensors checkpoint.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="quant.key=value or pack.key=value, e.g. quant.method=rtn pack.fit=false")
    ] = None,
    max_bytes: Annotated[
        int, typer.Option("--bytes", metavar="N", min=0, show_default=False, help="Byte cap. Default: the run's.")
    ] = 0,
    frontier: Annotated[
        bool, typer.Option("--frontier", help="Pack a range of caps too and draw them into the run's report.")
    ] = False,
    data: Annotated[str, typer.Option(help="The run's data, where it is neither cached nor where it was.")] = "",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The file to write. Default: packed-N.golf in the run folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Choose bits and clips for every group of tensors, so that a trained model loses least in N bytes."""
    from paramgolf.runner.repack import repack
    from paramgolf.runner.repack_text import frontier_into_report, pack_text

    result = repack(
        checkpoint, cap=max_bytes, out=out, data=data, overrides=list(overrides or []), frontier=frontier,
        say=lambda line: typer.echo(line, err=True),
    )  # fmt: skip
    if frontier:
        result["report"] = frontier_into_report(Path(result["run"]), result["frontier"])
    emit(result, as_json, pack_text(result))


@app.command("plan", epilog="Example: golf plan pocket model.mlp_hidden=640 --bytes 1000000")
def plan_command(
    recipe: Annotated[str, typer.Argument(help="A recipe name (see `golf recipes`) or a TOML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, e.g. model.mlp_hidden=1488")] = None,
    seconds: Annotated[str, typer.Option(metavar="S", help="Time budget (budget.seconds).")] = "",
    max_bytes: Annotated[str, typer.Option("--bytes", metavar="N", help="Byte cap (budget.bytes).")] = "",
    runs: Annotated[Path, typer.Option(help="Finished runs to learn from.")] = Path("runs"),
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Time a few training steps here.")] = True,
    as_json: AsJson = False,
) -> None:
    """Predict bytes by group, parameters, steps and time on this machine, before training anything."""
    from paramgolf.recipe.load import load_recipe

    words = [*(overrides or [])]
    words += [f"budget.seconds={seconds}"] if seconds else []
    words += [f"budget.bytes={max_bytes}"] if max_bytes else []
    resolved = load_recipe(recipe, words)
    from paramgolf.runner.plan import make_plan, plan_text

    plan = make_plan(resolved, runs=runs, measure=measure, say=lambda line: typer.echo(line, err=True))
    emit(plan, as_json, plan_text(plan))
