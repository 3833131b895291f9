"""The n-gram cache: normalised, causal, the same token by token as at once, apart in documents and lanes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paramgolf.errors import GolfError
from paramgolf.recipe.load import from_table
from paramgolf.recipe.sections import NgramLevel
from paramgolf.score.coder import masses
from paramgolf.score.ngram import Mixture, NgramCache, ngram_nll
from paramgolf.score.ttt.settings import ngram_of

BOS, VOCAB = 1, 6
LEVELS = st.lists(
    st.builds(
        NgramLevel, scope=st.sampled_from(["document", "text"]), order=st.integers(0, 8),
        strength=st.floats(0.0, 50.0), discount=st.floats(0.05, 0.95),
    ),
    min_size=1, max_size=4,
)  # fmt: skip
STREAMS = st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=60).map(np.array)


def model_of(tokens: np.ndarray) -> np.ndarray:
    """(n - 1, V) probabilities of some model of the targets 1 ... n-1."""
    drawn = np.random.default_rng(len(tokens)).random((len(tokens) - 1, VOCAB)) + 0.01
    return drawn / drawn.sum(-1, keepdims=True)


@settings(max_examples=150, deadline=None)
@given(STREAMS, LEVELS, st.integers(0, 59))
def test_at_once_is_token_by_token(tokens: np.ndarray, levels: list[NgramLevel], cut: int) -> None:
    probs = model_of(tokens)
    starts = (0,) if cut == 0 or cut >= len(tokens) else (0, cut)
    nll = -np.log(probs[np.arange(len(tokens) - 1), tokens[1:]])
    together = ngram_nll(tokens, nll, levels, bos_id=BOS, starts=starts)
    cache = NgramCache(levels, BOS)
    for at, token in enumerate(tokens.tolist()):
        if at:
            mixed = cache.mix(probs[at - 1])
            assert mixed.sum() == pytest.approx(1.0) and mixed.min() > 0
            assert -np.log(mixed[token]) == pytest.approx(together[at - 1], rel=1e-9)
        if at in starts and at:
            cache = NgramCache(levels, BOS)  # a lane does not know the one before
        cache.give(token)


@settings(max_examples=50, deadline=None)
@given(STREAMS, LEVELS, st.integers(1, 59))
def test_later_tokens_change_nothing(tokens: np.ndarray, levels: list[NgramLevel], at: int) -> None:
    nll = np.full(len(tokens) - 1, 1.5)
    other = tokens.copy()
    other[at:] = (other[at:] + 1) % VOCAB
    mine, theirs = (ngram_nll(t, nll, levels, bos_id=BOS) for t in (tokens, other))
    assert np.array_equal(mine[: at - 1], theirs[: at - 1])


def test_a_repeated_text_gets_cheap_and_a_new_document_forgets() -> None:
    document = [BOS, 2, 3, 4, 5, 2, 3, 4, 5, 2, 3, 4, 5]
    nll = np.full(2 * len(document) - 1, np.log(VOCAB))
    level = NgramLevel(scope="document", order=2, strength=0.5, discount=0.5)
    own = ngram_nll(np.array(document * 2), nll, [level], bos_id=BOS)
    assert own[10] < 0.5 * nll[0]
    assert np.array_equal(own[: len(document) - 1], own[len(document) :])
    text = ngram_nll(
        np.array(document * 2), nll, [NgramLevel(scope="text", order=2, strength=0.5, discount=0.5)], bos_id=BOS
    )
    assert text[len(document) :].sum() < own[len(document) :].sum()


@pytest.mark.parametrize(
    ("levels", "said"),
    [
        ([{"order": 3, "strength": 0, "discount": 0}], r"ngram\.levels, order 3"),
        ([{"order": 3, "strength": -1}], r"ngram\.levels"),
        ([{"scope": "corpus"}], r"ngram\.levels"),
        ([{}] * 17, r"ngram\.levels"),
        ("many", r"ngram\.levels"),
    ],
)
def test_levels_that_cannot_be_are_refused_with_the_recipe_and_in_an_artifact(levels: Any, said: str) -> None:
    with pytest.raises(GolfError, match=said):
        from_table({"name": "own", "ngram": {"levels": levels}})
    with pytest.raises(GolfError, match=said):
        ngram_of({"ngram": {"levels": levels}})


@settings(max_examples=50, deadline=None)
@given(st.lists(STREAMS, min_size=1, max_size=4), LEVELS)
def test_the_coder_mixes_what_the_cache_mixes(streams: list[np.ndarray], levels: list[NgramLevel]) -> None:
    caches = [NgramCache(levels, BOS) for _ in streams]
    for cache, stream in zip(caches, streams, strict=True):
        for token in stream.tolist():
            cache.give(token)
    probs = model_of(np.zeros(len(streams) + 1))
    leaves = masses(torch.from_numpy(np.log(probs)), Mixture.of([cache.change() for cache in caches]))[-1].numpy()
    for row, cache, p in zip(leaves, caches, probs, strict=True):
        assert row[:VOCAB] == pytest.approx(cache.mix(p), rel=1e-12) and not row[VOCAB:].any()
