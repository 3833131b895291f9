"""Prepared datasets and their cache: made once, whole or not at all, and used only as their passport says."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from paramgolf.data.bpe import train_bpe
from paramgolf.data.cache import cache_root, remembered_sha256
from paramgolf.data.dataset import Dataset, prepare
from paramgolf.errors import GolfError
from paramgolf.files import sha256_file
from paramgolf.recipe.sections import DataSection
from tests.data_common import SMALL, topics, write


def test_the_same_content_is_prepared_once(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = prepare(SMALL, write(tmp_path / "a.txt", topics()), cache=cache)
    stamp = first.train_shards[0].stat().st_mtime_ns
    again = prepare(SMALL, tmp_path / "a.txt", cache=cache)
    assert again.root == first.root
    assert again.train_shards[0].stat().st_mtime_ns == stamp
    assert prepare(DataSection(vocab_size=301), tmp_path / "a.txt", cache=cache).root != first.root
    write(tmp_path / "a.txt", topics()[1:])
    assert prepare(SMALL, tmp_path / "a.txt", cache=cache).root != first.root
    assert not [p for p in cache.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("name", ["train_000000.bin", "val_000000.bin", "val.txt", "passport.json", "tokenizer.model"])
def test_a_damaged_cache_is_built_again(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a.txt", topics()[:30])
    made = prepare(SMALL, path, cache=tmp_path / "cache")
    good = (made.root / name).read_bytes()
    (made.root / name).write_bytes(good[:-2])
    again = prepare(SMALL, path, cache=tmp_path / "cache")
    assert again.root == made.root
    assert (again.root / name).read_bytes() == good


def test_two_at_once_end_with_one_dataset(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", topics()[:30])
    roots: list[Path] = []
    threads = [
        threading.Thread(target=lambda: roots.append(prepare(SMALL, path, cache=tmp_path / "cache").root))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(roots) == 3 and len(set(roots)) == 1
    Dataset.open(roots[0]).val_tokens()


_SIDES = '{"train": {"shards": [{"name": "a"}]}, "val": {"shards": [{"name": "b"}], "bytes": 1}, "tokenizer": '


@pytest.mark.parametrize(
    "passport",
    ["[]", "[" * 100_000, '{"train": 1}', '{"train": {"shards": []}, "val": "x"}', _SIDES + "[]}", _SIDES + "{}}"],
)
def test_a_passport_that_is_none(tmp_path: Path, passport: str) -> None:
    (tmp_path / "passport.json").write_text(passport)
    (tmp_path / "tokenizer.model").write_bytes(train_bpe([], 260).to_bytes())
    with pytest.raises(GolfError, match="not a prepared dataset"):
        Dataset.open(tmp_path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("split",), None),
        (("skipped_files",), [5]),
        (("skipped_files",), "notes.md"),
        (("removed_from_train",), "none"),
        (("val_documents_in_train",), "x"),
        (("source",), "x"),
        (("train", "documents"), "many"),
        (("train", "tokens"), None),
        (("val", "bytes"), "1"),
        (("val", "shards"), []),
        (("tokenizer", "sha256"), 5),
    ],
)
def test_a_passport_with_a_key_of_another_form_is_refused_by_name(
    tmp_path: Path, place: tuple[str, ...], value: object
) -> None:
    made = prepare(SMALL, write(tmp_path / "a.txt", topics()[:9]), cache=tmp_path / "cache", out=tmp_path / "out")
    passport = json.loads(json.dumps(made.passport))
    table = passport if len(place) == 1 else passport[place[0]]
    table[place[-1]] = value
    (made.root / "passport.json").write_text(json.dumps(passport))
    with pytest.raises(GolfError, match=rf"not a prepared dataset \({'.'.join(place)}\b.*prepare it again"):
        prepare(SMALL, made.root, cache=tmp_path / "cache")


def test_names_of_files_left_out_need_not_be_utf8(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / os.fsdecode(b"\xff.md")).touch()
    write(tmp_path / "text" / "a.txt", topics()[:9])
    data = prepare(SMALL, tmp_path / "text", cache=tmp_path / "cache")
    assert data.passport["skipped_files"] == ["\udcff.md"]


def test_a_prepared_folder_is_used_where_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", topics()[:30])
    made = prepare(SMALL, path, cache=tmp_path / "cache", out=tmp_path / "out")
    assert made.root == tmp_path / "out"
    used = prepare(SMALL, tmp_path / "out", cache=tmp_path / "cache")
    assert used.passport == made.passport
    with pytest.raises(GolfError, match=r"300 pieces, the recipe says data\.vocab_size = 400"):
        prepare(DataSection(vocab_size=400), tmp_path / "out", cache=tmp_path / "cache")
    for passport in (
        {**made.passport, "val": {**made.passport["val"], "sha256": "1" * 64}},
        {**made.passport, "tokenizer": {**made.passport["tokenizer"], "sha256": "1" * 64}},
        {
            **made.passport,
            "train": {**made.passport["train"], "shards": [{**made.passport["train"]["shards"][0], "sha256": ""}]},
        },
    ):
        (tmp_path / "out" / "passport.json").write_text(json.dumps(passport))
        with pytest.raises(GolfError, match=r"is not the file that passport\.json names; prepare it again"):
            prepare(SMALL, tmp_path / "out", cache=tmp_path / "cache")


def test_out_must_be_empty_or_ours(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(GolfError, match="not empty and not a prepared dataset"):
        prepare(SMALL, write(tmp_path / "a.txt", topics()[:30]), cache=tmp_path / "cache", out=tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_a_dataset_with_something_else_beside_it_is_not_replaced(tmp_path: Path) -> None:
    path, out = write(tmp_path / "a.txt", topics()[:30]), tmp_path / "out"
    prepare(SMALL, path, cache=tmp_path / "cache", out=out)
    (out / "notes.md").write_text("precious")
    assert prepare(SMALL, path, cache=tmp_path / "cache", out=out).root == out  # the same: nothing to do
    write(path, topics()[:20])
    with pytest.raises(GolfError, match="not a prepared dataset alone"):
        prepare(SMALL, path, cache=tmp_path / "cache", out=out)
    assert (out / "notes.md").read_text() == "precious"
    (out / "notes.md").unlink()
    assert prepare(SMALL, path, cache=tmp_path / "cache", out=out).root == out
    with pytest.raises(GolfError, match="not empty and not a prepared dataset"):
        prepare(SMALL, path, cache=tmp_path / "cache", out=path)


def test_hashes_are_remembered_of_files_that_did_not_change(tmp_path: Path) -> None:
    path, cache = tmp_path / "large", tmp_path / "cache"
    path.write_bytes(bytes(1 << 22))
    before, first = path.stat(), remembered_sha256(path, cache)
    path.write_bytes(b"\1" + bytes((1 << 22) - 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that keeps times
    second = remembered_sha256(path, cache)
    assert second != first and second == sha256_file(path)
    assert remembered_sha256(path, path / "no folder") == second  # where nothing can be remembered


def test_what_killed_processes_left_is_removed_in_time(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name in (
        ".0123456789abcdef0123.abcd_123",
        ".fedcba9876543210fedc.k_l_m_n_",
        "stdin.xyz.text",
        "0123456789abcdef0123",
    ):
        (cache / name).mkdir(parents=True)
        if name != ".fedcba9876543210fedc.k_l_m_n_":  # of a process that may be at work
            os.utime(cache / name, (0, 0))
    made = prepare(SMALL, write(tmp_path / "a.txt", topics()[:30]), cache=cache)
    left = {path.name for path in cache.iterdir()} - {made.root.name}
    assert left == {".fedcba9876543210fedc.k_l_m_n_", "0123456789abcdef0123"}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_that_changes_while_it_is_read_is_not_cached(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    row = json.dumps({"text": "more of it"}) + "\n"
    path.write_text("".join(json.dumps({"text": d.decode()}) + "\n" for d in topics()[:30]))

    def progress(phase: str, done: int, total: int | None) -> None:
        if phase == "tokenizer":  # between the two passes
            with path.open("a") as stream:
                stream.write(row)

    with pytest.raises(GolfError, match="changed while it was read"):
        prepare(SMALL, path, cache=tmp_path / "cache", progress=progress)
    assert not (tmp_path / "cache").exists() or list((tmp_path / "cache").iterdir()) == []


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)  # a container's user without a name
    monkeypatch.setenv("PARAMGOLF_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "paramgolf"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    with pytest.raises(GolfError, match="set PARAMGOLF_CACHE"):
        cache_root()


def test_passport_names_no_place_or_time(tmp_path: Path) -> None:
    roots = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        roots.append(prepare(SMALL, write(tmp_path / name / "a.txt", topics()[:30]), cache=tmp_path / name / "c").root)
    names = sorted(p.name for p in roots[0].iterdir())
    assert names == ["passport.json", "tokenizer.model", "train_000000.bin", "val.txt", "val_000000.bin"]
    for name in names:
        assert (roots[0] / name).read_bytes() == (roots[1] / name).read_bytes()
