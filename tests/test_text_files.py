"""Files through the model's coder and back; files that are not what they should be."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import random
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from paramgolf.data.bpe import train_bpe
from paramgolf.errors import GolfError
from paramgolf.files import sha256_file
from paramgolf.model.gpt import GPT
from paramgolf.pack.packer import pack_model
from paramgolf.recipe.load import load_recipe
from paramgolf.text.blocks import TextModel, decode_frame, encode_lanes
from paramgolf.text.format import HEADER_BYTES, Content, Frame, Kind, describe
from paramgolf.text.pieces import MAX_LANES
from paramgolf.text.stream import compress, decompress
from tests.run_common import error_line, golf_here, one_thread, prose

SIZES = ["model.dim=32", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1", "model.mlp_hidden=48"]


def make_artifact(path: Path, seed: int = 1) -> Path:
    recipe = load_recipe("pocket", [*SIZES, "train.seq_len=64", "score.seq_len=64", "budget.bytes=0"])
    tokenizer = train_bpe([prose().encode()], 1200)
    model = GPT(recipe.model, tokenizer.vocab_size)
    model.init_weights(seed)
    pack_model(model.state_dict(), recipe, tokenizer.compact(), path, tokenizer.vocab_size)
    return path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("model") / "model.golf")


@pytest.fixture(scope="module")
def model(artifact: Path) -> TextModel:
    return TextModel(artifact, device="cpu")


def packed(raw: bytes, model: TextModel, workers: int = 1) -> bytes:
    target = io.BytesIO()
    read, written = compress(io.BytesIO(raw), target, model, workers=workers)
    assert (read, written) == (len(raw), len(target.getvalue()))
    return target.getvalue()


def unpacked(data: bytes, model: TextModel, workers: int = 1) -> bytes:
    target = io.BytesIO()
    decompress(io.BytesIO(data), target, lambda: model, where="f.gtx", workers=workers)
    return target.getvalue()


def kinds(data: bytes) -> set[str]:
    return set(describe(io.BytesIO(data), "f.gtx")["frames"])


TEXT = prose()[3000:3700].encode()
INPUTS = {
    "empty": b"",
    "one byte": b"x",
    "text": TEXT,
    "documents": TEXT[:300] + b"\x1e\n" + TEXT[300:] + b"\x1e\n\x1e\n",
    "binary": random.Random(0).randbytes(5000),
    "broken utf-8": TEXT[:200] + b"\xff\xc3 \xe2\x96" + TEXT[200:400] + b"\x80",
    "scripts": "В начале 初めに Ἐν ἀρχῇ \u2581 \U0001f642 e\u0301 \ufb01".encode() * 9,
    "carriage returns": TEXT.replace(b"\n", b"\r\n"),
    "zeros": bytes(1_500_000),
}


@pytest.mark.parametrize("name", INPUTS)
def test_round_trip(name: str, model: TextModel) -> None:
    raw = INPUTS[name]
    data = packed(raw, model)
    assert unpacked(data, model) == raw
    assert len(data) <= 1.01 * len(raw) + 64


def test_the_model_is_used_where_it_is_better(model: TextModel) -> None:
    assert kinds(packed(TEXT, model)) == {"model"}
    assert kinds(packed(INPUTS["binary"], model)) == {"raw"}
    assert kinds(packed(INPUTS["zeros"], model)) == {"zstd"}
    assert kinds(packed(TEXT * 300, model)) <= {"zstd", "lzma"}


@pytest.mark.parametrize("content", [Content.FILE, Content.DOCUMENTS])
def test_lanes(content: Content, model: TextModel) -> None:
    header = model.header(content, stride=32)
    pieces = [prose()[at : at + 400].encode() for at in range(0, 4000, 400)]
    raw = (b"" if content is Content.FILE else b"\x1e\n").join(pieces)
    lanes = [model.tokenizer.encode_documents([piece]) for piece in pieces]
    starts = tuple(int(s) for s in np.cumsum([0, *map(len, lanes)])[:-1])
    joined = tuple(i == 0 for i in range(len(lanes)))  # before the others stands a separator
    payload, patched = encode_lanes(raw, header, model, np.concatenate(lanes), starts, joined)
    assert not patched
    crc = zlib.crc32(raw)
    assert decode_frame(Frame(Kind.MODEL, len(raw), crc, payload), header, model) == raw


def test_text_that_the_tokens_do_not_carry_is_patched(model: TextModel) -> None:
    header = model.header(Content.FILE)
    tokens = model.tokenizer.encode_documents([TEXT.replace(b"a", b"b")])
    payload, patched = encode_lanes(TEXT, header, model, tokens, (0,))
    assert patched
    frame = Frame(Kind.PATCHED, len(TEXT), zlib.crc32(TEXT), payload)
    assert decode_frame(frame, header, model) == TEXT


def test_every_damage_is_one_error(model: TextModel) -> None:
    data = packed(TEXT, model)
    rng = random.Random(1)
    places = [*range(0, 62, 4), *(rng.randrange(60, len(data)) for _ in range(6)), len(data) - 1]
    for at in places:
        damaged = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        # A number that decoding does not depend on, the coder's tolerance, may change: never the text.
        with contextlib.suppress(GolfError):
            assert unpacked(damaged, model) == TEXT and at >= 38
    for end in [0, 3, 20, 38, 45, len(data) - 17, len(data) - 1]:
        with pytest.raises(GolfError):
            unpacked(data[:end], model)
    with pytest.raises(GolfError, match="after the end"):
        unpacked(data + data, model)


def test_frames_that_would_unpack_to_more_are_stopped(model: TextModel) -> None:
    import zstandard

    bomb = zstandard.ZstdCompressor(level=3).compress(bytes(50_000_000))
    with pytest.raises(GolfError, match="checksum"):
        decode_frame(Frame(Kind.ZSTD, 5000, 0, bomb), model.header(Content.FILE), None)


def test_more_lanes_than_any_writer_makes_are_refused(model: TextModel) -> None:
    """Each would take keys and values of a whole window."""
    header = model.header(Content.FILE)
    tokens = np.array([model.tokenizer.bos_id, 5] * (MAX_LANES + 1), np.uint16)
    assert model.lane_limit(header.seq_len) > MAX_LANES
    for lanes in (MAX_LANES, MAX_LANES + 1):
        data = model.encode(header, tokens[: 2 * lanes], tuple(range(0, 2 * lanes, 2)))
        with contextlib.nullcontext() if lanes == MAX_LANES else pytest.raises(GolfError, match="impossible size"):
            assert len(model.decode(header, data, 1000)) == MAX_LANES


def test_windows_that_are_not_the_models_are_refused(model: TextModel) -> None:
    header = dataclasses.replace(model.header(Content.FILE), seq_len=1, stride=1)
    data = header.pack() + packed(TEXT, model)[HEADER_BYTES:]
    with pytest.raises(GolfError, match="windows of 1 tokens, its model has 64"):
        unpacked(data, model)


def test_another_model(model: TextModel, tmp_path: Path) -> None:
    other = TextModel(make_artifact(tmp_path / "other.golf", seed=2), device="cpu")
    with pytest.raises(GolfError, match=f"made with model {model.sha256[:16]}.*you gave .*{other.sha256[:16]}"):
        unpacked(packed(TEXT, model), other)
    assert unpacked(packed(INPUTS["binary"], model), other) == INPUTS["binary"]  # needs no model


def test_worker_processes(model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paramgolf.text.stream.BLOCK", 600)
    monkeypatch.setattr("paramgolf.text.stream.WORTH_A_PROCESS", 100)
    raw = prose()[:1800].encode()
    data = packed(raw, model, workers=2)
    assert data == packed(raw, model)
    assert kinds(data) == {"model"}
    assert unpacked(data, model, workers=2) == raw


def test_commands(
    artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    note = tmp_path / "note.txt"
    note.write_bytes(TEXT)
    assert "golf run" in error_line(golf_here(capfd, "compress", note))
    assert golf_here(capfd, "compress", note, "-m", artifact).code == 0
    assert "exists" in error_line(golf_here(capfd, "compress", note, "-m", artifact))
    assert "exists" in error_line(golf_here(capfd, "decompress", "note.txt.gtx", "-m", artifact))
    assert "not under runs/" in error_line(golf_here(capfd, "decompress", "note.txt.gtx", "-o", "back"))
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    (run / "model.golf").write_bytes(artifact.read_bytes())
    found = golf_here(capfd, "decompress", "note.txt.gtx", "-o", "back")
    assert found.code == 0 and "runs/one/model.golf" in found.err
    assert (tmp_path / "back").read_bytes() == TEXT
    shown = golf_here(capfd, "inspect", "note.txt.gtx", "--json")
    assert shown.code == 0 and sha256_file(artifact)[:32] in shown.out
    (tmp_path / "cut.gtx").write_bytes((tmp_path / "note.txt.gtx").read_bytes()[:-9])
    assert "too early" in error_line(golf_here(capfd, "decompress", "cut.gtx"))
    assert not (tmp_path / "cut").exists() and not list(tmp_path.glob(".*.tmp"))
    assert "made by golf compress" in error_line(golf_here(capfd, "decompress", "note.txt", "-o", "x", "-m", artifact))


def test_standard_streams(artifact: Path) -> None:
    def golf(command: str, data: bytes) -> bytes:
        line = [sys.executable, "-m", "paramgolf", command, "-m", str(artifact)]
        return subprocess.run(line, input=data, capture_output=True, check=True, env=one_thread()).stdout

    assert golf("decompress", golf("compress", TEXT)) == TEXT
