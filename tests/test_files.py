"""Files appear whole or not at all, and nothing but a file is replaced by one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from paramgolf.errors import GolfError
from paramgolf.files import atomic_path, atomic_write, user_path


def test_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file"
    atomic_write(target, b"one")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        raise ZeroDivisionError
    assert [path.name for path in target.parent.iterdir()] == ["file"] and target.read_bytes() == b"one"


def test_a_rename_replaces_no_folder_pipe_or_device(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("folder", "pipe", "null"):
        with pytest.raises(GolfError, match=f"{name}: it is no plain file"):
            atomic_write(tmp_path / name, b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "null", "pipe"]
    assert (tmp_path / "null").is_symlink()


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127])
def test_the_longest_names(tmp_path: Path, name: str) -> None:
    atomic_write(tmp_path / name, b"one")
    assert (tmp_path / name).read_bytes() == b"one"
    with pytest.raises(GolfError, match="File name too long"):
        atomic_write(tmp_path / f"{name}xx", b"one")


def test_a_tilde_that_is_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/a") == tmp_path / "a"
    assert user_path("~nobody-of-that-name/a") == Path("~nobody-of-that-name/a")
