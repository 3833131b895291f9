"""A run folder: who may write into it, and what lies where."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from paramgolf.errors import GolfError
from paramgolf.files import atomic_write
from paramgolf.recipe.load import load_recipe, to_table, to_toml
from paramgolf.recipe.sections import Recipe


@dataclass(frozen=True)
class RunFolder:
    """`recipe.toml`, `train.jsonl`, `checkpoints/`, `model.golf`, `record.json`, `report.html` under one root."""

    root: Path

    @property
    def artifact(self) -> Path:
        return self.root / "model.golf"

    @property
    def record(self) -> Path:
        return self.root / "record.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def log(self) -> Path:
        return self.root / "train.jsonl"

    def read_record(self) -> dict[str, Any] | None:
        """The record of a finished run, or None while there is none."""
        if not self.record.is_file():
            return None
        try:
            return json.loads(self.record.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise GolfError(f"{self.record} cannot be read: {error}; choose another --out") from None


def default_root(recipe: Recipe) -> Path:
    """`runs/<recipe>-<timestamp>`, never one that exists."""
    stem = Path("runs") / f"{recipe.name}-{datetime.now():%Y%m%d-%H%M%S}"
    candidate, n = stem, 1
    while candidate.exists():
        n += 1
        candidate = stem.with_name(f"{stem.name}-{n}")
    return candidate


def open_folder(root: Path, recipe: Recipe, *, resume: bool) -> RunFolder:
    """Claim `root` for this recipe. A folder with another run in it is refused, one of the same run is resumed."""
    folder = RunFolder(root)
    if root.exists() and not root.is_dir():
        raise GolfError(f"--out {root} is a file; choose a folder")
    saved = root / "recipe.toml"
    occupied = root.is_dir() and any(root.iterdir())
    if occupied and not saved.is_file():
        raise GolfError(f"--out {root} holds other files; choose an empty or new folder")
    if occupied and not resume:
        raise GolfError(f"--out {root} already holds a run; add --resume to go on with it, or choose another folder")
    if occupied:
        changed = _differences(load_recipe(str(saved)), recipe)
        if changed:
            raise GolfError(f"--resume: {', '.join(changed)} differ from {saved}; resume with the recipe of the run")
    else:
        atomic_write(saved, to_toml(recipe).encode())
    return folder


def _differences(old: Recipe, new: Recipe) -> list[str]:
    before, after = to_table(old), to_table(new)
    sections = [key for key in after if key not in ("title", "extends") and before[key] != after[key]]
    keys: list[str] = []
    for section in sections:
        a, b = before[section], after[section]
        keys += [f"{section}.{k}" for k in b if a[k] != b[k]] if isinstance(b, dict) else [section]
    return keys
