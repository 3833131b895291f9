"""Reading records that may come from anybody: unsealed, cut off, of a newer version."""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paramgolf import strict_json
from paramgolf.errors import GolfError
from paramgolf.recipe.load import check_depth
from paramgolf.runner.folder import RunFolder
from paramgolf.runner.form import NAMED, check_record
from paramgolf.runner.record import FORMAT, SEAL, seal

MAX_RECORD = 16 * 2**20  # bytes; ours have about 5,000


def run_folder(path: Path) -> RunFolder:
    """The folder of a finished run, named by itself or by a file in it. GolfError if there is no record."""
    folder = RunFolder(path if path.is_dir() else path.parent)
    if not folder.record.is_file():
        raise GolfError(f"no record.json in {folder.root}; give the folder of a finished run")
    return folder


def parse_record(data: bytes, where: Path) -> dict[str, Any]:
    """The record in these bytes, its seal not checked. GolfError if it is none, or of a newer format."""
    if len(data) > MAX_RECORD:
        raise GolfError(f"{where}: {len(data):,} bytes is no record; give the folder of a run")
    try:
        record = strict_json.loads(data)
    except (ValueError, RecursionError) as error:
        raise GolfError(f"{where} is not valid JSON ({str(error)[:80]}); get the file again") from None
    if not isinstance(record, dict) or type(record.get("format")) is not int:
        raise GolfError(f"{where} is not the record of a run; give the folder of a run")
    if record["format"] > FORMAT:
        raise GolfError(
            f"{where}: record format {record['format']}, this program reads up to {FORMAT}; update paramgolf"
        )
    return record


def read_record(folder: RunFolder, needed: tuple[str, ...] = NAMED) -> dict[str, Any]:
    """The record of a finished run whose seal holds, which has the `needed` keys, and whose keys have their form.
    GolfError otherwise."""
    record = parse_record(read_bytes(folder.record), folder.record)
    if record.get(SEAL) != seal(record)[SEAL]:
        raise GolfError(f"{folder.record} was changed after it was sealed; see `golf verify {folder.root}`")
    return check_record(record, folder.record, needed)


def read_bytes(path: Path, limit: int = MAX_RECORD) -> bytes:
    """A small file, at most `limit` + 1 bytes of it. GolfError if it cannot be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(limit + 1)
    except OSError as error:
        raise GolfError(f"cannot read {path}: {error.strerror or error}") from None


def modified_ns(state: os.stat_result) -> int:
    """When a file was last written, in nanoseconds since 1970; a file system's odd times as the nearest of 64 bits."""
    return max(-(2**63), min(state.st_mtime_ns, 2**63 - 1))


def find_runs(root: Path, depth: int = 4) -> Iterator[Path]:
    """The `record.json` of every finished run below `root`, `root` itself included; links are not followed."""
    record = root / "record.json"
    if record.is_file():
        yield record
    elif depth and not (root / "recipe.toml").is_file():
        try:
            with os.scandir(root) as entries:
                names = sorted(e.name for e in entries if e.name[0] != "." and e.is_dir(follow_symlinks=False))
        except OSError:
            return
        for name in names:
            yield from find_runs(root / name, depth - 1)


def recipe_table(folder: RunFolder) -> dict[str, Any]:
    """The plain table of the run's recipe. GolfError if it cannot be read."""
    path = folder.root / "recipe.toml"
    try:
        table = tomllib.loads(read_bytes(path).decode())
    except (ValueError, RecursionError) as error:
        raise GolfError(f"{path} is not valid TOML: {error}; get the file again") from None
    check_depth(table, str(path))
    for key in ("train", "data", "budget", "pack"):
        if not isinstance(table.get(key, {}), dict):
            raise GolfError(f"{path}: {key} is no table; get the file again")
    return table


def identity(table: dict[str, Any]) -> str:
    """A hash of everything in a recipe but its seed, its title and where its text lies: equal for the runs of one
    recipe under several seeds."""
    rest = {key: value for key, value in table.items() if key not in ("title", "extends")}
    rest["train"] = {key: value for key, value in rest.get("train", {}).items() if key != "seed"}
    rest["data"] = {key: value for key, value in rest.get("data", {}).items() if key not in ("train", "val")}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, default=str).encode()).hexdigest()
