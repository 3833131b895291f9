"""`record.json`: what ties a score to its causes. Flat result keys, and everything needed to check them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from paramgolf import __version__
from paramgolf.errors import GolfError
from paramgolf.files import atomic_write, sha256_bytes, sha256_file
from paramgolf.recipe.sections import Recipe
from paramgolf.runner.environment import environment, sources_sha256
from paramgolf.runner.folder import RunFolder

FORMAT = 1
SEAL = "seal_sha256"


def canonical(record: dict[str, Any]) -> bytes:
    """The bytes that the seal covers: sorted keys, no white space, without the seal itself."""
    body = {key: value for key, value in record.items() if key != SEAL}
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def seal(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the hash of everything else in it."""
    return record | {SEAL: sha256_bytes(canonical(record))}


def causes(recipe: Recipe, folder: RunFolder, source: Mapping[str, bytes]) -> dict[str, Any]:
    """The part of a record that is known without any result: versions, hashes, machine, seeds. `source`: the code."""
    return {
        "format": FORMAT,
        "paramgolf": __version__,
        "recipe": recipe.name,
        "seed": recipe.train.seed,
        "sha256": {
            "source": sources_sha256(source),
            "recipe": sha256_file(folder.root / "recipe.toml"),
            "artifact": sha256_file(folder.artifact),
            "train_log": sha256_file(folder.log),
        },
        "environment": environment(),
    }


def plain(value: Any) -> Any:
    """Dataclasses, tuples and numpy scalars as JSON values; a non-finite number is an error, not a `NaN`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, str | bytes):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise GolfError(f"a result is {value}, which no record can hold; the run is broken")
    if value is None or isinstance(value, int | float | bool):
        return value
    return str(value).encode("utf-8", "backslashreplace").decode()  # names of files need not be UTF-8


def write_record(folder: RunFolder, record: dict[str, Any]) -> dict[str, Any]:
    """Seal and write the record; returns it as written."""
    sealed = seal(plain(record))
    atomic_write(folder.record, json.dumps(sealed, indent=1, ensure_ascii=False).encode() + b"\n")
    return sealed
