"""Where the state of a study lives: a journal file in its folder, or a database that many machines can reach."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from paramgolf.errors import GolfError
from paramgolf.files import atomic_write

JOURNAL, CARD = "study.journal", "study.json"
_TRIES, _MADE_MEANWHILE = 6, ("duplicate key", "already exists", "UNIQUE constraint")


def optuna_module() -> ModuleType:
    """Optuna, quiet, loaded when a study needs it."""
    try:
        import optuna
    except ImportError:
        raise GolfError("sweeps need optuna; pip install 'paramgolf[lab]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


@contextmanager
def reachable(where: str) -> Iterator[None]:
    """What a storage raises when it is gone, locked or refuses us becomes one line."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

    try:
        yield
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise GolfError(f"--storage {shown(where)}: {_first(error)}; e.g. postgresql+psycopg://user@host/db") from None
    except (SQLAlchemyError, StorageInternalError) as error:
        raise GolfError(f"the study at {shown(where)} cannot be reached: {_first(error)}; try again") from None
    except OSError as error:
        raise GolfError(f"the study at {where} cannot be used: {error.strerror or error}") from None


@contextmanager
def readable(where: str) -> Iterator[None]:
    """The same while a study is opened, where a damaged journal shows itself as well."""
    try:
        with reachable(where):
            yield
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise GolfError(f"the study at {shown(where)} is damaged ({_first(error)}); choose another --out") from None


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def shown(url: str) -> str:
    """A storage URL without its password."""
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", url)


def open_storage(storage: str, folder: Path) -> Any:
    """An Optuna storage: of a URL (`scheme://...`), else the journal file at that path ("" = in the study's folder)."""
    if "://" in storage:
        return _database(storage)
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    path = Path(storage) if storage else folder / JOURNAL
    if path.is_dir():
        raise GolfError(f"--storage {path} is a folder; name the journal file or a database URL")
    path.parent.mkdir(parents=True, exist_ok=True)
    backend = JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path)))
    return optuna_module().storages.JournalStorage(backend)


def _database(url: str) -> Any:
    """An RDB storage. Machines that start at the same time all make the tables: who comes second tries again."""
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    for attempt in range(_TRIES):
        try:
            return optuna_module().storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
        except (IntegrityError, ProgrammingError, OperationalError) as error:
            if attempt == _TRIES - 1 or not any(word in str(error) for word in _MADE_MEANWHILE):
                raise
            time.sleep(0.2 * (attempt + 1))
    raise AssertionError("the last attempt returns or raises")


def write_card(folder: Path, name: str, storage: str, definition: dict[str, Any]) -> None:
    """`study.json`: what the study is and where its state lives, for `golf report` and for people. No passwords."""
    card = {"study": name, "storage": shown(storage) or JOURNAL, "definition": definition}
    atomic_write(folder / CARD, json.dumps(card, indent=1).encode() + b"\n")


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a study's folder. GolfError if there is none or it cannot be read."""
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        return {"study": str(card["study"]), "storage": str(card["storage"]), "definition": dict(card["definition"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GolfError(f"{folder / CARD} cannot be read ({error}); give the folder of a sweep") from None
