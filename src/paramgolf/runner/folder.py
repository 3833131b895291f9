"""A run folder: who may write into it, and what lies where."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from paramgolf import strict_json
from paramgolf.errors import GolfError
from paramgolf.files import atomic_write
from paramgolf.recipe.load import load_recipe, to_table, to_toml
from paramgolf.recipe.sections import Recipe
from paramgolf.runner.form import SHOWN, check_record


@dataclass(frozen=True)
class RunFolder:
    """`recipe.toml`, `data.json`, `train.jsonl`, `checkpoints/`, `model.golf`, `record.json`, `report.html`."""

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

    @property
    def frontier(self) -> Path:
        """What `golf pack --frontier` measured, where it was asked for."""
        return self.root / "frontier.json"

    @property
    def source(self) -> Path:
        """The code of the run, as a tar.xz file."""
        return self.root / "source.tar.xz"

    @property
    def data(self) -> Path:
        """The passport of the run's data: a resumed run must go on with the same."""
        return self.root / "data.json"

    def same_data(self, passport: dict[str, Any]) -> None:
        """Keep the passport of a new run; of a resumed one, refuse other data."""
        if not self.data.is_file():
            atomic_write(self.data, json.dumps(passport, indent=1).encode())
            return
        before = self.passport()
        changed = [key for key in ("tokenizer", "train", "val") if before.get(key) != passport[key]]
        if changed:
            raise GolfError(f"--resume: {', '.join(changed)} of the data differ from {self.data}; give the run's data")

    def passport(self) -> dict[str, Any]:
        """The passport of the data that the run trains on. GolfError where it cannot be read or is none."""
        return _table(self.data, "passport of data")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Refuse a folder in which another process is at work; the lock goes with the process, however it ends."""
        path = self.root / ".lock"
        with path.open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                who = "another process is running in it; wait for it or stop it first"
                raise GolfError(f"{self.root}: {who}") from None
            yield
            path.unlink(missing_ok=True)

    def abandon(self) -> None:
        """Leave nothing of a run that ended before its first step."""
        begun = self.log.is_file() and self.log.stat().st_size
        if begun or any((self.root / "checkpoints").glob("*")):
            return
        for path in (self.root / "recipe.toml", self.root / ".lock", self.data, self.log):
            path.unlink(missing_ok=True)
        for folder in (self.root / "checkpoints", self.root):
            with contextlib.suppress(OSError):  # not there, or with something of the user's in it
                folder.rmdir()

    def clear(self) -> None:
        """Remove halves of files that a killed run left; to be called under the lock."""
        for stray in self.root.glob(".*.tmp"):
            stray.unlink(missing_ok=True)

    def read_record(self) -> dict[str, Any] | None:
        """The record of a finished run, or None while there is none."""
        if not self.record.is_file():
            return None
        return check_record(_table(self.record, "record of a run"), self.record, SHOWN)


def _table(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file of a run folder; GolfError where there is none."""
    try:
        table = strict_json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise GolfError(f"{path} cannot be read: {str(error)[:80]}; put it back or choose another run") from None
    if not isinstance(table, dict):
        raise GolfError(f"{path} is no {what}; put it back or choose another run")
    return table


def new_root(recipe: Recipe) -> Path:
    """Make `runs/<recipe>-<timestamp>`; of runs that begin in the same second each gets its own."""
    stem = Path("runs") / f"{recipe.name}-{datetime.now():%Y%m%d-%H%M%S}"
    for n in itertools.count(1):
        root = stem if n == 1 else stem.with_name(f"{stem.name}-{n}")
        with contextlib.suppress(FileExistsError):
            root.mkdir(parents=True)
            break
    return root


def claim(out: Path | None, recipe: Recipe, *, resume: bool, note: Callable[[str], None]) -> dict[str, str]:
    """Choose and claim the folder of a run: {"root": its path, "train": what it is trained on (`data.train`)}.

    Without `out` a new folder is made, or with `resume` the newest unfinished one of the same recipe is taken.
    """
    toml = _encoded(recipe)
    root = out or (_unfinished(recipe, note) if resume else None) or new_root(recipe)
    return {"root": str(root), "train": _open(root, recipe, toml, resume=resume).data.train}


def _unfinished(recipe: Recipe, note: Callable[[str], None]) -> Path | None:
    for saved in sorted(Path("runs").glob(f"{glob.escape(recipe.name)}-*/recipe.toml"), reverse=True):
        with contextlib.suppress(GolfError):  # of an older version, say: not one to go on with
            if not RunFolder(saved.parent).record.is_file() and not _differences(load_recipe(str(saved)), recipe):
                note(f"--resume without --out: going on with {saved.parent}")
                return saved.parent
    return None


def _encoded(recipe: Recipe) -> bytes:
    try:
        return to_toml(recipe).encode()
    except UnicodeEncodeError:
        raise GolfError(f"{recipe.data.train!a} is no name in UTF-8, as a recipe file needs it; rename it") from None


def _open(root: Path, recipe: Recipe, toml: bytes, *, resume: bool) -> Recipe:
    """Claim `root` for this recipe, whose file is to be `toml`. A folder with another run in it is refused, one of the
    same run is resumed."""
    if root.exists() and not root.is_dir():
        raise GolfError(f"--out {root} is a file; choose a folder")
    saved = root / "recipe.toml"
    try:
        occupied = root.is_dir() and any(root.iterdir())
    except OSError as error:
        raise GolfError(f"--out {root} cannot be read: {error.strerror}; choose another folder") from None
    if occupied and not saved.is_file():
        raise GolfError(f"--out {root} holds other files; choose an empty or new folder")
    if occupied and not resume:
        raise GolfError(f"--out {root} already holds a run; add --resume to go on with it, or choose another folder")
    if not occupied:
        _begin(saved, toml)
        return recipe
    before = load_recipe(str(saved))
    changed = _differences(before, recipe)
    if changed:
        raise GolfError(f"--resume: {', '.join(changed)} differ from {saved}; resume with the recipe of the run")
    return recipe if recipe.data.train else before


def _begin(saved: Path, toml: bytes) -> None:
    """Write the recipe of a new run. Of several processes that begin one in the same folder at once, one does."""
    try:
        saved.parent.mkdir(parents=True, exist_ok=True)
        saved.open("xb").close()
    except FileExistsError:
        if saved.is_file():
            raise GolfError(f"--out {saved.parent}: another run has just begun in it; choose another folder") from None
    except OSError:
        pass  # the write below says what is wrong
    try:
        atomic_write(saved, toml)
    except GolfError:
        with contextlib.suppress(OSError):
            saved.unlink()
        raise


def _differences(old: Recipe, new: Recipe) -> list[str]:
    """Keys with different values. Where the training text lies is left out: its content is compared (`same_data`)."""
    before, after = to_table(old), to_table(new)
    before["data"]["train"] = after["data"]["train"]
    sections = [key for key in after if key not in ("title", "extends") and before[key] != after[key]]
    keys: list[str] = []
    for section in sections:
        a, b = before[section], after[section]
        keys += [f"{section}.{k}" for k in b if a[k] != b[k]] if isinstance(b, dict) else [section]
    return keys
