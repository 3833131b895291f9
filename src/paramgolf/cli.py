"""`golf`: a thin face over the public Python API.

stdout carries the result (with --json exactly one object), progress and warnings go to stderr. Bad input
is one line on stderr and exit code 2, a failed check is exit code 1. Heavy modules are imported inside the
commands, so that `golf --help` and a misspelt key answer at once.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from paramgolf import __version__, cli_text
from paramgolf.cli_audit import app as audit_app
from paramgolf.cli_data import app as data_app
from paramgolf.cli_fit import app as fit_app
from paramgolf.cli_lab import app as lab_app
from paramgolf.cli_output import AsJson, emit
from paramgolf.cli_pack import app as pack_app
from paramgolf.cli_submit import app as submit_app
from paramgolf.cli_sweep import app as sweep_app
from paramgolf.errors import CheckFailed, GolfError, on_every_rank

app = typer.Typer(
    name="golf",
    help="Your text, a byte budget and a time budget go in; the best language model that fits comes out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
cli_text.register(app)
app.add_typer(fit_app)
app.add_typer(lab_app)
app.add_typer(pack_app)
app.add_typer(sweep_app)
app.add_typer(audit_app)
app.add_typer(submit_app)

Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, e.g. model.mlp_hidden=1488")]
FromEnv = Annotated[
    str, typer.Option("--from-env", help="An official command line, e.g. 'MLP_HIDDEN=1488 EVAL_STRIDE=64'.")
]
Artifact = Annotated[Path, typer.Argument(help="A model.golf file, or the folder of the run that made it.")]


def _overrides(overrides: list[str] | None, from_env: str) -> list[str]:
    from paramgolf.recipe.fromenv import from_command_line

    words = list(overrides or [])
    if from_env:
        translated, ignored = from_command_line(from_env)
        for name in ignored:
            typer.echo(f"note: {name} has no meaning for a recipe and is left out", err=True)
        words = translated + words
    return words


@app.command("run", epilog="Example: golf run pocket --data notes/ --bytes 500000 --seconds 120 train.seed=7")
def run_command(
    recipe: Annotated[str, typer.Argument(help="A recipe name (see `golf recipes`) or a TOML file.")],
    overrides: Overrides = None,
    data: Annotated[
        str,
        typer.Option(help="Text, JSONL, parquet, a folder of them or of shards; '-' = stdin. Default: built-in text."),
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/<recipe>-<time>.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with --out, or with the newest unfinished run of the recipe.")
    ] = False,
    seconds: Annotated[str, typer.Option(metavar="S", help="Time budget (budget.seconds).")] = "",
    max_bytes: Annotated[str, typer.Option("--bytes", metavar="N", help="Byte cap (budget.bytes).")] = "",
    from_env: FromEnv = "",
    track: Annotated[
        list[str] | None, typer.Option(help="Also send the numbers to tensorboard, wandb or trackio.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a recipe, pack it under its byte cap and score the file that came out."""
    from paramgolf.recipe.load import resolve

    with on_every_rank():
        words = _overrides(overrides, from_env)
        words += [f"budget.seconds={seconds}"] if seconds else []
        words += [f"budget.bytes={max_bytes}"] if max_bytes else []
        resolved = resolve(recipe, words)
    from paramgolf.runner.run import run
    from paramgolf.runner.summary import summary_text

    record = run(resolved.recipe, data=data or None, out=out, resume=resume, track=track or [])
    if record is not None:  # only the first rank reports
        emit(record, as_json, summary_text(record))


@app.command("recipes", epilog="Example: golf recipes pr107 --from-env 'MLP_HIDDEN=1488 EVAL_STRIDE=64'")
def recipes_command(
    name: Annotated[str, typer.Argument(help="Show this recipe resolved; without it, list all.")] = "",
    overrides: Overrides = None,
    from_env: FromEnv = "",
    as_json: AsJson = False,
) -> None:
    """List the recipes, or show every value of one and the file that set it."""
    from paramgolf.recipe.load import load_recipe, recipe_names, resolve, to_table
    from paramgolf.recipe.show import recipe_listing, recipe_text

    if name:
        resolved = resolve(name, _overrides(overrides, from_env))
        emit({"recipe": to_table(resolved.recipe), "origin": resolved.origin}, as_json, recipe_text(resolved))
    else:
        recipes = [load_recipe(known) for known in recipe_names()]
        emit({r.name: r.title for r in recipes}, as_json, recipe_listing(recipes))


@app.command("score", epilog="Example: golf score runs/pocket-1/model.golf --data val.txt --stride 64")
def score_command(
    artifact: Artifact,
    data: Annotated[str, typer.Option(help="The text to score, whole ('-' = stdin); of a folder its validation part.")],
    stride: Annotated[
        int | None,
        typer.Option(
            min=0, help="Also score with windows that advance by so many tokens; 0 = do not. Default: the artifact's."
        ),
    ] = None,
    seq_len: Annotated[int, typer.Option(min=0, max=1 << 20, help="Window length; 0 = the artifact's.")] = 0,
    check_legality: Annotated[
        bool, typer.Option("--check-legality", help="Test the four conditions of a legal score; exit code 1: broken.")
    ] = False,
    ttt: Annotated[
        bool, typer.Option("--ttt", help="Also score with test-time training, as the artifact says (docs/ttt.md).")
    ] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another ttt.* or tilt.* value.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bits per byte of a text under an artifact: standard windows, and sliding ones."""
    import paramgolf

    model = paramgolf.load(cli_text.artifact_path(artifact))
    result = model.score_data(
        data, stride=stride, seq_len=seq_len, check_legality=check_legality, ttt=ttt, settings=settings or []
    )
    from paramgolf.runner.summary import score_text

    emit(result, as_json, score_text(result))
    broken = [name for name, found in result.get("legality", {}).items() if found["verdict"] == "violation"]
    if broken:
        raise CheckFailed(f"the score is not legal: {', '.join(broken)}; see docs/legality.md")


@app.command(
    "sample", epilog="Example: golf sample runs/pocket-1/model.golf 'def main(' --tokens 200 --temperature 0.7"
)
def sample_command(
    artifact: Artifact,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 = always the likeliest token.")] = 0.8,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from the smallest set with this probability; 1 = from all. Default: 0.95."),
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text (may be given several times).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same text.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Continue a text with the model, as it is generated."""
    import paramgolf

    cli_text.check_stdout()
    model = paramgolf.load(cli_text.artifact_path(artifact))
    settings = {} if top_p is None else {"top_p": top_p}
    pieces = model.stream(
        prompt, max_tokens=tokens, temperature=temperature, stop=list(stop or []), seed=seed, **settings
    )
    if as_json:
        emit({"prompt": prompt, "text": "".join(pieces), "seed": seed}, True, "")
        return
    typer.echo(prompt, nl=False)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    typer.echo()


@app.command("inspect", epilog="Example: golf inspect runs/pocket-1/model.golf")
def inspect_command(artifact: Artifact, as_json: AsJson = False) -> None:
    """What an artifact or a compressed file holds: configuration, contents, and where each of its bytes goes."""
    from paramgolf.runner.summary import artifact_facts, inspect_text

    if artifact.is_file() and cli_text.is_compressed(artifact):
        return cli_text.inspect_text_file(artifact, as_json)
    facts = artifact_facts(cli_text.artifact_path(artifact))
    emit(facts, as_json, inspect_text(facts))


@app.command("doctor", epilog="Example: golf doctor --bench")
def doctor_command(
    bench: Annotated[
        bool, typer.Option("--bench", help="Also measure this machine for about 20 s, against its earlier times.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What this machine has, what a run would use, and what is missing."""
    from paramgolf.runner.doctor import doctor_text, examine

    facts, text = examine(), ""
    if bench:
        from paramgolf.runner.machine_bench import bench as measured
        from paramgolf.runner.machine_bench import bench_text

        facts["bench"] = measured()
        text = "\n\n" + bench_text(facts["bench"])
    emit(facts, as_json, doctor_text(facts) + text)


@app.callback(invoke_without_command=True)
def golf(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"paramgolf {__version__}")
        raise typer.Exit()


_NO_MEMORY = re.compile("out of memory|can't allocate memory")  # a RuntimeError of torch


class _Terminated(BaseException):
    """SIGTERM. What is half-written is removed on the way out, as after Ctrl-C."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def _prepare_process() -> None:
    """SIGTERM unwinds the command, and no character is beyond the terminal's encoding."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; every expected failure becomes one line and an exit code."""
    _prepare_process()
    command = typer.main.get_command(app)
    try:
        code = command.main(args=arguments, prog_name="golf", standalone_mode=False)
        if code == 128 + signal.SIGINT:  # what the library makes of Ctrl-C
            return _fail("interrupted", code)
        return code if isinstance(code, int) else 0
    except GolfError as error:
        said_elsewhere = error.shared and os.environ.get("RANK", "0") != "0"
        return error.exit_code if said_elsewhere else _fail(str(error), error.exit_code)
    except _Terminated:
        return 128 + signal.SIGTERM
    except SystemExit:  # how the command-line library ends when the reader of stdout left; nothing to say to it
        return 0
    except typer.Abort:  # the library's word for an EOFError
        return _fail("the input ended too early; check the file", 2)
    except OSError as error:  # no permission, no space, a broken disk: not the program's fault
        where = f"{error.filename}: " if error.filename is not None else ""
        return _fail(f"{where}{error.strerror or error}; check the path, its permissions and free space", 2)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of the command-line library
            hint = getattr(getattr(error, "ctx", None), "command_path", "golf")
            return _fail(f"{error.format_message().rstrip('.')}; see `{hint} --help`", 2)
        if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
            return _fail("not enough memory; take a smaller model, batch or window", 2)
        raise


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(AttributeError, OSError):  # stderr is closed or full: the code still says it
        sys.stderr.write(f"golf: error: {' '.join(message.split())}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
