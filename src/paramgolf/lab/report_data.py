"""What `golf report` shows of each run: facts, a thinned loss curve, and whether the files still fit the seal."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from paramgolf.errors import GolfError
from paramgolf.files import sha256_file
from paramgolf.lab.records import find_runs, identity, modified_ns, parse_record, read_bytes, recipe_table
from paramgolf.lab.storage import CARD
from paramgolf.runner.folder import RunFolder
from paramgolf.runner.form import NAMED, LogPoint, check_record, log_point
from paramgolf.runner.record import SEAL, seal

CURVE_POINTS = 80
_NOT_SETTINGS = ("name", "title", "extends", "train.seed", "data.train", "data.val")
MAX_LOG = 64 * 2**20  # bytes of a train.jsonl that are read for its curve


@dataclass(frozen=True)
class RunFacts:
    """One run. `curve`: about 80 places, each with the mean loss around it. `settings`: the recipe's values as text, by
    dotted key."""

    path: str
    name: str
    record: dict[str, Any]
    identity: str
    finished: str
    seal: str  # "sealed", or what does not fit
    curve: list[LogPoint] = field(repr=False)
    settings: dict[str, str] = field(repr=False)

    @property
    def bpb(self) -> float:
        """The score that counts: sliding where the recipe asks for it."""
        sliding = self.record.get("val_bpb_sliding")
        return float(self.record["val_bpb"] if sliding is None else sliding)


def collect(arguments: list[str]) -> tuple[list[RunFacts], list[Path], list[str]]:
    """(runs, folders of studies among them, one line for each record that is left out) of folders and patterns."""
    records: dict[Path, Path] = {}
    studies: list[Path] = []
    for text in arguments:
        roots = [Path(text)] if Path(text).exists() else [Path(p) for p in sorted(glob.glob(text))]
        found = [record for root in roots for record in find_runs(root.parent if root.is_file() else root)]
        own = [root for root in roots if (root / CARD).is_file()]
        studies += own
        if not found and not own:
            raise GolfError(f"no finished run at {text}; give run folders, a folder of runs, or a sweep's folder")
        records |= {record.parent.resolve(): record for record in found}
    runs, problems = [], []
    for record in records.values():
        try:
            runs.append(read_run(RunFolder(record.parent)))
        except GolfError as error:
            problems.append(str(error))
    names = [run.name for run in runs]
    doubled = {name for name in names if names.count(name) > 1}
    runs = [RunFacts(**{**vars(run), "name": run.path}) if run.name in doubled else run for run in runs]
    return sorted(runs, key=lambda run: run.bpb), studies, problems


def read_run(folder: RunFolder) -> RunFacts:
    """The facts of one folder. Raises GolfError for a record without them."""
    needed = (*NAMED, "val_bpb", "total_bytes")
    record = check_record(parse_record(read_bytes(folder.record), folder.record), folder.record, needed)
    finished = datetime.fromtimestamp(modified_ns(folder.record.stat()) / 1e9).isoformat(" ", "minutes")
    table = recipe_table(folder)
    return RunFacts(
        str(folder.root), folder.root.name, record, identity(table), finished, seal_state(folder, record),
        curve(folder.log), {key: str(value) for key, value in _leaves(table) if key not in _NOT_SETTINGS},
    )  # fmt: skip


def _leaves(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def seal_state(folder: RunFolder, record: dict[str, Any]) -> str:
    """ "sealed" if the seal and the hashes of recipe, log and artifact hold; else what does not."""
    if record.get(SEAL) != seal(record)[SEAL]:
        return "the record was changed"
    wrong = []
    for key, path in (
        ("recipe", folder.root / "recipe.toml"), ("train_log", folder.log), ("artifact", folder.artifact)
    ):  # fmt: skip
        if not path.is_file():
            wrong.append(f"{path.name} is missing")
        elif sha256_file(path) != record.get("sha256", {}).get(key):
            wrong.append(f"{path.name} was changed")
    return ", ".join(wrong) or "sealed"


def curve(log: Path) -> list[LogPoint]:
    """The loss curve of a train.jsonl, thinned; [] without one."""
    try:
        data = read_bytes(log, MAX_LOG)
    except GolfError:
        return []
    lines = data.splitlines()
    some = map(log_point, lines[:: max(1, len(lines) // (16 * CURVE_POINTS))])
    points = [point for point in some if point is not None]
    size = max(1, -(-len(points) // CURVE_POINTS))
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [part[len(part) // 2]._replace(loss=sum(point.loss for point in part) / len(part)) for part in parts]
