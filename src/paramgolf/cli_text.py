"""`golf compress`, `golf decompress` and `golf prove`: files made of a model's predictions."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, cast

import typer

from paramgolf.cli_output import AsJson, emit
from paramgolf.errors import GolfError

if TYPE_CHECKING:
    from paramgolf.text.blocks import TextModel

SUFFIX = ".gtx"
Files = Annotated[list[str] | None, typer.Argument(help="Files; none or '-' = stdin to stdout.")]
Model = Annotated[
    Path | None,
    typer.Option("-m", "--model", help="A model.golf or its run folder. Default: one under runs/."),
]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="Output file (of one input); '-' = stdout.")]
Work = Callable[[Path | None, BinaryIO, BinaryIO, Callable[[int], None]], str]
Workers = Annotated[int, typer.Option(min=0, max=1024, help="Processes; 0 = one for each processor.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `golf`."""
    app.command("compress", epilog="Example: golf compress notes.txt -m runs/pocket-1")(compress_command)
    app.command("decompress", epilog="Example: golf decompress notes.txt.gtx -m runs/pocket-1")(decompress_command)
    app.command("prove", epilog="Example: golf prove runs/pocket-1 --data val.txt --limit 1000000")(prove_command)


def compress_command(
    files: Files = None,
    model: Model = None,
    out: Out = None,
    tolerance: Annotated[
        float, typer.Option(min=0.0, max=0.05, help="Log-odds by which the reader's arithmetic may differ.")
    ] = 1e-4,
    stride: Annotated[
        int, typer.Option(min=0, help="Windows that advance by so many tokens: smaller and slower; 0 = side by side.")
    ] = 0,
    workers: Workers = 0,
) -> None:
    """Shrink any file with a model; FILE becomes FILE.gtx, which stands beside it."""
    jobs = _jobs(files, out, lambda path: path.with_name(path.name + SUFFIX))
    from paramgolf.text import stream
    from paramgolf.text.blocks import TextModel
    from paramgolf.text.format import Content

    text_model = TextModel(artifact_path(model) if model else _newest())
    text_model.header(Content.FILE, tolerance, stride)  # refused before any work

    def work(_: Path | None, reader: BinaryIO, writer: BinaryIO, progress: Callable[[int], None]) -> str:
        read, written = stream.compress(
            reader, writer, text_model, tolerance=tolerance, stride=stride,
            workers=workers or stream.default_workers(), progress=progress,
        )  # fmt: skip
        share = f" ({8 * written / read:.3f} bits per byte)" if read else ""
        return f"{read:,} bytes to {written:,}{share}"

    for source, target in jobs:
        _convert(source, target, "compress", work)


def decompress_command(files: Files = None, model: Model = None, out: Out = None, workers: Workers = 0) -> None:
    """Bring back what `golf compress` shrank; FILE.gtx becomes FILE."""
    jobs = _jobs(files, out, _without_suffix)
    from paramgolf.text import stream

    def work(source: Path | None, reader: BinaryIO, writer: BinaryIO, progress: Callable[[int], None]) -> str:
        where = "standard input" if source is None else str(source)
        _, written = stream.decompress(
            reader, writer, lambda: _find_model(model, source, where), where=where,
            workers=workers or stream.default_workers(), progress=progress,
        )  # fmt: skip
        return f"{written:,} bytes"

    stream.return_large_blocks()
    for source, target in jobs:
        _convert(source, target, "decompress", work)


def prove_command(
    artifact: Annotated[Path, typer.Argument(help="A model.golf file, or the folder of the run that made it.")],
    data: Annotated[
        str,
        typer.Option(
            help="The documents, or shards; of a folder its validation part; '-' = stdin. Default: what the run was "
            "scored on."
        ),
    ] = "",
    limit: Annotated[int, typer.Option(min=0, help="Prove the first so many bytes; 0 = all.")] = 0,
    stride: Annotated[int, typer.Option(min=0, help="Windows that advance by this many tokens; 0 = standard.")] = 0,
    lanes: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=1 << 16,
            help="Lanes to cut the text into at document starts; 0 = by size. Default: the artifact's.",
        ),
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0.0, max=0.05, help="As for compress.")] = 1e-4,
    ttt: Annotated[
        bool, typer.Option("--ttt", help="With test-time training, as the artifact says (docs/ttt.md).")
    ] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another ttt.* value.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Keep the proved file here; `golf decompress` reads it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Code documents with the model, decode them in another process, compare: the score as the size of a file."""
    path = artifact_path(artifact)
    from paramgolf.runner.proof import own_validation, proof_text, record_of, record_proof
    from paramgolf.text.prove import prove, ttt_section

    section = ttt_section(path, settings or [], ttt)
    data = data or own_validation(artifact)
    recorded = record_of(artifact) is not None  # or refused, before any work

    def say(line: str) -> None:
        typer.echo(line, err=True)

    proof = prove(
        path, data, limit=limit, stride=stride, lanes=lanes, tolerance=tolerance, ttt=section, out=out, say=say
    )
    if recorded:
        say(record_proof(artifact, proof))
    emit(proof, as_json, proof_text(proof))


def _jobs(
    files: list[str] | None, out: Path | None, name: Callable[[Path], Path]
) -> list[tuple[Path | None, Path | None]]:
    """(input, output) pairs, None for the standard streams; every refusal comes before any work."""
    inputs = [None if file == "-" else Path(file) for file in files or ["-"]]
    if out is not None and len(inputs) > 1:
        raise GolfError("-o names the output of one file; leave it out or give one file")
    jobs = []
    for source in inputs:
        if source is not None and not source.is_file():
            what = "is a folder" if source.is_dir() else "is a pipe or device" if source.exists() else "no such file"
            raise GolfError(f"{source}: {what}; give files, or '-' for standard input")
        target = None if str(out) == "-" else out or (name(source) if source is not None else None)
        if target is not None and target.exists():
            raise GolfError(f"{target} exists; remove it or choose another name with -o")
        if (source, target) in jobs:
            raise GolfError(f"{source or 'standard input'} is given twice; give each file once")
        jobs.append((source, target))
    return jobs


def _without_suffix(path: Path) -> Path:
    if path.suffix != SUFFIX:
        raise GolfError(f"{path}: its name does not end in {SUFFIX}; name the output with -o")
    return path.with_suffix("")


def _convert(source: Path | None, target: Path | None, verb: str, work: Work) -> None:
    """Run `work` from input to output and say on stderr what came of it. A file appears whole or not at all."""
    from paramgolf.data.progress import ProgressReport
    from paramgolf.files import atomic_path

    label = verb if source is None else f"{verb} {source.name}"
    try:
        with ProgressReport() as report, source.open("rb") if source else _open_stdin() as reader:
            total = source.stat().st_size if source and verb == "compress" else None

            def progress(done: int) -> None:
                report(label, done, total)

            if target is None:
                check_stdout()
                if sys.stdout.isatty() and verb == "compress":
                    raise GolfError("standard output is a terminal; redirect it or use -o")
                said = work(source, reader, sys.stdout.buffer, progress)
                sys.stdout.buffer.flush()
            else:
                with atomic_path(target) as temporary, temporary.open("wb") as writer:
                    said = work(source, reader, writer, progress)
    except (BrokenPipeError, GolfError):
        raise
    except OSError as error:
        if target is None and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered would fail at exit again
            raise GolfError(f"cannot write standard output: {error.strerror}; free space") from error
        raise GolfError(f"{source or 'standard input'}: {error.strerror or error}; check the file") from error
    typer.echo(f"{label}: {said}" + (f" -> {target}" if target else ""), err=True)


def _open_stdin() -> BinaryIO:
    if sys.stdin is None:
        raise GolfError("standard input is closed; pipe the data in, or name a file")
    return sys.stdin.buffer


def check_stdout() -> None:
    """GolfError where there is no standard output to write to."""
    if sys.stdout is None:
        raise GolfError("standard output is closed; open it, or send it to a file")


def artifact_path(path: Path) -> Path:
    """`model.golf` itself or the one inside a run folder."""
    path = path / "model.golf" if path.is_dir() else path
    if not path.is_file():
        raise GolfError(f"no artifact at {path}; give a model.golf file or the folder of a finished run")
    return path


def _models() -> list[Path]:
    """Under runs/, newest first."""
    found = [path for path in Path("runs").glob("**/model.golf") if path.is_file()]
    return sorted(found, key=lambda path: (path.stat().st_mtime, str(path)), reverse=True)


def _newest() -> Path:
    models = _models()
    if not models:
        raise GolfError("no model: there is no model.golf under runs/; name one with -m, or make one with `golf run`")
    typer.echo(f"model: {models[0]}", err=True)
    return models[0]


def _find_model(given: Path | None, source: Path | None, where: str) -> TextModel:
    """The model named with -m, else the one under runs/ that the file was made with."""
    from paramgolf.files import sha256_file
    from paramgolf.text.blocks import TextModel
    from paramgolf.text.format import StreamReader, read_header

    if given is not None:
        return TextModel(artifact_path(given), device="cpu")
    models = _models()
    if source is not None:
        with source.open("rb") as stream:
            wanted = read_header(StreamReader(stream, where)).model.hex()
        fitting = [path for path in models if sha256_file(path).startswith(wanted)]
        if not fitting:
            raise GolfError(f"{where} was made with model {wanted[:16]}..., which is not under runs/; name it with -m")
        models = fitting
    elif not models:
        raise GolfError("no model: there is no model.golf under runs/; name one with -m")
    typer.echo(f"model: {models[0]}", err=True)
    return TextModel(models[0], device="cpu")


def is_compressed(path: Path) -> bool:
    """Whether `golf inspect` is given one of our compressed files."""
    from paramgolf.text.format import MAGIC

    with path.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def inspect_text_file(path: Path, as_json: bool) -> None:
    """`golf inspect` of a compressed file."""
    from paramgolf.runner.summary import table_text
    from paramgolf.text.format import describe

    with path.open("rb") as stream:
        facts = describe(stream, str(path))
    frames = cast(dict[str, dict[str, Any]], facts["frames"])
    rows = [(kind, *(f"{row[key]:,}" for key in ("frames", "raw_bytes", "bytes"))) for kind, row in frames.items()]
    head = [(k, f"{v:,}" if isinstance(v, int) else str(v)) for k, v in facts.items() if k != "frames"]
    coded = table_text(rows, header=("coded by", "frames", "raw bytes", "bytes"))
    emit(facts, as_json, f"{table_text(head)}\n\n{coded}")
