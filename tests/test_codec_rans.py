"""The weight codec: every payload comes back, damage is noticed, and the size is near what theory allows."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paramgolf.errors import GolfError
from paramgolf.pack.codecs.base import CodeSpec, CodeTensor
from paramgolf.pack.codecs.rans import RansCodec
from paramgolf.pack.codecs.rans_floats import decode_floats, encode_floats

CODEC = RansCodec()
SLOW = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def tensor(codes: np.ndarray, bits: int = 6, name: str = "blocks.0.w", scale: np.ndarray | None = None) -> CodeTensor:
    return CodeTensor(CodeSpec(name, codes.shape, bits, scale=scale), codes.astype(np.int8))


def round_trip(tensors: list[CodeTensor]) -> bytes:
    data = CODEC.encode(tensors)
    back = CODEC.decode(data, [t.spec for t in tensors])
    assert len(back) == len(tensors)
    for got, t in zip(back, tensors, strict=True):
        assert got.dtype == np.int8
        assert got.shape == t.codes.shape
        assert np.array_equal(got, t.codes)
    return data


@st.composite
def tensors_strategy(draw: st.DrawFn) -> list[CodeTensor]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    out = []
    for k in range(draw(st.integers(0, 4))):
        bits = draw(st.integers(2, 8))
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 16, 33, 70]), max_size=3)))
        n = int(np.prod(shape))
        kind = draw(st.sampled_from(["zero", "constant", "uniform", "heavy", "normal", "ends"]))
        values = {
            "zero": lambda n=n: np.zeros(n),
            "constant": lambda n=n, low=low, high=high: np.full(n, rng.integers(low, high + 1)),
            "uniform": lambda n=n, low=low, high=high: rng.integers(low, high + 1, n),
            "heavy": lambda n=n: rng.standard_t(1.2, n),
            "normal": lambda n=n, high=high: rng.normal(0, high / 3, n),
            "ends": lambda n=n, low=low, high=high: rng.choice([low, high], n),
        }[kind]()
        codes = np.clip(np.rint(values), low, high).astype(np.int8).reshape(shape)
        if codes.ndim > 1 and codes.size and draw(st.booleans()):
            codes[0] = 0
            codes[..., -1] = 0
        scale = None
        if shape and draw(st.booleans()):
            scale = rng.normal(0, 1, shape[0]).astype(draw(st.sampled_from([np.float16, np.float32])))
        out.append(tensor(codes, bits, f"blocks.{k}.w", scale))
    return out


@SLOW
@given(tensors_strategy())
def test_round_trip(tensors: list[CodeTensor]) -> None:
    assert round_trip(tensors) == CODEC.encode(tensors)


@SLOW
@given(tensors_strategy(), st.integers(0, 2**32 - 1))
def test_damage_is_refused(tensors: list[CodeTensor], seed: int) -> None:
    data = CODEC.encode(tensors)
    specs = [t.spec for t in tensors]
    rng = np.random.default_rng(seed)
    at = int(rng.integers(0, len(data)))
    flipped = bytearray(data)
    flipped[at] ^= 1 << int(rng.integers(0, 8))
    noise = rng.integers(0, 256, int(rng.integers(0, 200))).astype(np.uint8).tobytes()
    for hostile in (bytes(flipped), data[:at], data[:at] + b"\x55" + data[at:], data + b"\0", noise):
        try:
            back = CODEC.decode(hostile, specs)
        except (GolfError, ValueError):
            continue
        # only damage that changes no weight may pass (an unused bit of the side data)
        assert all(np.array_equal(got, t.codes) for got, t in zip(back, tensors, strict=True))


def test_hostile_headers_stay_small() -> None:
    import tracemalloc

    spec = [CodeSpec("w", (40, 40), 6)]
    rng = np.random.default_rng(3)
    tracemalloc.start()
    for _ in range(60):
        body = rng.integers(0, 256, 300).astype(np.uint8).tobytes()
        with pytest.raises((GolfError, ValueError)):
            CODEC.decode(bytes([len(body) & 127 | 128, len(body) >> 7]) + body + b"\1\2" * 40, spec)
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()


def test_wrong_specs_are_refused() -> None:
    rng = np.random.default_rng(0)
    t = tensor(np.clip(np.rint(rng.normal(0, 5, (64, 64))), -31, 31))
    data = CODEC.encode([t])
    for shape, bits in (((64, 63), 6), ((32, 64), 6), ((64, 64), 3)):
        with pytest.raises((GolfError, ValueError)):
            CODEC.decode(data, [CodeSpec("w", shape, bits)])


def gaussian(rng: np.random.Generator, rows: int, columns: int, spread: float = 0.0) -> np.ndarray:
    column = np.exp(spread * rng.standard_normal(columns))
    return np.clip(np.rint(rng.standard_normal((rows, columns)) * column * 3), -31, 31).astype(np.int8)


def entropy_bytes(codes: np.ndarray) -> float:
    counts = np.bincount(codes.ravel().astype(np.int64) + 128)
    p = counts[counts > 0] / codes.size
    return float(-(p * np.log2(p)).sum() * codes.size / 8)


def test_size_of_plain_noise_is_its_entropy() -> None:
    codes = [gaussian(np.random.default_rng(k), 256, 256) for k in range(8)]
    size = len(round_trip([tensor(c) for c in codes]))
    assert size < 1.0015 * entropy_bytes(np.stack(codes)) + 120


def test_small_model_beats_the_entropy_coder_limit() -> None:
    """Column spread of 35 %: one table a tensor wastes what the classes find, side data included."""
    codes = [gaussian(np.random.default_rng(k), 256, 256, 0.35) for k in range(8)]
    size = len(round_trip([tensor(c) for c in codes]))
    assert size < 0.99 * sum(entropy_bytes(c) for c in codes)


def test_scales_known_to_the_decoder_save_side_data() -> None:
    rng = np.random.default_rng(5)
    weights = rng.standard_normal((1024, 96))
    scale = (np.abs(weights).max(1) / 31).astype(np.float32)
    codes = np.clip(np.rint(weights / scale[:, None]), -31, 31).astype(np.int8)
    with_scale = len(round_trip([tensor(codes, scale=scale)]))
    without = len(round_trip([tensor(codes)]))
    assert with_scale < without - 100


def test_alike_layers_share_their_side_data() -> None:
    shared = np.exp(0.5 * np.random.default_rng(1).standard_normal(384))
    alike, strangers = [], []
    for k in range(6):
        rng = np.random.default_rng(10 + k)
        noise = rng.standard_normal((128, 384)) * 3
        alike.append(tensor(np.clip(np.rint(noise * shared), -31, 31)))
        strangers.append(tensor(np.clip(np.rint(noise * rng.permutation(shared)), -31, 31)))
    assert len(round_trip(alike)) < len(round_trip(strangers)) - 300


def test_empty_rows_and_columns_cost_nothing() -> None:
    codes = gaussian(np.random.default_rng(2), 200, 100)
    padded = np.zeros((400, 300), np.int8)
    padded[100:300, 100:200] = codes
    assert len(round_trip([tensor(padded)])) < len(round_trip([tensor(codes)])) + 60


def test_nothing_and_one() -> None:
    assert len(round_trip([])) < 12
    assert len(round_trip([tensor(np.zeros((0, 5)))])) < 12
    assert len(round_trip([tensor(np.array(3))])) < 16
    assert len(round_trip([tensor(np.zeros((500, 500)))])) < 16
    assert len(round_trip([tensor(np.full((500, 500), -31))])) < 16


def test_many_lanes_with_a_tail_in_their_states() -> None:
    codes = gaussian(np.random.default_rng(4), 700, 801, 0.3)
    round_trip([tensor(codes), tensor(codes[:, :7].copy()), tensor(codes[:3].copy(), bits=8)])


def fixed_pattern() -> np.ndarray:
    """Bell-shaped integers with row and column scales and a common direction, from integer arithmetic only."""
    i = np.arange(96 * 64 * 6, dtype=np.int64).reshape(96, 64, 6)
    noise = ((i * 2654435761 + (i * i % 40503) * 40503) % 2**32 >> 24).sum(2) - 765
    scaled = noise * (20 + np.arange(96)[:, None] % 7) * (20 + np.arange(64)[None, :] % 5) // 32768
    return np.clip(scaled + (np.arange(64)[None, :] % 9 - 4), -31, 31).astype(np.int8)


def test_same_bytes_as_ever() -> None:
    """A stored stream decodes to known codes: the format and its integer tables must not drift."""
    stored = (Path(__file__).parent / "data" / "codec_rans_v1.bin").read_bytes()
    assert np.array_equal(CODEC.decode(stored, [CodeSpec("w", (96, 64), 6)])[0], fixed_pattern())


def test_common_direction_is_taken_off() -> None:
    """An embedding whose columns have means is coded like one without."""
    rng = np.random.default_rng(21)
    noise = rng.normal(0, 3, (1024, 64))
    shifted = noise + rng.normal(0, 3, 64) * rng.uniform(0.5, 1.5, (1024, 1))
    plain, moved = (np.clip(np.rint(x), -31, 31).astype(np.int8) for x in (noise, shifted))
    assert len(round_trip([tensor(moved)])) < 1.05 * len(round_trip([tensor(plain)]))


def test_matrices_of_different_tails_get_tables_of_their_own() -> None:
    rng = np.random.default_rng(22)
    uniform = [tensor(rng.integers(-6, 7, (256, 256))) for _ in range(3)]
    normal = [tensor(gaussian(rng, 256, 256)) for _ in range(3)]
    apart = len(round_trip(uniform)) + len(round_trip(normal))
    assert len(round_trip([*uniform, *normal])) < apart + 100


def test_decoding_needs_neither_names_nor_widths() -> None:
    rng = np.random.default_rng(9)
    tensors = [tensor(rng.integers(-3, 4, (9, 11)), 3, "a"), tensor(np.zeros((2, 3, 4)), 6, "b")]
    back = CODEC.decode(CODEC.encode(tensors), [CodeSpec("", t.codes.shape, 8) for t in tensors])
    assert all(np.array_equal(b, t.codes) for b, t in zip(back, tensors, strict=True))


@SLOW
@given(st.integers(0, 2**32 - 1))
def test_floats_round_trip_bit_for_bit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays: list[np.ndarray] = []
    for _ in range(int(rng.integers(0, 5))):
        dtype = rng.choice([np.float16, np.float32])
        shape = tuple(rng.choice([0, 1, 2, 7, 60], int(rng.integers(0, 3))).tolist())
        kind = int(rng.integers(0, 4))
        if kind == 0:  # any bits at all: NaNs with payloads, infinities, both zeros
            word = np.uint16 if dtype is np.float16 else np.uint32
            array = rng.integers(0, np.iinfo(word).max, shape, dtype=word, endpoint=True).view(dtype)
        else:
            array = (np.exp(0.1 * rng.standard_normal(shape)) * (0.01, 1.0, -3.0)[kind - 1]).astype(dtype)
            if array.size and rng.random() < 0.3:
                array.reshape(-1)[0] = -6e4
        arrays.append(np.asarray(array, dtype).reshape(shape))
    data = encode_floats(arrays)
    back = decode_floats(data, [(a.dtype.name, a.shape) for a in arrays])
    assert [b.tobytes() for b in back] == [a.tobytes() for a in arrays]
    assert [(b.dtype, b.shape) for b in back] == [(a.dtype, a.shape) for a in arrays]
    noise = rng.integers(0, 256, 50).astype(np.uint8).tobytes()
    with contextlib.suppress(ValueError):
        decode_floats(noise, [(a.dtype.name, a.shape) for a in arrays])


def test_floats_of_alike_layers_are_smaller_than_their_bytes() -> None:
    rng = np.random.default_rng(3)
    common = 0.3 * rng.standard_normal(500)
    scales = [np.exp(common + 0.02 * rng.standard_normal(500)).astype(np.float16) for _ in range(6)]
    assert len(encode_floats(scales)) < 0.6 * 2 * 6 * 500


def test_close_to_the_ideal_code_of_an_independent_coder() -> None:
    """Against constriction's range coder given one fitted table: ours may not lose to it."""
    constriction = pytest.importorskip("constriction")
    rng = np.random.default_rng(11)
    codes = gaussian(rng, 512, 512)
    counts = np.bincount(codes.ravel().astype(np.int64) + 31, minlength=63) + 1e-3
    model = constriction.stream.model.Categorical(counts / counts.sum(), perfect=True)
    coder = constriction.stream.queue.RangeEncoder()
    coder.encode((codes.ravel().astype(np.int32) + 31), model)
    assert len(round_trip([tensor(codes)])) < 1.001 * 4 * len(coder.get_compressed())
