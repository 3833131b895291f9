"""Weight codecs and byte coders: exact round trips, bounded decoding, one kind of error."""

from __future__ import annotations

import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paramgolf.errors import GolfError
from paramgolf.pack import bytecoding
from paramgolf.pack.codecs.base import CodeSpec, CodeTensor
from paramgolf.pack.coding import available, encode_codes
from paramgolf.pack.registry import CODECS
from paramgolf.pack.side import decode_arrays, encode_arrays
from paramgolf.pack.wire import Reader, varint


def make(name: str, shape: tuple[int, ...], bits: int, seed: int, packed: bool = False) -> CodeTensor:
    draw = np.random.default_rng(seed)
    limit = (1 << (bits - 1)) - 1
    codes = np.clip(np.rint(draw.standard_normal(shape) * limit / 3), -limit, limit).astype(np.int8)
    scale = draw.random(shape[:-1] if len(shape) > 1 else ()).astype(np.float16)
    return CodeTensor(CodeSpec(name, shape, bits, packed, np.asarray(scale)), codes)


def model_like() -> list[CodeTensor]:
    out = [make("tok_emb.weight", (40, 16), 8, 1)]
    for layer in range(3):
        out += [
            make(f"blocks.{layer}.attn.c_q.weight", (16, 16), 6, 10 + layer),
            make(f"blocks.{layer}.mlp.fc.weight", (23, 17), 6, 20 + layer, packed=True),
            make(f"blocks.{layer}.bank", (2, 3, 5), 4, 30 + layer),
        ]
    return [*out, make("vector", (9,), 6, 2), make("scalar", (), 6, 3)]


@lru_cache
def fuzz_payload(name: str) -> tuple[list[CodeTensor], bytes]:
    tensors = model_like()[:4]
    return tensors, CODECS[name]().encode(tensors, 1)


@pytest.mark.parametrize("name", list(CODECS))
def test_round_trip_and_determinism(name: str) -> None:
    tensors = model_like()
    data = CODECS[name]().encode(tensors, -1)
    assert data == CODECS[name]().encode(tensors, -1)
    back = CODECS[name]().decode(data, [t.spec for t in tensors])
    for tensor, codes in zip(tensors, back, strict=True):
        assert codes.dtype == np.int8 and np.array_equal(codes, tensor.codes)


@pytest.mark.parametrize("name", [n for n in CODECS if n != "raw"])
def test_skewed_codes_shrink(name: str) -> None:
    codes = (np.random.default_rng(0).random((200, 100)) < 0.1).astype(np.int8)
    data = CODECS[name]().encode([CodeTensor(CodeSpec("w", codes.shape, 6), codes)], -1)
    assert len(data) < codes.size * 0.12  # the entropy is 0.469 bits = 0.0586 bytes a code


def test_column_structure_is_found_by_transposing() -> None:
    draw = np.random.default_rng(0)
    codes = np.clip(np.rint(draw.standard_normal((256, 64)) * np.repeat([0.3, 12.0], 32)), -31, 31).astype(np.int8)
    stream = bytecoding.compress(codes.tobytes(), bytecoding.ZSTD)
    assert len(CODECS["zstd"]().encode([CodeTensor(CodeSpec("w", codes.shape, 6), codes)], -1)) < 0.95 * len(stream)


def test_auto_is_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = model_like()
    name, data = encode_codes(tensors)
    assert len(data) == min(len(CODECS[n]().encode(tensors, -1)) for n in available())
    monkeypatch.setattr("paramgolf.pack.coding._EXACT_LIMIT", 100)
    name, data = encode_codes(tensors)  # the sampled way also gives a codec that decodes
    assert [c.tolist() for c in CODECS[name]().decode(data, [t.spec for t in tensors])] == [
        t.codes.tolist() for t in tensors
    ]


def test_unknown_codec_has_a_suggestion() -> None:
    with pytest.raises(GolfError, match="did you mean 'zstd'"):
        encode_codes(model_like(), "zsdt")


@pytest.mark.parametrize("name", list(CODECS))
def test_damaged_codes_never_pass_as_something_else(name: str) -> None:
    tensors = model_like()
    specs = [t.spec for t in tensors]
    data = CODECS[name]().encode(tensors, -1)
    for bad in (b"", data[:-1], data[: len(data) // 2], data + b"\0"):
        with pytest.raises((GolfError, ValueError)):
            CODECS[name]().decode(bad, specs)


@pytest.mark.parametrize("name", list(CODECS))
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_flipped_codes_raise_only_the_allowed_errors(name: str, data: st.DataObject) -> None:
    tensors, encoded = fuzz_payload(name)
    coded = bytearray(encoded)
    for _ in range(data.draw(st.integers(1, 3))):
        coded[data.draw(st.integers(0, len(coded) - 1))] = data.draw(st.integers(0, 255))
    try:
        back = CODECS[name]().decode(bytes(coded), [t.spec for t in tensors])
    except (GolfError, ValueError):
        return
    for tensor, codes in zip(tensors, back, strict=True):  # undetected damage still gives codes of the right kind
        assert codes.shape == tensor.spec.shape and codes.dtype == np.int8
        assert codes.min() >= tensor.spec.low and codes.max() <= tensor.spec.high


@pytest.mark.parametrize("coder", list(bytecoding.NAMES))
@pytest.mark.parametrize("size", [0, 1, 5, 3000])
def test_byte_coders(coder: int, size: int) -> None:
    data = np.random.default_rng(size).integers(0, 7, size, np.uint8).tobytes()
    coded = bytecoding.compress(data, coder)
    assert bytecoding.expand(coded, coder, size) == data
    for wrong in (size + 1, size + 1000, *([size - 1] if size else [])):
        with pytest.raises(GolfError):
            bytecoding.expand(coded, coder, wrong)
    with pytest.raises(GolfError):
        bytecoding.expand(coded + b"x", coder, size)


@pytest.mark.parametrize("coder", [c for c in bytecoding.NAMES if c != bytecoding.RAW])
def test_a_bomb_is_cut_off_at_the_promised_size(coder: int, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom paramgolf.pack import bytecoding\n"
        f"bomb = bytecoding.compress(bytes(3 << 23), {coder}, 1)\n"
        "open(sys.argv[1], 'wb').write(bomb)\n"
    )
    check = (
        "import resource, sys\nfrom paramgolf.pack import bytecoding\nfrom paramgolf.errors import GolfError\n"
        "import lzma, zlib, brotli, zstandard\nbomb = open(sys.argv[1], 'rb').read()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"try: bytecoding.expand(bomb, {coder}, 1000); print('accepted')\n"
        "except GolfError: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    bomb = str(tmp_path / "bomb")
    subprocess.run([sys.executable, "-c", script, bomb], check=True)
    grown = subprocess.run([sys.executable, "-c", check, bomb], check=True, capture_output=True, text=True).stdout
    assert int(grown) < 12_288  # kB; the bomb holds 24,576


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_side_arrays_round_trip_bit_for_bit(data: st.DataObject) -> None:
    arrays = []
    for _ in range(data.draw(st.integers(0, 4))):
        dtype = np.dtype(data.draw(st.sampled_from(["float16", "float32", "int64", "uint8", "bool"])))
        shape = data.draw(st.sampled_from([(), (0,), (1,), (5,), (2, 3)]))
        raw = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
        arrays.append((raw % 2)[..., 0].astype(bool) if dtype.name == "bool" else raw.view(dtype)[..., 0])
    arrays = [np.asarray(a) for a in arrays]
    back = decode_arrays(encode_arrays(arrays), [(a.dtype.name, a.shape) for a in arrays], "here")
    for ours, theirs in zip(arrays, back, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()


@given(st.integers(0, 2**62))
def test_varints(value: int) -> None:
    reader = Reader(varint(value), "here")
    assert reader.varint(2**62) == value
    reader.end()


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x80\x00", b"\xff" * 12, varint(11)])
def test_bad_varints(data: bytes) -> None:
    with pytest.raises(GolfError):
        Reader(data, "here").varint(10)


def test_codecs_work_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import paramgolf.pack.container\n"
        "from paramgolf.pack.registry import CODECS\n"
        "for name in CODECS: CODECS[name]()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
