"""Encoder and decoder that compute the model differently: what one writes, the other reads."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch

from paramgolf.errors import CheckFailed
from paramgolf.model.gpt import GPT
from paramgolf.score.scorer import evaluating, window_batches
from paramgolf.score.stream import decode_stream, encode_stream, path_log_odds
from paramgolf.score.windows import lanes, plan
from paramgolf.text.blocks import TOLERANCE, exact_arithmetic
from tests.model_common import small_gpt
from tests.test_score_scorer import stream

LENGTH = 16
TOKENS = stream(700)
Way = Callable[[GPT], GPT]


def model() -> GPT:
    """Large enough that other shapes form sums in another order."""
    return small_gpt(dim=64, num_layers=3, num_heads=4, num_kv_heads=2, mlp_hidden=160)


def double(one: GPT) -> GPT:
    other = copy.deepcopy(one).double()
    other.compute_dtype = torch.float64
    return other


def compiled(one: GPT) -> GPT:
    torch.compiler.reset()
    other = copy.deepcopy(one)
    other.compile_regions()
    return other


def on_gpu(one: GPT) -> GPT:
    return copy.deepcopy(one).cuda()


def same(one: GPT) -> GPT:
    return one


def encoded(one: GPT, batch: int, stride: int = LENGTH) -> bytes:
    with exact_arithmetic():
        return encode_stream(
            one, TOKENS, seq_len=LENGTH, stride=stride, lane_starts=lanes(TOKENS, 4, 1), tolerance=TOLERANCE,
            batch_tokens=batch * LENGTH,
        )  # fmt: skip


def decoded(one: GPT, data: bytes, stride: int = LENGTH) -> np.ndarray:
    with exact_arithmetic():
        return np.concatenate(decode_stream(one, data, first_token=1, seq_len=LENGTH, stride=stride))


def log_odds(one: GPT, batch: int) -> np.ndarray:
    whole = plan(len(TOKENS), LENGTH, LENGTH)
    with evaluating(one, LENGTH), exact_arithmetic():
        batches = window_batches(one, TOKENS, whole, (batch, LENGTH))
        return np.concatenate([path_log_odds(one, hidden, truth) for _, hidden, truth in batches])


@pytest.mark.parametrize(("batch", "stride"), [(1, LENGTH), (64, LENGTH), (1, 4), (64, 4)])
def test_batches_of_one_and_of_many(batch: int, stride: int) -> None:
    one = model()
    np.testing.assert_array_equal(decoded(one, encoded(one, batch, stride), stride), TOKENS)
    assert 0 <= np.abs(log_odds(one, 1) - log_odds(one, 64)).max() < TOLERANCE / 3


def test_two_threads_encode_and_one_decodes() -> None:
    before, one = torch.get_num_threads(), model()
    try:
        torch.set_num_threads(2)
        data = encoded(one, 64)
        torch.set_num_threads(1)
        np.testing.assert_array_equal(decoded(one, data), TOKENS)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [
        (same, double),
        (double, same),
        pytest.param(compiled, same, marks=pytest.mark.full),
        pytest.param(on_gpu, same, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
    ],
)
def test_other_kernels_and_types(encoder: Way, decoder: Way) -> None:
    one = model()
    data = encoded(encoder(one), 64)
    np.testing.assert_array_equal(decoded(decoder(one), data), TOKENS)
    if encoder is double:
        assert np.abs(log_odds(one, 64) - log_odds(double(one), 64)).max() > 0, "both ran in the same type"


def test_reduced_precision_is_off_in_the_coding_path_and_would_be_noticed() -> None:
    one = model()
    data = encoded(one, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the caller's own mode
        np.testing.assert_array_equal(decoded(one, data), TOKENS)
    coarse = copy.deepcopy(one)
    coarse.compute_dtype = torch.bfloat16
    with pytest.raises(CheckFailed, match="checksum"):
        decoded(coarse, data)
