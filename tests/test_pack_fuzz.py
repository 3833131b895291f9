"""Damaged and hostile artifacts by the ten thousand: one clear error or the right weights, fast and in little memory.

Damage is every bit of every byte flipped, the file cut at every length, every byte repeated. A hostile file is a
damaged one whose checksum was made right again: what it says may be another artifact, but nothing worse.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paramgolf.errors import GolfError
from paramgolf.pack import container
from paramgolf.pack.container import DIGEST_BYTES, Artifact, decode_artifact, encode_artifact
from paramgolf.pack.registry import CODECS
from paramgolf.pack.stored import StoredTensor, TensorSpec
from paramgolf.quant.export import export, restore
from paramgolf.quant.grid import Grid
from paramgolf.recipe.sections import GridSection, QuantSection, RuleSection

SLOWEST, MOST_MEMORY = 2.0, 300e6  # seconds a case, bytes for all of them
HOSTILE = {"rans": 2000}  # cases with a right checksum; these take four milliseconds each, others a third of one
HOSTILE_ELSE = 2600


def quantised(name: str, shape: tuple[int, ...], bits: int, seed: int, store: str = "") -> StoredTensor:
    draw = np.random.default_rng(seed)
    high = 2 ** (bits - 1) - 1
    codes = np.clip(np.rint(draw.standard_normal(shape) * high / 2), -high, high).astype(np.int8)
    spec = TensorSpec(name, shape, store or f"int{bits}", bits)
    scale = np.asarray(draw.random(spec.scale_shape) + 0.1).astype(np.float16).reshape(spec.scale_shape)
    return StoredTensor(spec, codes, scale)


def tensors() -> list[StoredTensor]:
    """Two layers, a ternary vector, a low-rank correction, kept tensors: everything a file can hold."""
    gain = StoredTensor(TensorSpec("blocks.0.attn_scale", (3,), "float16"), np.array([1, 2, -1], np.float16))
    return [
        quantised("tok_emb.weight", (9, 5), 7, 1),
        quantised("blocks.0.mlp.fc.weight", (6, 5), 4, 2),
        quantised("blocks.1.mlp.fc.weight", (6, 5), 4, 3),
        quantised("blocks.1.mlp.fc.weight.lqer_a", (6,), 2, 4, "lqer_a"),
        quantised("blocks.1.mlp.fc.weight.lqer_b", (1, 5), 4, 5, "lqer_b"),
        gain,
        StoredTensor(TensorSpec("steps", (), "int64"), np.array(7)),
    ]


@lru_cache
def artifact(codec: str) -> tuple[bytes, tuple[bytes, ...]]:
    """(the file, every tensor's decoded bytes in the order of the file)."""
    data = encode_artifact(Artifact({"name": "fuzz"}, tensors(), b"tokens", {"note": b"x"}), codec).data
    return data, weights(decode_artifact(data))


def weights(read: Artifact) -> tuple[bytes, ...]:
    return tuple(t.dequantised().tobytes() for t in read.tensors)


def damaged(data: bytes) -> Iterator[bytes]:
    for at in range(len(data)):
        for bit in range(8):
            yield data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
        yield data[:at]
        yield data[: at + 1] + data[at:]


def test_every_byte_flipped_cut_and_repeated_in_twenty_thousand_files() -> None:
    cases = 0
    for codec in CODECS:
        data, _ = artifact(codec)
        for hostile in damaged(data):
            cases += 1
            with pytest.raises(GolfError) as error:
                decode_artifact(hostile, "m.golf")
            assert str(error.value).startswith("m.golf: ") and len(str(error.value)) < 300
    assert cases >= 20_000


def hostile_files(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Flips of one to three bytes, cuts and repetitions of stretches, all with a right checksum."""
    draw = np.random.default_rng(seed)
    body = data[:-DIGEST_BYTES]
    for index in range(count):
        made = bytearray(body)
        at = 5 + index % (len(body) - 5)  # after magic and version, every place in turn
        kind = int(draw.integers(0, 5))
        if kind < 3:
            for place in [at, *draw.integers(5, len(body), kind).tolist()]:
                made[place] ^= int(draw.integers(1, 256))
        elif kind == 3:
            del made[at : at + int(draw.integers(1, 9))]
        else:
            made[at:at] = made[at : at + int(draw.integers(1, 9))]
        yield bytes(made) + container._digest(bytes(made))


@pytest.mark.parametrize("codec", list(CODECS))
def test_a_right_checksum_does_not_make_a_hostile_file_dangerous(codec: str) -> None:
    data, right = artifact(codec)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    accepted = slowest = 0.0
    for hostile in hostile_files(data, HOSTILE.get(codec, HOSTILE_ELSE), 11):
        began = time.process_time()
        try:
            read = decode_artifact(hostile)
            restore(read.tensors)
            accepted += 1
        except GolfError as error:
            assert len(str(error)) < 400
        slowest = max(slowest, time.process_time() - began)
    assert slowest < SLOWEST
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < MOST_MEMORY
    assert weights(decode_artifact(data)) == right  # nothing that was read left anything behind


def test_damaged_weights_under_a_right_checksum_are_noticed_by_the_weights_own() -> None:
    whole = [t for t in tensors() if t.spec.bits]
    codec = CODECS["rans"]()
    specs = [container._code_spec(t.spec, t.scale) for t in whole]
    stream = codec.encode([container.CodeTensor(s, t.values) for s, t in zip(specs, whole, strict=True)])
    cases = 0
    for at in range(len(stream)):
        for hostile in (stream[:at] + bytes([stream[at] ^ 0x41]) + stream[at + 1 :], stream[:at]):
            cases += 1
            try:
                codes = codec.decode(hostile, specs)
            except (GolfError, ValueError):
                continue
            assert all(np.array_equal(c, t.values) for c, t in zip(codes, whole, strict=True))
    assert cases > 200


@given(
    st.integers(2, 8),
    st.sampled_from(["symmetric", "full", "half"]),
    st.sampled_from(["rowmax", "mse", "search"]),
    st.lists(st.integers(0, 9), max_size=4),
    st.sampled_from(list(CODECS)),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=120, deadline=None)
def test_any_grid_of_any_shape_comes_back(
    bits: int, low: str, clip: str, shape: list[int], codec: str, seed: int
) -> None:
    """int2 (ternary where symmetric) to int8; vectors, matrices, stacks, nothing at all."""
    grid = GridSection(bits=bits, low_code=low, clip=clip)  # type: ignore[arg-type]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    section = QuantSection(grids={"g": grid}, rules=(RuleSection(store="g"),))
    stored = export({"w": weight}, section, 1)
    data = encode_artifact(Artifact({}, stored), codec).data
    back = restore(decode_artifact(data).tensors)["w"]
    made = Grid(grid)
    assert back.shape == weight.shape and torch.equal(back, made.dequantize(*made.quantize(weight)))
