"""Everything a user can get wrong gives one line and leaves nothing half-written."""

from __future__ import annotations

import gzip
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from paramgolf.cli import main
from paramgolf.data.shards import header, write_shard
from paramgolf.recipe.load import load_recipe, recipe_names
from paramgolf.runner.run import check
from paramgolf.train.checkpoint import Store
from tests.run_common import TINY, error_line, golf_here, prose, refused

CapFd = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(["run", "pocket", *TINY, "--out", str(out)]) == 0
    return out


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(prose())
    return path


# -- text and shards -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ["empty"]),
        (b" ", ["cannot be split"]),
        (np.random.default_rng(1).bytes(5000), ["text.txt", "not UTF-8", "offset"]),
        ("Straße und Bäume\n".encode("latin-1") * 400, ["text.txt", "not UTF-8", "0xdf at offset 4"]),
        (gzip.compress(b"text " * 400)[:-8] + b"\0" * 8, ["text.txt", "damaged", "make it again"]),
        (gzip.compress(b"text " * 400) + b"junk", ["text.txt", "damaged", "make it again"]),
    ],
    ids=["empty", "one space", "binary", "latin-1", "gzip sum", "gzip junk"],
)
def test_text_that_is_none(capfd: CapFd, tmp_path: Path, content: bytes, expected: list[str]) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    line = refused(capfd, tmp_path, "--data", path)
    assert all(word in line for word in expected), line


def test_text_that_is_not_there(capfd: CapFd, tmp_path: Path) -> None:
    assert "/no/such" in refused(capfd, tmp_path, "--data", "/no/such")
    assert "no file matches" in refused(capfd, tmp_path, "--data", str(tmp_path / "*.md"))
    (tmp_path / "empty").mkdir()
    assert "it is empty" in refused(capfd, tmp_path, "--data", tmp_path / "empty")
    assert "line 1" in refused(capfd, tmp_path, "--data", jsonl(tmp_path, '{"body": "hello"}'))
    assert "not JSON" in refused(capfd, tmp_path, "--data", jsonl(tmp_path, "hello"))


def jsonl(tmp_path: Path, line: str) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the official ones: shards and a tokenizer, no passport."""
    prepared = Path(tmp_path_factory.mktemp("prepared"))
    source = prepared / "source.txt"
    source.write_text(prose())
    folder = prepared / "prepared"
    assert main(["data", "prepare", str(source), "--vocab-size", "512", "--out", str(folder)]) == 0
    (folder / "passport.json").unlink()
    (folder / "val.txt").unlink()
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-101])


def only_half_a_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


def other_magic(path: Path) -> None:
    path.write_bytes(b"\0" * 4 + path.read_bytes()[4:])


def other_version(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:4] + b"\7" + path.read_bytes()[5:])


def huge_count(path: Path) -> None:
    path.write_bytes(header(2**31 - 1) + path.read_bytes()[1024:])


def negative_count(path: Path) -> None:
    path.write_bytes(header(-5) + path.read_bytes()[1024:])


def no_tokens(path: Path) -> None:
    path.write_bytes(header(0))


def foreign_token(path: Path) -> None:
    tokens = np.fromfile(path, dtype="<u2", offset=1024)
    tokens[77] = 512
    write_shard(path, tokens)


@pytest.mark.parametrize("side", ["train", "val"])
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (cut, ["truncated"]),
        (only_half_a_header, ["truncated"]),
        (other_magic, ["not a token shard", "magic 0"]),
        (other_version, ["not a token shard", "version 7"]),
        (huge_count, ["truncated"]),
        (negative_count, ["-5 tokens"]),
        (no_tokens, ["no tokens"]),
        (foreign_token, ["512 at position 77", "vocabulary of 512"]),
    ],
)
def test_damaged_shards(
    capfd: CapFd, tmp_path: Path, shards: Path, damage: object, expected: list[str], side: str
) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    assert callable(damage)
    damage(folder / f"{side}_000000.bin")
    line = refused(capfd, tmp_path, "--data", folder)
    assert f"{side}_000000.bin" in line and all(word in line for word in expected), line


def test_tokenizer_of_another_vocabulary(capfd: CapFd, tmp_path: Path, shards: Path, text: Path) -> None:
    line = refused(capfd, tmp_path, "--data", shards, "data.vocab_size=600")
    assert "512 pieces" in line and "data.vocab_size=512" in line
    line = refused(
        capfd, tmp_path, "--data", text, "data.vocab_size=600", f"data.tokenizer={shards / 'tokenizer.model'}"
    )
    assert "512 pieces" in line and "data.vocab_size=512" in line
    (tmp_path / "broken.model").write_bytes((shards / "tokenizer.model").read_bytes()[:100])
    line = refused(capfd, tmp_path, "--data", text, f"data.tokenizer={tmp_path / 'broken.model'}")
    assert "broken.model" in line


def test_validation_shorter_than_a_window_is_scored(capfd: CapFd, tmp_path: Path, text: Path) -> None:
    val = tmp_path / "short.txt"
    val.write_text("the river")
    options = ["--data", text, f"data.val={val}", "score.stride=16"]
    answer = golf_here(capfd, "run", "pocket", *TINY, *options, "--out", tmp_path / "run", "--json")
    assert answer.code == 0, answer.err
    assert '"scored_bytes": 9' in answer.out


# -- recipes and values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_that_ships_is_accepted_as_it_is(name: str) -> None:
    check(load_recipe(name))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pokcet"], ["did you mean 'pocket'"]),
        (["/no/such.toml"], ["/no/such.toml"]),
        (["pocket", "model.dmi=3"], ["model.dmi", "did you mean 'dim'"]),
        (["pocket", "modle.dim=3"], ["did you mean 'model'"]),
        (["pocket", "dim=3"], ["section.key=value"]),
        (["pocket", "model.dim"], ["section.key=value"]),
        (["pocket", "model.dim=0"], ["model.dim = 0", "greater than or equal to 1"]),
        (["pocket", "model.dim=wide"], ["model.dim = 'wide'", "integer"]),
        (["pocket", "model.dim=[1]"], ["model.dim", "integer"]),
        (["pocket", "optim.momentum=1.5"], ["optim.momentum = 1.5", "less than or equal to 1"]),
        (["pocket", "optim.matrix_lr=nan"], ["optim.matrix_lr", "finite"]),
        (["pocket", "optim.matrix_lr=1e300"], ["optim.matrix_lr = 1e+300", "less than"]),
        (["pocket", "train.seq_len=0"], ["train.seq_len = 0"]),
        (["pocket", "score.stride=257"], ["score.stride is 257", "256 tokens"]),
        (["pocket", "train.dtype=float8"], ["train.dtype = 'float8'", "'bfloat16'"]),
        (["pocket", "train.device=tpu"], ["train.device", "cpu or cuda"]),
        (["baseline", "model.num_heads=5"], ["num_heads", "not a multiple"]),
        (["baseline", "model.num_kv_heads=3"], ["num_kv_heads"]),
        (["pocket", "model.activation=gelo"], ["known: leaky_relu2, relu2"]),
        (["pocket", "model.parts.smear_gat.x=1"], ["did you mean 'smear_gate'"]),
        (["pocket", "model.parts.smear_gate.x=1"], ["smear_gate", "x"]),
        (["pocket", "model.loop_layers=[1, 9]", "model.loop_extra=1"], ["loop_layers=[1, 9]", "layers 0 to 3"]),
        (["pocket-1", "model.lanes_from=4"], ["model.lanes_from=4", "after the last layer 3"]),
        (["baseline", "model.parts.xsa={}", "model.num_kv_heads=3"], ["num_heads=8", "num_kv_heads=3"]),
        (["pocket", "model.parts.xsa.last_layers=5"], ["last_layers=5", "num_layers=4"]),
        (["record-1.0611", "ttt.rank=0"], ["ttt.rank = 0"]),
        (["record-1.0565", "ttt.short_chunks=[[256, 0]]"], ["ttt.short_chunks", "greater than or equal to 1"]),
        (["pocket", "stages=[{at = 0.7, seq_len = 8192}]"], ["4096 tokens", "rows of 8192"]),
        (["pocket", "ttt.kind=lora", "ttt.chunk=300"], ["ttt.chunk=300", "256 tokens"]),
        (["pocket", "quant.awq_columns=16", "quant.method=rtn"], ["quant.awq_columns", "'gptq'"]),
        (["pocket", "quant.awq_columns=480"], ["quant.awq_columns=480", "widest has 480"]),
        (["pocket", "quant.awq_columns=16", "quant.grids.awq.bits=6"], ["quant.grids.awq", "of its own"]),
        (["pocket", "model.qk_gain=1e300"], ["model.qk_gain = 1e+300"]),
        (["pocket", "quant.coarse_grid=int5"], ["quant.coarse_grid", "int5"]),
        (["pocket", "quant.grids.int6.bits=9"], ["quant.grids.int6.bits = 9"]),
        (["pocket", "quant.qat=int7"], ["quant.qat", "int7"]),
        (["pocket", "quant.method=rtx"], ["did you mean 'rtn'"]),
        (["pocket", "data.vocab_size=100"], ["data.vocab_size = 100"]),
        (["pocket", "--seconds", "-5"], ["budget.seconds = -5"]),
        (["pocket", "--seconds", "soon"], ["budget.seconds = 'soon'"]),
        (["pocket", "--seconds", "nan"], ["budget.seconds"]),
        (["pocket", "--bytes", "-1"], ["budget.bytes = -1"]),
        (["pocket", "--bytes", "1.5"], ["budget.bytes = 1.5"]),
        (["pocket", "--frobnicate"], ["--frobnicate"]),
        (["pocket", "--from-env", "MLP_HIDEN=3"], ["did you mean"]),
        (["pocket", "--from-env", "hello"], ["no VARIABLE=value"]),
        (["pocket", "budget.seconds=0"], ["nothing ends the training"]),
        ([], ["argument 'recipe'; see"]),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_unknown_names_and_values(
    capfd: CapFd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = error_line(golf_here(capfd, "run", *arguments))
    assert all(word in line for word in expected), line
    assert list(tmp_path.iterdir()) == []


def test_a_broken_recipe_file(capfd: CapFd, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    for content, expected in [
        (b"title = ", "not valid TOML"),
        (b"\xff\xfe", "cannot read recipe"),
        (b'extends = "nothing"', "no recipe 'nothing'"),
        (f'extends = "{recipe}"'.encode(), "extends itself"),
        (b'extends = "pocket"\n[model]\ndimm = 3', "mine.toml"),
        (b'extends = "pocket"\nstages = 3', "stages"),
        (b"model = 3", "model"),
    ]:
        recipe.write_bytes(content)
        line = error_line(golf_here(capfd, "run", recipe, "--out", tmp_path / "run"))
        assert expected in line, line
        assert not (tmp_path / "run").exists()


def test_a_cap_that_is_too_small_names_one_that_does(capfd: CapFd, tmp_path: Path, text: Path) -> None:
    line = refused(capfd, tmp_path, "--data", text, "--bytes", "9000")
    cap = re.search(r"set budget\.bytes=(\d+)", line)
    assert cap, line
    answer = golf_here(
        capfd, "run", "pocket", *TINY, "--data", text, "--bytes", cap[1], "--out", tmp_path / "run", "--json"
    )
    assert answer.code == 0, answer.err
    size = (tmp_path / "run" / "model.golf").stat().st_size
    assert 0.7 * int(cap[1]) < size <= int(cap[1])


def test_weights_that_do_not_fit_name_the_size_that_would(capfd: CapFd, tmp_path: Path, text: Path) -> None:
    """Found only when packing: the size plan gave hope. No artifact is left; what the message names is enough."""
    arguments = ["run", "pocket", *TINY, "model.mlp_hidden=1000", "pack.codec=zlib", "--data", text, "--out"]
    exact = golf_here(capfd, *arguments, tmp_path / "a", "--json")
    assert exact.code == 0, exact.err
    size = (tmp_path / "a" / "model.golf").stat().st_size
    line = error_line(golf_here(capfd, *arguments, tmp_path / "b", "--bytes", str(size - 1)))
    assert f"set budget.bytes={size}" in line and "1 over the cap" in line
    assert not (tmp_path / "b" / "model.golf").exists() and not (tmp_path / "b" / "record.json").exists()
    assert golf_here(capfd, *arguments, tmp_path / "c", "--bytes", str(size)).code == 0


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(capfd: CapFd, tmp_path: Path, text: Path) -> None:
    recipe, out = tmp_path / "late.toml", tmp_path / "run"
    recipe.write_text('extends = "pocket"\nstages = [{ at = 0.0, lr_mul = 0.0 }, { at = 0.5, lr_mul = 1.0 }]\n')
    options = ["optim.matrix_lr=1e30", "train.checkpoint_every_steps=1", "--data", text, "--out", out]
    line = error_line(golf_here(capfd, "run", recipe, *TINY, *options))
    assert "diverged at step 4" in line and "optim.*_lr" in line, line
    kept = Store(out / "checkpoints").newest(pytest.fail)
    assert kept is not None and kept.step == 3 and "the checkpoint of step 3 is kept" in line
    assert all(np.isfinite(t.numpy()).all() for t in kept.part("model").values())
    assert not (out / "model.golf").exists() and not (out / "record.json").exists()


def test_a_run_that_diverges_at_once_says_so(capfd: CapFd, tmp_path: Path, text: Path) -> None:
    line = error_line(
        golf_here(capfd, "run", "pocket", *TINY, "optim.matrix_lr=1e30", "--data", text, "--out", tmp_path / "run")
    )
    assert "diverged at step" in line and "no earlier checkpoint" in line


def test_a_folder_that_holds_something_else(capfd: CapFd, tmp_path: Path, finished: Path) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    line = error_line(golf_here(capfd, "run", "pocket", *TINY, "--out", finished))
    assert "already holds a run" in line and "--resume" in line
    line = error_line(golf_here(capfd, "run", "pocket", *TINY, "train.seed=5", "--out", finished, "--resume"))
    assert "train.seed differ" in line
    line = error_line(golf_here(capfd, "run", "baseline", *TINY, "--out", finished, "--resume"))
    assert "differ" in line
    assert before == {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    letter = tmp_path / "letter.txt"
    letter.write_text("mine")
    assert "holds other files" in error_line(golf_here(capfd, "run", "pocket", *TINY, "--out", tmp_path))
    assert "is a file" in error_line(golf_here(capfd, "run", "pocket", *TINY, "--out", letter))
    below = golf_here(capfd, "run", "pocket", *TINY, "--out", letter / "run")
    assert "letter.txt" in error_line(below)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["letter.txt"]


# -- artifacts -------------------------------------------------------------------------------------------------


def damaged(data: bytes) -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "one byte", data[:1]
    yield "magic only", data[:8]
    yield "cut", data[: len(data) // 2]
    yield "one byte short", data[:-1]
    yield "one byte more", data + b"\0"
    yield "another magic", b"GIF89a" + data[6:]
    yield "zeros", bytes(len(data))
    yield "random", np.random.default_rng(3).bytes(len(data))
    for at in (4, 9, 15, 40, len(data) // 3, len(data) - 5):
        yield f"flipped {at}", data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]
    yield "a zip bomb's head", zlib.compress(bytes(10_000_000))
    yield "huge lengths", data[:8] + b"\xff" * 24 + data[32:]


def test_damaged_artifacts(capfd: CapFd, tmp_path: Path, finished: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("hello")
    path = tmp_path / "model.golf"
    for what, data in damaged((finished / "model.golf").read_bytes()):
        path.write_bytes(data)
        line = error_line(golf_here(capfd, "score", path, "--data", text))
        assert str(path) in line, (what, line)
        assert error_line(golf_here(capfd, "sample", path, "hello")), what
    assert str(path) in error_line(golf_here(capfd, "inspect", path))


def test_scoring_what_is_no_text(capfd: CapFd, tmp_path: Path, finished: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_bytes(b"")
    assert "empty" in error_line(golf_here(capfd, "score", finished, "--data", empty))
    empty.write_bytes(b"\xff")
    assert "not UTF-8" in error_line(golf_here(capfd, "score", finished, "--data", empty))
    assert "/no/such" in error_line(golf_here(capfd, "score", finished, "--data", "/no/such"))
