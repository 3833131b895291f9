"""Encode with whole windows, decode token by token with the cache: the same tokens, at the size the score promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from paramgolf.errors import CheckFailed, GolfError
from paramgolf.recipe.sections import NgramLevel, NgramSection
from paramgolf.score.scorer import score
from paramgolf.score.stream import decode_stream, encode_stream
from paramgolf.score.windows import lanes
from tests.test_score_scorer import TABLE, T, stream, tiny_model


@pytest.mark.parametrize(("stride", "count"), [(T, 1), (T, 5), (6, 4), (1, 2)])
def test_round_trip(stride: int, count: int) -> None:
    model, tokens = tiny_model(), stream(330)
    starts = lanes(tokens, count, 1)
    assert len(starts) == count
    data = encode_stream(model, tokens, seq_len=T, stride=stride, lane_starts=starts, tolerance=1e-4)
    back = decode_stream(model, data, first_token=1, seq_len=T, stride=stride)
    np.testing.assert_array_equal(np.concatenate(back), tokens)


def test_size_is_the_score() -> None:
    model, tokens = tiny_model(), stream(4000)
    bits = score(model, tokens, token_bytes=TABLE, seq_len=T).val_loss * 3999 / math.log(2)
    data = encode_stream(model, tokens, seq_len=T, tolerance=1e-4)
    assert bits <= 8 * len(data) <= bits * 1.01 + 8 * 24


@pytest.mark.parametrize(("stride", "count"), [(T, 1), (6, 4)])
def test_with_the_ngram_cache(stride: int, count: int) -> None:
    model, tokens = tiny_model(), np.tile(stream(150), 6)
    levels = (NgramLevel(order=2, strength=1.0, discount=0.5), NgramLevel(scope="text", order=4))
    starts = lanes(tokens, count, 1)
    scored = score(
        model, tokens, token_bytes=TABLE, seq_len=T, stride=stride, lane_starts=starts,
        ngram=NgramSection(levels=levels),
    )  # fmt: skip
    assert scored.ngram_loss is not None and scored.ngram_loss < 0.9 * scored.val_loss
    data = encode_stream(model, tokens, seq_len=T, stride=stride, lane_starts=starts, tolerance=1e-4, ngram=levels)
    bits = scored.ngram_loss * scored.scored_tokens / math.log(2)
    assert bits <= 8 * len(data) <= bits * 1.02 + 8 * (24 + 6 * count)
    back = decode_stream(model, data, first_token=1, seq_len=T, stride=stride, ngram=levels)
    np.testing.assert_array_equal(np.concatenate(back), tokens)
    with pytest.raises(CheckFailed):
        decode_stream(model, data, first_token=1, seq_len=T, stride=stride)


def test_the_shortest_stream() -> None:
    model, tokens = tiny_model(), np.array([1, 7], dtype=np.uint16)
    data = encode_stream(model, tokens, seq_len=T)
    assert np.concatenate(decode_stream(model, data, first_token=1, seq_len=T)).tolist() == [1, 7]


def test_another_model_is_noticed() -> None:
    model, tokens = tiny_model(), stream(200)
    data = encode_stream(model, tokens, seq_len=T)
    with pytest.raises(CheckFailed, match="checksum"):
        decode_stream(tiny_model(seed=4), data, first_token=1, seq_len=T)
    with torch.no_grad():
        model.tok_emb.weight.add_(1e-3 * torch.randn(model.tok_emb.weight.shape))
    with pytest.raises(CheckFailed, match="checksum"):
        decode_stream(model, data, first_token=1, seq_len=T)


def test_another_vocabulary_is_refused() -> None:
    data = bytearray(encode_stream(tiny_model(), stream(50), seq_len=T))
    other = tiny_model()
    other.vocab_size = 40
    with pytest.raises(GolfError, match="vocabulary of 48"):
        decode_stream(other, bytes(data), first_token=1, seq_len=T)
