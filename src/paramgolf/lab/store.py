"""The index of finished runs: `runs/index.sqlite`, made from the run folders and never more than a copy of them.

`Index.sync` reads the records that are new or changed since the last time and forgets those that are gone, so that
the file may be deleted at any moment, and a run needs no index to finish. Writers take sqlite's own lock for one
short transaction; a file that is no index of ours is made anew.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import operator
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from paramgolf.errors import GolfError
from paramgolf.lab.records import find_runs, modified_ns, parse_record, read_bytes
from paramgolf.registry import close_match

VERSION = 2
NAME = "index.sqlite"
_SCHEMA = "CREATE TABLE runs (path BLOB PRIMARY KEY, mtime_ns INTEGER, size INTEGER, facts TEXT, problem TEXT)"
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_LEFT_OUT = ("peers", "paths", "format")
COLUMNS = ("run", "recipe", "seed", "val_bpb", "val_bpb_sliding", "total_bytes", "steps", "seconds.strict", "finished")

Facts = dict[str, Any]


def index_runs(root: str | Path) -> tuple[list[Facts], list[str]]:
    """(flat facts of every finished run below `root`, one line for each record that cannot be read), oldest first.

    Raises GolfError if there is no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise GolfError(f"no folder {root}; finished runs are looked for in runs/, or name another with --root")
    try:
        with _opened(root / NAME) as connection:
            try:
                return _synced(connection, root)
            except (ValueError, TypeError, RecursionError):  # rows that are not ours
                connection.execute("DELETE FROM runs")
                return _synced(connection, root)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
            raise GolfError(f"{root / NAME} is locked by another program; try again") from None
    # It cannot be written, or is no index: the records themselves are enough for an answer.
    with contextlib.closing(_fresh(sqlite3.connect(":memory:", isolation_level=None))) as connection:
        return _synced(connection, root)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to an index of this version; a damaged file, or one of another version, is replaced."""
    connection = sqlite3.connect(path, timeout=60, isolation_level=None)
    try:
        try:
            current = connection.execute("PRAGMA user_version").fetchone()[0] == VERSION
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            connection.close()
            path.unlink(missing_ok=True)  # derived data: nothing is lost
            connection, current = sqlite3.connect(path, timeout=60, isolation_level=None), False
        yield connection if current else _fresh(connection)
    finally:
        connection.close()


def _fresh(connection: sqlite3.Connection) -> sqlite3.Connection:
    connection.execute("BEGIN IMMEDIATE")
    if connection.execute("PRAGMA user_version").fetchone()[0] != VERSION:  # nobody else was faster
        connection.execute("DROP TABLE IF EXISTS runs")
        connection.execute(_SCHEMA)
        connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")
    return connection


def _synced(connection: sqlite3.Connection, root: Path) -> tuple[list[Facts], list[str]]:
    known = {os.fsdecode(row[0]): row[1:] for row in connection.execute("SELECT path, mtime_ns, size FROM runs")}
    there: dict[str, tuple[int, int]] = {}
    for record in find_runs(root):
        with contextlib.suppress(OSError):  # removed this moment
            state = record.stat()
            there[str(record.parent.relative_to(root))] = (modified_ns(state), state.st_size)
    new = [_row(root, path, state) for path, state in there.items() if known.get(path) != state]
    gone = [(os.fsencode(path),) for path in known if path not in there]
    if new or gone:
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("DELETE FROM runs WHERE path = ?", gone)
        connection.executemany("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?)", new)
        connection.execute("COMMIT")
    rows = connection.execute("SELECT facts, problem FROM runs ORDER BY mtime_ns, path").fetchall()
    # One document, parsed at once: its keys are made only once.
    facts = json.loads(f"[{','.join(text for text, problem in rows if not problem)}]")
    if not all(isinstance(each, dict) for each in facts):
        raise ValueError("facts that are no table")
    return facts, [problem for _, problem in rows if problem]


def _row(root: Path, path: str, state: tuple[int, int]) -> tuple[bytes, int, int, str, str]:
    """What is stored of a record. A folder's name may be no UTF-8, which sqlite has no texts for."""
    key = os.fsencode(path)
    try:
        record = parse_record(read_bytes(root / path / "record.json"), root / path / "record.json")
    except GolfError as error:
        return key, *state, "", str(error).encode(errors="backslashreplace").decode()
    finished = datetime.fromtimestamp(state[0] / 1e9).isoformat(" ", "seconds")
    facts = {"run": str(root / path), **flatten(record), "finished": finished}
    return key, *state, json.dumps(facts, separators=(",", ":")), ""


def flatten(record: dict[str, Any], prefix: str = "") -> Facts:
    """Every number, string and truth value of a record under its dotted key; lists and the long tail left out."""
    flat: Facts = {}
    for key, value in record.items():
        if isinstance(value, dict) and not (prefix == "" and key in _LEFT_OUT):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, str | int | float) and key not in _LEFT_OUT:
            flat[f"{prefix}{key}"] = value
    return flat


def select(runs: list[Facts], filters: list[str], sort: str = "", *, reverse: bool = False) -> list[Facts]:
    """The runs that fit every filter (`key=value`, also != < <= > >=, `*` in texts), sorted; runs without the key
    come last. GolfError for a filter of another form or a key that no run has."""
    keys = {key for facts in runs for key in facts}
    for text in filters:
        match = re.fullmatch(r"([\w. -]+?)(<=|>=|!=|=|<|>)(.*)", text)
        if not match:
            raise GolfError(f"filter '{text}' is not of the form key=value, e.g. recipe=pocket or val_bpb<2.1")
        key, sign, wanted = match.groups()
        _check_key(key, keys, runs)
        runs = [facts for facts in runs if key in facts and _fits(facts[key], sign, wanted)]
    if sort:
        _check_key(sort, keys, runs)
        have = [facts for facts in runs if sort in facts]
        numbers = all(isinstance(facts[sort], int | float) for facts in have)
        have.sort(key=lambda facts: facts[sort] if numbers else str(facts[sort]), reverse=reverse)
        return have + [facts for facts in runs if sort not in facts]
    return runs[::-1] if reverse else runs


def _check_key(key: str, keys: set[str], runs: list[Facts]) -> None:
    if runs and key not in keys:
        raise GolfError(f"no run has '{key}'{close_match(key, sorted(keys))}")


def _fits(value: Any, sign: str, wanted: str) -> bool:
    if isinstance(value, bool):
        return _COMPARE[sign](str(value).lower(), wanted.lower())
    if isinstance(value, int | float):
        try:
            return _COMPARE[sign](value, float(wanted))
        except ValueError:
            return sign == "!="
    if sign in ("=", "!="):
        return fnmatch.fnmatchcase(value, wanted) == (sign == "=")
    return _COMPARE[sign](value, wanted)


def runs_text(runs: list[Facts]) -> str:
    """One line a run, columns aligned (written here because 5,000 rows take a table library seconds)."""
    if not runs:
        return "no finished run fits"
    rows = [list(COLUMNS), *([_cell(facts.get(key)) for key in COLUMNS] for facts in runs)]
    rows[0] = [name.replace("val_bpb_sliding", "sliding").replace("seconds.strict", "seconds") for name in COLUMNS]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    left = ("run", "recipe", "finished")
    pads = [str.ljust if name in left else str.rjust for name in COLUMNS]
    lines = ("  ".join(pad(cell, n) for cell, n, pad in zip(row, widths, pads, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"
    return " ".join(str(value).split())  # a record is anybody's: no control characters, no second line
