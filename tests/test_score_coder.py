"""The text coder: exact with any noise up to the tolerance, a checksum error beyond, near the ideal size."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import text_coder
from paramgolf.errors import CheckFailed, GolfError
from paramgolf.score import coder, grid, rans

VOCAB = text_coder.VOCAB


text_like = functools.cache(text_coder.text_like)


def encode(
    tolerance: float, lengths: list[int], seed: int = 0, vocab: int = VOCAB
) -> tuple[bytes, torch.Tensor, np.ndarray]:
    logits, tokens, log_odds = text_like(sum(lengths), seed, vocab)
    encoder = coder.Encoder(coder.fit(tolerance, log_odds[:2000], tokens[:2000], vocab), len(lengths))
    ends = np.cumsum(lengths)
    for lane, (low, high) in enumerate(zip(ends - lengths, ends, strict=True)):
        middle = (low + high) // 2  # in two parts, as a scorer would
        encoder.add(lane, log_odds[low:middle], tokens[low:middle])
        encoder.add(lane, log_odds[middle:high], tokens[middle:high])
    return encoder.finish(), logits, tokens


def decode(data: bytes, logits: torch.Tensor) -> np.ndarray:
    decoder = coder.Decoder(data)
    firsts = np.cumsum(decoder.lengths) - decoder.lengths
    lanes: list[list[int]] = [[] for _ in firsts]
    while not decoder.done:
        rows = torch.from_numpy(np.minimum(firsts + decoder.position, len(logits) - 1))
        for lane, token in zip(lanes, decoder.step(logits[rows]).tolist(), strict=True):
            if token >= 0:
                lane.append(token)
    decoder.finish()
    return np.array([token for lane in lanes for token in lane])


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([0.0, 1e-6, 1e-5, 1e-4, 1e-3, 0.02]),
    st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(lambda lengths: sum(lengths) > 0),
    st.sampled_from([2, 3, 300, VOCAB]),
    st.integers(0, 3),
)
def test_noise_up_to_the_tolerance_decodes(tolerance: float, lengths: list[int], vocab: int, seed: int) -> None:
    data, logits, tokens = encode(tolerance, lengths, seed, vocab)
    noise = torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed + 50), dtype=torch.float64)
    noisy = logits.double() + (noise - 0.5) * tolerance  # log-odds then differ by at most the tolerance
    np.testing.assert_array_equal(decode(data, noisy), tokens)


@pytest.mark.parametrize("tolerance", [1e-5, 1e-3, 0.02])
def test_the_worst_noise_decodes(tolerance: float) -> None:
    """Every log-odds pushed by the whole tolerance towards the nearest boundary of the grid in use."""
    lengths = [80, 75, 0, 61]
    data, logits, tokens = encode(tolerance, lengths)
    decoder = coder.Decoder(data)
    firsts = np.cumsum(lengths) - lengths
    out = []
    while not decoder.done:
        rows = torch.from_numpy(np.minimum(firsts + decoder.position, len(logits) - 1))
        levels = [level.numpy() for level in coder.masses(logits[rows])]

        def pushed(prefix: np.ndarray, level: int, levels: list[np.ndarray] = levels) -> np.ndarray:
            lane = np.arange(len(prefix))
            exact = np.log(levels[level + 1][lane, 2 * prefix + 1] / levels[level + 1][lane, 2 * prefix])
            shape, place = decoder.settings.grid, decoder._place
            position = (grid.warp(exact) / shape.width - place / shape.shifts) % 1.0
            return np.where(position < 0.5, exact - tolerance, exact + tolerance)

        out.append(decoder.step_by(pushed))
    decoder.finish()
    steps = np.stack(out)
    assert [t for lane in range(4) for t in steps[: lengths[lane], lane]] == tokens.tolist()


def test_noise_beyond_the_tolerance_is_noticed() -> None:
    data, logits, _ = encode(1e-5, [400, 380])
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with pytest.raises(CheckFailed, match="do not match their checksum"):
        decode(data, logits.double() + 0.05 * noise)


@pytest.mark.parametrize(("tolerance", "allowed"), [(0.0, 0.001), (1e-5, 0.005), (1e-4, 0.015)])
def test_size_is_close_to_the_ideal(tolerance: float, allowed: float) -> None:
    lengths = [2000] * 4
    data, logits, tokens = encode(tolerance, lengths, seed=9)
    ideal = text_coder.ideal_bits(logits, tokens) / 8
    fixed = 20 + 2 * len(lengths)  # what does not grow with the text
    assert len(data) - fixed <= ideal * (1 + allowed)
    assert len(data) >= ideal * 0.999


def test_a_block_without_a_clean_place_still_decodes() -> None:
    logits, tokens, log_odds = text_like(64, 4)
    one_place = coder.Settings(0.02, grid.Grid(64, 1), block=16, stay=128, vocab_size=VOCAB)
    encoder = coder.Encoder(one_place, 1)
    encoder.add(0, log_odds, tokens)
    data = encoder.finish()
    assert len(data) > 64 * 10 / 8  # coded without the model
    np.testing.assert_array_equal(decode(data, logits.double() + 0.01), tokens)


def test_damage_is_one_clear_error() -> None:
    data, logits, tokens = encode(1e-4, [50, 40])
    for size in (0, 3, 9, len(data) // 2, len(data) - 2):
        with pytest.raises(GolfError):
            decode(data[:size], logits)
    rng, wrong = np.random.default_rng(0), 0
    for at in rng.choice(len(data), 40, replace=False):
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(8))
        try:
            decoded = coder.Decoder(bytes(flipped))
        except GolfError:
            continue
        if decoded.lengths.max() > 1000 or decoded.settings.vocab_size != VOCAB:
            continue  # the caller compares these with what it expects
        try:  # the tolerance, say, is not needed to decode
            np.testing.assert_array_equal(decode(bytes(flipped), logits), tokens)
        except GolfError:
            wrong += 1
    assert wrong > 20


def test_broken_models_are_refused() -> None:
    with pytest.raises(CheckFailed, match="not finite"):
        coder.path_log_odds(torch.full((1, 8), float("nan")), torch.zeros(1, dtype=torch.int64))
    _, tokens, log_odds = text_like(64, 4)
    with pytest.raises(GolfError, match="tolerance"):
        coder.fit(0.5, log_odds, tokens, VOCAB)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(0, 80), st.integers(0, 10**6))
def test_rans_returns_bits_and_the_seal(lanes: int, steps: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    zero = rng.integers(1, rans.ONE + 1, (steps, lanes))
    zero[rng.random(zero.shape) < 0.3] = rans.ONE
    bits = rng.random((steps, lanes)) * rans.ONE >= zero
    seal = int(rng.integers(0, 1 << rans.SEAL_BITS))
    writer = rans.Writer(seal)
    cut = steps // 3
    writer.write(zero[cut:], bits[cut:])
    writer.write(zero[:cut], bits[:cut])
    reader = rans.Reader(writer.finish())
    for step in range(steps):
        np.testing.assert_array_equal(reader.read(zero[step]), bits[step])
    assert reader.seal() == seal and not reader.overrun


@given(st.floats(-20, 20), st.floats(0, 5))
def test_warp_is_increasing_and_never_steeper_than_one(x: float, step: float) -> None:
    low, high = grid.warp(np.array(x)), grid.warp(np.array(x + step))
    assert 0 <= high - low <= step + 1e-12
    if abs(x) < grid.LIMIT:
        assert grid.unwarp(low) == pytest.approx(x, abs=1e-9)


def test_the_table_of_probabilities_is_pinned() -> None:
    """A decoder on another machine must build the same table, so it is made of operations that IEEE 754 fixes."""
    table = grid.Grid(1024, 4).zero_freq
    assert table.shape == (5, 41) and np.all(table[4] == rans.ONE // 2)
    assert np.all(np.diff(table[:4].astype(int), axis=1) <= 0)
    assert table[0, 16:25].tolist() == [46501, 42781, 38859, 34812, 30724, 26677, 22755, 19035, 15583]
    assert table[1, 16:25].tolist() == [45594, 41816, 37856, 33791, 29705, 25682, 21803, 18145, 14769]
