"""`golf submit`: finished runs as a submission of the challenge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paramgolf.cli_output import AsJson, emit

app = typer.Typer()

Packed = Annotated[bool, typer.Option("--compress-code", help="Pack the script; a readable copy beside.")]
Own = Annotated[bool, typer.Option("--own-tokenizer", help="For shards of a tokenizer made by golf.")]


@app.command("submit", epilog="Example: golf submit runs/a runs/b runs/c --out records/my_entry --author 'A. Name'")
def submit_command(
    runs: Annotated[list[Path], typer.Argument(help="Finished runs of one recipe under different seeds.")],
    out: Annotated[Path, typer.Option(help="The folder to write; it must be new.")],
    author: Annotated[str, typer.Option(help="Name for submission.json. Default: what git knows.")] = "",
    github_id: Annotated[str, typer.Option(help="GitHub account. Default: the author.")] = "",
    name: Annotated[str, typer.Option(help="Name of the submission. Default: the recipe's title.")] = "",
    compress_code: Packed = False,
    as_json: AsJson = False,
) -> None:
    """Write README.md, submission.json, a log for each seed and one self-contained train_gpt.py."""
    from paramgolf.submit.package import Author, known_author, submit

    who = Author(author, github_id or author) if author else known_author()
    made = submit(runs, out, author=who, name=name, compress_code=compress_code)
    sizes = made["code_bytes"]
    lines = [
        f"{made['folder']}: {', '.join(made['files'])}",
        f"code: {sizes['plain']:,} bytes in {sizes['lines']:,} lines, compressed {sizes['compressed']:,} bytes",
        f"total: {made['bytes_total']:,} bytes with {made['bytes_code']:,} of code; cap 16,000,000",
        f"val_bpb {made['val_bpb']:.6f}, val_loss {made['val_loss']:.6f}, seeds {made['seeds']}",
    ]
    emit(made, as_json, "\n".join(lines))


@app.command("script", epilog="Example: golf script pr114 -o train_gpt.py")
def script_command(
    recipe: Annotated[str, typer.Argument(help="A recipe name (see `golf recipes`) or a TOML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="The file to write.")] = Path("train_gpt.py"),
    own_tokenizer: Own = False,
) -> None:
    """Write the self-contained training script of a recipe, without any run."""
    from paramgolf.files import atomic_write
    from paramgolf.recipe.load import resolve
    from paramgolf.script.generate import generate
    from paramgolf.submit.package import packed_script

    text = generate(resolve(recipe, overrides or []).recipe, own_tokenizer=own_tokenizer).encode()
    atomic_write(out, text)
    lines, packed = text.count(b"\n"), len(packed_script(text))
    typer.echo(f"{out}: {len(text):,} bytes in {lines:,} lines; compressed {packed:,} bytes")
