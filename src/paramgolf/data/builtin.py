"""The built-in corpus: text that every Python installation carries, read from the running interpreter.

Documents are the standard library's source files and the help topics of `pydoc`. Left out: tests, generated tables
(encodings, Unicode and HTML entity tables, build configuration), installed packages, and parts that distributions
ship separately or that later versions dropped (tkinter, idlelib, turtledemo, distutils, lib2to3, ensurepip), so that
machines with the same Python version see the same text.
"""

from __future__ import annotations

import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from paramgolf.data.sources import SEPARATOR, Document
from paramgolf.errors import GolfError

_LEFT_OUT_DIRS = {
    "__pycache__", "test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload",
    "encodings", "pydoc_data", "tkinter", "idlelib", "turtledemo", "distutils", "lib2to3", "ensurepip",
}  # fmt: skip
_LEFT_OUT_FILES = {"html/entities.py", "stringprep.py", "this.py", "sre_constants.py", "re/_constants.py"}
_LEFT_OUT_PREFIXES = ("_sysconfigdata", "config-")


def version() -> str:
    """Name of the corpus: the text depends on the Python version."""
    return f"python-{platform.python_version()}"


def documents() -> Iterator[Document]:
    """The documents, sorted by name; each holds UTF-8 text and is not empty."""
    root = Path(sysconfig.get_path("stdlib"))
    if not root.is_dir():
        raise GolfError(f"this Python carries no library sources ({root} is missing); give a text with --data")
    for name in sorted(_source_names(root)):
        yield from _document(name, (root / name).read_bytes())
    yield from _topics()


def _source_names(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT_DIRS]
        for file in files:
            name = Path(folder, file).relative_to(root).as_posix()
            if name.endswith(".py") and name not in _LEFT_OUT_FILES and not name.startswith(_LEFT_OUT_PREFIXES):
                yield name


def _topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some minimal images strip the help topics
        return
    for name in sorted(topics):
        yield from _document(f"pydoc/{name}", topics[name].encode())


def _document(name: str, data: bytes) -> Iterator[Document]:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:  # an old source in another encoding
        return
    if data.strip() and SEPARATOR not in data:
        yield Document(data, name)
