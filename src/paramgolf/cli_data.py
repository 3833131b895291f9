"""`golf data ...`: text to tokens, the published shards, and a look at either."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from paramgolf.cli_output import AsJson, emit
from paramgolf.errors import GolfError

app = typer.Typer(help="Prepare, fetch and inspect data.", no_args_is_help=True)

Field = Annotated[str, typer.Option("--field", help="The JSONL key or parquet column that holds the text.")]


def _cache() -> Path:
    from paramgolf.data.cache import cache_root

    return cache_root()


@app.command("prepare", epilog="Example: golf data prepare notes/ --vocab-size 2048 --out data/notes")
def prepare_command(
    source: Annotated[
        str, typer.Argument(help="Text, JSONL or parquet file, folder, glob, '-' = stdin; empty = the built-in text.")
    ] = "",
    vocab_size: Annotated[int, typer.Option(min=260, max=65535, help="Pieces of the tokenizer.")] = 1024,
    tokenizer: Annotated[str, typer.Option(help="Use this SentencePiece .model unchanged.")] = "",
    val: Annotated[
        str, typer.Option(help="Validation text. Default: files named val or validation (as a word), else a split.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Folder for the result. Default: the cache.")] = None,
    field: Field = "text",
    split_digits: Annotated[bool, typer.Option(help="Every digit is a token of its own.")] = True,
    caseops: Annotated[
        bool, typer.Option("--caseops", help="Capitals as operators before lower-case letters.")
    ] = False,
    val_max_bytes: Annotated[int, typer.Option(min=1, help="Most text a split of ours holds back.")] = 300_000,
    workers: Annotated[
        int, typer.Option(min=0, max=1024, help="Tokenising processes; 0 = one for each processor.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Turn text into a tokenizer and shards; the same content and settings are prepared once."""
    from paramgolf.data.dataset import prepare
    from paramgolf.data.progress import ProgressReport
    from paramgolf.data.tokenizer import Tokenizer
    from paramgolf.recipe.sections import DataSection

    section = DataSection(
        train=source, val=val, tokenizer=tokenizer, text_field=field, split_digits=split_digits, caseops=caseops,
        vocab_size=Tokenizer.load(tokenizer).vocab_size if tokenizer else vocab_size, val_max_bytes=val_max_bytes,
    )  # fmt: skip
    with ProgressReport() as progress:
        data = prepare(section, cache=_cache(), progress=progress, workers=workers, out=out)
    passport = data.passport
    if passport.get("skipped_files"):
        typer.echo(f"note: left out: {', '.join(passport['skipped_files'])}", err=True)
    lines = [f"{data.root}"]
    for side in ("train", "val"):
        part = passport[side]
        known = [f"{part[key]:,} {key}" for key in ("documents", "tokens", "bytes") if part[key] is not None]
        lines.append(f"{side:<6} {', '.join(known)}")
    lines.append(f"vocabulary {data.tokenizer.vocab_size}, validation by {passport['split']}")
    if passport.get("removed_from_train"):
        lines.append(f"removed from training as copies of validation: {passport['removed_from_train']} documents")
    emit({"folder": str(data.root), **passport}, as_json, "\n".join(lines))


@app.command("fetch", epilog="Example: golf data fetch fineweb --variant sp1024 --train-shards 1 --out data/fineweb")
def fetch_command(
    name: Annotated[str, typer.Argument(help="What to fetch: fineweb.")],
    variant: Annotated[str, typer.Option(help="Tokenizer family: sp1024, sp4096, sp8192, ...")] = "sp1024",
    train_shards: Annotated[int, typer.Option(min=0, help="Training shards of 100 million tokens, 200 MB each.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder. Default: the cache.")] = None,
    repository: Annotated[str, typer.Option(help="Dataset repository of the hub.")] = "",
    revision: Annotated[str, typer.Option(help="Branch or commit of the repository.")] = "main",
    as_json: AsJson = False,
) -> None:
    """Download published shards with their tokenizer (HF_ENDPOINT names another server); run again to continue."""
    from paramgolf.data.fetch import REPOSITORY, fetch_fineweb
    from paramgolf.data.progress import ProgressReport

    if name != "fineweb":
        raise GolfError(f"unknown data '{name}'; known: fineweb")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with ProgressReport() as progress:
        result = fetch_fineweb(
            variant, train_shards, out or _cache() / "fineweb", repository=repository or REPOSITORY,
            revision=revision, progress=progress,
        )  # fmt: skip
    size = sum(file["bytes"] for file in result["files"])
    text = f"{result['folder']}\n{len(result['files'])} files, {size:,} bytes, {result['kept']} were there already"
    emit(result, as_json, text)


@app.command("inspect", epilog="Example: golf data inspect data/notes --json")
def inspect_command(
    path: Annotated[str, typer.Argument(help="A prepared folder, a folder of shards, or text; empty = built-in.")] = "",
    tokenizer: Annotated[str, typer.Option(help="Tokenise text with this .model file.")] = "",
    documents: Annotated[str, typer.Option(help="The original text of validation shards that lie without it.")] = "",
    field: Field = "text",
    as_json: AsJson = False,
) -> None:
    """Documents, tokens, bytes, the byte table against the true bytes, copies between training and validation."""
    from paramgolf.data.inspect import inspect, text_of

    result = inspect(path, tokenizer=tokenizer, documents=documents, field=field, cache=_cache())
    emit(result, as_json, text_of(result))
