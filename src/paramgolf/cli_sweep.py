"""`golf sweep` and `golf ablate`: many runs of one recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from paramgolf.cli_output import AsJson, emit

app = typer.Typer()

Recipe = Annotated[str, typer.Argument(help="A recipe name (see `golf recipes`) or a TOML file.")]
On = Annotated[
    Literal["split", "validation"],
    typer.Option(help="Judge on a part of the training text (default), or on the validation text itself."),
]
Objective = Annotated[str, typer.Option(help="A number of the records, the smaller the better.")]
Workers = Annotated[int, typer.Option(min=1, help="Runs at a time on this machine.")]
Steps = Annotated[int, typer.Option(min=0, help="Train so many steps instead of the recipe's budget.")]


def _note(text: str) -> None:
    typer.echo(text, err=True)


@app.command(
    "sweep",
    epilog="Example: golf sweep pocket --over optim.matrix_lr=0.01..0.04:log model.mlp_hidden=384,480 --trials 20",
)
def sweep_command(
    recipe: Recipe,
    words: Annotated[
        list[str] | None, typer.Argument(help="More ranges and lists; a key with one value is set to it.")
    ] = None,
    over: Annotated[
        list[str] | None, typer.Option(help="KEY=LOW..HIGH[:log|:step=S] or KEY=A,B,C; others may follow it.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Trials of the study, over all machines.")] = 30,
    objective: Objective = "val_bpb",
    on: On = "split",
    workers: Workers = 1,
    steps: Steps = 0,
    max_bytes: Annotated[int, typer.Option(min=0, help="Best trial at most so large (total_bytes).")] = 0,
    max_seconds: Annotated[float, typer.Option(min=0, help="Best trial at most so slow (seconds.strict).")] = 0.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="One key after the other, keeping the best value.")] = False,
    points: Annotated[int, typer.Option(min=2, help="Values of a range in a greedy sweep.")] = 5,
    sampler: Annotated[Literal["tpe", "random", "grid", "cmaes"], typer.Option(help="What to try next.")] = "tpe",
    pruner: Annotated[
        Literal["median", "hyperband", "none"], typer.Option(help="When to stop a trial early, by training loss.")
    ] = "median",
    storage: Annotated[str, typer.Option(help="Database URL or journal file shared by machines.")] = "",
    study: Annotated[str, typer.Option(help="Name in the storage. Default: RECIPE-sweep.")] = "",
    out: Annotated[Path | None, typer.Option(help="Folder of trials. Default: sweeps/<recipe>.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampler, with one worker.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Search a recipe's settings; the same command again goes on with the study, on this or another machine."""
    from paramgolf.lab.study import sweep_text
    from paramgolf.lab.sweep import plan_sweep, sweep

    plan = plan_sweep(
        recipe, [*(over or []), *(words or [])], steps=steps, out=out or Path("sweeps") / Path(recipe).stem,
        objective=objective, on=on, trials=trials, workers=workers, storage=storage, study=study, sampler=sampler,
        pruner=pruner, max_bytes=max_bytes, max_seconds=max_seconds, greedy=greedy, points=points, seed=seed,
        note=_note,
    )  # fmt: skip
    result = sweep(plan)
    emit(result, as_json, sweep_text(result))


@app.command(
    "ablate", epilog="Example: golf ablate pocket --seeds 3 --steps 400 --only averaging --only parts.attn_gate"
)
def ablate_command(
    recipe: Recipe,
    variants: Annotated[
        list[str] | None, typer.Argument(help="section.key=value: tried by itself, as a variant of its own.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this component (may be repeated).")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value for all runs.")] = None,
    seeds: Annotated[int, typer.Option(min=2, help="Runs of each variant.")] = 3,
    objective: Objective = "val_bpb",
    on: On = "split",
    workers: Workers = 1,
    steps: Steps = 0,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs. Default: ablations/<recipe>.")] = None,
    as_json: AsJson = False,
) -> None:
    """Switch each component of a recipe off in turn and say what it was worth; finished runs are not repeated."""
    from paramgolf.lab.ablate import ablate, ablate_text

    result = ablate(
        recipe, list(overrides or []), own=list(variants or []), only=list(only or []), seeds=seeds,
        out=out or Path("ablations") / Path(recipe).stem, workers=workers, steps=steps, on=on, objective=objective,
        note=_note,
    )  # fmt: skip
    emit(result, as_json, ablate_text(result))
