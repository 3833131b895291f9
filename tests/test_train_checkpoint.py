"""Checkpoint files: exact, checked, never half written, and the one before a damaged one is found."""

from __future__ import annotations

import resource
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from paramgolf.errors import GolfError
from paramgolf.train.checkpoint import Snapshot, Store, check_writable, encode, read


def snapshot(step: int) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    shared = torch.randn(6, 4, generator=generator)
    tensors = {
        "model/a": shared,
        "model/view": shared.t(),  # shares memory and is not contiguous
        "model/half": torch.randn(3, generator=generator).bfloat16(),
        "model/empty": torch.zeros(0, 3),
        "rng/torch": torch.arange(9, dtype=torch.uint8),
        "optim/scalar": torch.tensor(1.5),
    }
    return Snapshot(step, tensors, {"loss": 0.1 + 0.2, "words": ["ü", None], "step": step})


def test_a_checkpoint_comes_back_exactly(tmp_path: Path) -> None:
    store = Store(tmp_path)
    saved = snapshot(3)
    back = read(store.save(saved))
    assert back.step == 3 and back.state == saved.state
    assert back.tensors.keys() == saved.tensors.keys()
    for name, tensor in saved.tensors.items():
        assert back.tensors[name].dtype == tensor.dtype and torch.equal(back.tensors[name], tensor)
    assert set(back.part("model")) == {"a", "view", "half", "empty"}
    assert encode(saved) == encode(back), "equal state, equal bytes"


def test_the_two_newest_are_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for step in (9, 10, 100, 1000):
        store.save(snapshot(step))
    assert [read(path).step for path in store.paths()] == [1000, 100]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["flip", "header", "cut", "empty", "garbage"])
def test_a_damaged_newest_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    store = Store(tmp_path)
    store.save(snapshot(1))
    path = store.save(snapshot(2))
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
    elif damage == "header":
        data[data.index(b"0.30000000000000004") + 3] ^= 1  # still JSON, another number
    path.write_bytes({"cut": data[:-7], "empty": b"", "garbage": b"\0" * 300}.get(damage, data))
    notes: list[str] = []
    found = store.newest(notes.append)
    assert found is not None and found.step == 1
    assert len(notes) == 1 and path.name in notes[0]
    store.drop_after(1)
    assert [p.name for p in store.paths()] == ["step-000000001.safetensors"]


def test_every_single_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = Store(tmp_path).save(snapshot(1))
    good = path.read_bytes()
    for position in range(0, len(good), 7):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x40]) + good[position + 1 :])
        try:
            again = read(path)
        except GolfError:
            continue
        # the only bytes that may change unnoticed are those that carry nothing
        assert again.state == snapshot(1).state
        assert all(torch.equal(again.tensors[k], t) for k, t in snapshot(1).tensors.items()), position


@pytest.mark.parametrize(
    "header",
    [
        '{"format": 1, "step": 1, "state": [], "crc32": {}}',
        '{"format": 1, "step": Infinity, "state": {}, "crc32": {}}',
        '{"format": 1, "step": 1e999, "state": {}, "crc32": {}}',
        '{"format": 1, "step": 1, "crc32": {}, "state": ' + "[" * 100_000,
        "[]",
    ],
)
def test_a_header_of_another_form_is_refused(tmp_path: Path, header: str) -> None:
    path = tmp_path / "step-000000001.safetensors"
    path.write_bytes(save({}, metadata={"paramgolf": f"{zlib.crc32(header.encode())} {header}"}))
    with pytest.raises(GolfError, match=f"checkpoint {path} cannot be read"):
        read(path)


def test_nothing_usable_is_none(tmp_path: Path) -> None:
    assert Store(tmp_path / "absent").newest(print) is None


def test_a_full_disk_is_one_clear_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    Store(tmp_path).save(snapshot(1))
    code = f"""
import resource, torch
from pathlib import Path
from paramgolf.errors import GolfError
from paramgolf.train.checkpoint import Snapshot, Store
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
try:
    Store(Path({str(tmp_path)!r})).save(Snapshot(2, {{"model/a": torch.zeros(9000)}}))
except GolfError as error:
    print(error)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cannot write" in answer.stdout and "free space" in answer.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001.safetensors"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 10_000


def test_a_folder_that_cannot_be_written_is_found_before_training(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(GolfError, match="cannot write"):
        check_writable(blocker / "checkpoints")


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-000000001.safetensors.abc.tmp").write_bytes(b"half")
    Store(tmp_path).clean()
    assert list(tmp_path.iterdir()) == []
