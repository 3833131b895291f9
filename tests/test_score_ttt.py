"""Test-time training and the n-gram tilt: every target once, score first, independent of batches and ranks, undone."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paramgolf.dist import Dist
from paramgolf.errors import CheckFailed, GolfError
from paramgolf.model.gpt import GPT
from paramgolf.recipe.load import load_recipe
from paramgolf.recipe.sections import TiltSection, TttSection
from paramgolf.score import legality
from paramgolf.score.conditions import Verdict
from paramgolf.score.scorer import OneByteEach, score
from paramgolf.score.tilt import NO_HINT, NgramTable, hints, tilt_logits, tilted_nll
from paramgolf.score.ttt.adapt import Adaptation, adapting
from paramgolf.score.ttt.documents import Batch, Chunks, Document, batches_of, documents_of, window_of
from paramgolf.score.ttt.legal import AdaptedScorer
from paramgolf.score.ttt.scorer import AdaptedScore, Run, score_adapted
from tests.model_common import PARTS, small_gpt

VOCAB, BOS, SEQ = 23, 1, 12
LORA: dict[str, Any] = {"kind": "lora", "rank": 2, "lr": 0.02, "chunk": 4, "batch_docs": 3}
PHASED = LORA | {"kind": "phased", "prefix_docs": 6, "phases": 2, "sgd_chunk_tokens": 24, "sgd_rows": 1, "sgd_lr": 0.05}
SGD: dict[str, Any] = {"kind": "sgd", "sgd_chunk_tokens": 30, "sgd_rows": 1, "sgd_lr": 0.05}
KINDS = {"lora": LORA, "phased": PHASED, "sgd": SGD}


def gpt(**changes: Any) -> GPT:
    return small_gpt(vocab=VOCAB, **changes)


def stream(lengths: tuple[int, ...] = (9, 3, 30, 6, 14, 2, 11), seed: int = 0) -> np.ndarray:
    """Documents of words that repeat, so that there is something to learn."""
    random = np.random.default_rng(seed)
    word = random.integers(2, VOCAB, 5)
    parts = [np.concatenate(([BOS], np.resize(np.roll(word, i), n - 1))) for i, n in enumerate(lengths)]
    return np.concatenate(parts).astype(np.uint16)


def adapted(model: GPT, tokens: np.ndarray, section: TttSection, **settings: Any) -> AdaptedScore:
    return score_adapted(model, tokens, section, token_bytes=OneByteEach(), seq_len=SEQ, **settings)


@given(
    st.lists(st.integers(1, 30), max_size=12), st.integers(1, 4), st.booleans(), st.booleans(),
    st.sampled_from([(), ((4, 1),), ((5, 2), (11, 4)), ((100, 1),)]),
)  # fmt: skip
def test_every_target_is_in_one_document_one_batch_and_one_chunk(
    lengths: list[int], size: int, headless: bool, longest: bool, short: tuple[tuple[int, int], ...]
) -> None:
    tokens = np.concatenate([[5] * headless, *([BOS] + [7] * (n - 1) for n in lengths), [9]])
    documents = documents_of(tokens, BOS)
    targets = [t for d in documents for t in range(d.start + 1, d.start + d.length)]
    assert targets == list(range(1, len(tokens)))
    batches = batches_of(documents, size, "longest" if longest else "stream")
    assert sorted(d.number for b in batches for d in b.documents) == list(range(len(documents)))
    for batch in batches:
        chunks = batch.chunks(3, short, "longest" if longest else "stream")
        for d in batch.documents:
            edges = [chunks.begin(n) for n in range(chunks.count(d.targets) + 1)]
            spans = [window_of(d.targets, a, b, 5) for a, b in itertools.pairwise(edges)]
            assert edges[0] == 0 and max([-1, *edges[:-1]]) < d.targets <= edges[-1]
            assert [w.start + w.offset for w in spans] == edges[:-1]
            assert sum(w.count for w in spans) == d.targets
            assert all(w.length <= 5 and w.offset + w.count == w.length for w in spans)


def test_short_documents_are_cut_finer() -> None:
    """By their length where the records know it (#2014), by how far they have come from left to right."""
    short = ((256, 8), (2000, 24))
    documents = [Document(i, 0, length) for i, length in enumerate((100, 256, 257, 2000, 2001))]
    sizes = [Batch(0, documents[: i + 1]).chunks(48, short, "longest").size for i in range(5)]
    assert sizes == [8, 8, 24, 24, 48]
    steps = Batch(0, documents).chunks(48, short, "stream")
    assert [steps.begin(n) for n in (0, 1, 31, 32, 33, 104, 105, 106)] == [0, 8, 248, 256, 280, 1984, 2008, 2056]
    assert [steps.count(t) for t in (1, 8, 9, 256, 257, 2008, 2009, 2057)] == [1, 1, 2, 32, 33, 105, 106, 107]
    assert Chunks(48).begin(3) == 144 and Chunks(48).count(145) == 4


def test_without_learning_it_is_the_model_on_each_document_alone() -> None:
    model, tokens = gpt(), stream()
    result = adapted(model, tokens, TttSection(**(LORA | {"lr": 0.0, "context": 64})))
    for d in documents_of(tokens, BOS):
        own = torch.from_numpy(tokens[d.start : d.start + d.length].astype(np.int64))[None]
        with torch.no_grad():
            alone = model(own[:, :-1], own[:, 1:], reduction="none")[0]
        assert np.allclose(result.nll[d.start : d.start + d.length - 1], alone, atol=1e-5)
    assert result.scored_tokens == len(tokens) - 1 and result.documents == 7
    assert result.val_bpb == pytest.approx(result.nll.sum() / math.log(2) / (len(tokens) - 1))


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_leaves_the_model_as_it_was(kind: str) -> None:
    model, tokens = gpt(), stream((60, 50, 40, 45, 30, 35, 50, 20))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    still = {"lr": 0.0, "sgd_lr": 0.0}
    result = adapted(model, tokens, TttSection(**KINDS[kind]))
    assert result.val_loss < adapted(model, tokens, TttSection(**(KINDS[kind] | still))).val_loss
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert np.array_equal(adapted(model, tokens, TttSection(**KINDS[kind])).nll, result.nll)


def test_a_document_is_scored_alike_in_any_batch_and_any_company() -> None:
    model, tokens = gpt(), stream()
    whole = adapted(model, tokens, TttSection(**LORA)).nll
    for changes in ({"batch_docs": 1}, {"batch_docs": 5}, {"order": "longest", "context": 64}):
        base = adapted(model, tokens, TttSection(**(LORA | {"context": changes.get("context", 0)}))).nll
        assert np.allclose(adapted(model, tokens, TttSection(**(LORA | changes))).nll, base, atol=1e-4)
    third = documents_of(tokens, BOS)[2]
    alone = adapted(model, tokens[third.start : third.start + third.length], TttSection(**LORA)).nll
    assert np.allclose(alone, whole[third.start : third.start + third.length - 1], atol=1e-4)


class Half(Dist):
    """One rank's view of a world, without exchange: what it scores itself."""

    def all_max(self, value: float) -> float:
        return value


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"keep_a": True}, {"keep_a": True, "weight_decay": 0.9, "grad_steps": 2}, {"short_chunks": ((7, 2),)}],
)
def test_ranks_share_the_work_and_agree(kind: str, changes: dict[str, Any]) -> None:
    model, tokens, section = gpt(), stream(), TttSection(**(KINDS[kind] | changes))
    whole = adapted(model, tokens, section).nll
    parts = []
    for rank in range(2):
        dist = Half(rank=rank, world=2, device=torch.device("cpu"), backend="gloo")
        run = Run(model, section, None, tokens, SEQ, BOS, dist, math.inf, None)
        with adapting(model, SEQ):
            run.windows(SEQ, 64) if kind == "sgd" else run.documents()
        parts.append(run.nll[1:])
    assert ((~np.isnan(parts[0])).astype(int) + ~np.isnan(parts[1]) == 1).all()
    assert np.allclose(np.where(np.isnan(parts[0]), parts[1], parts[0]), whole, atol=2e-5)


def test_warm_adapters_go_on_from_the_batch_before() -> None:
    model, tokens = gpt(), stream()
    cold = adapted(model, tokens, TttSection(**LORA)).nll
    warm = adapted(model, tokens, TttSection(**(LORA | {"keep_a": True}))).nll
    first = documents_of(tokens, BOS)[2]
    edge = first.start + first.length - 1  # the first batch ends here
    assert np.array_equal(cold[:edge], warm[:edge]) and not np.allclose(cold[edge:], warm[edge:], atol=1e-6)


@pytest.mark.parametrize(
    ("model", "section"),
    [
        ({}, LORA),
        ({}, LORA | {"keep_a": True, "grad_steps": 2, "adapt": ("q", "o")}),
        ({"document_mask": True, "loop_layers": (1, 1), "loop_extra": 2}, PHASED),
        ({"parts": PARTS}, SGD),
        ({}, PHASED | {"short_chunks": ((3, 1), (8, 2))}),
    ],
)
def test_the_four_conditions_hold(model: dict[str, Any], section: dict[str, Any]) -> None:
    tilt = TiltSection(orders=(1, 2), min_count=1, threshold=0.5)
    scorer = AdaptedScorer(gpt(**model), TttSection(**section), tilt, seq_len=SEQ)
    found = legality.check(scorer, stream(), cuts=5)
    assert found.verdict is Verdict.PASS, found.text()


def test_learning_before_scoring_is_found() -> None:
    class Cheat(AdaptedScorer):
        def reset(self, stream: np.ndarray) -> None:
            super().reset(np.concatenate((stream, stream)))  # a second pass has seen the text
            self._rows = {t - len(stream): row for t, row in self._rows.items() if t >= len(stream)}

    scorer = Cheat(gpt(), TttSection(**(SGD | {"sgd_lr": 0.5})), seq_len=SEQ)
    assert legality.check(scorer, stream(), cuts=5).verdict is Verdict.VIOLATION


def test_the_order_of_the_records_is_not_from_left_to_right() -> None:
    section = TttSection(**(PHASED | {"order": "longest"}))
    assert legality.check(AdaptedScorer(gpt(), section, seq_len=SEQ), stream(), cuts=5).verdict is Verdict.VIOLATION


# -- bad input -------------------------------------------------------------------------------------------------------


def test_rank_zero_is_refused() -> None:
    with pytest.raises(GolfError, match=r"ttt\.rank = 0"):
        load_recipe("baseline", ["ttt.kind=lora", "ttt.rank=0"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "none"}, "nothing is learned"),
        ({"chunk": SEQ + 1}, r"ttt\.chunk=13 is more than the 12 tokens"),
        ({"short_chunks": ((4, SEQ + 1),)}, r"ttt\.short_chunks=13 is more than the 12 tokens"),
        ({"short_chunks": ((8, 2), (8, 1))}, r"ttt\.short_chunks: the limits \[8, 8\] must rise"),
        ({"adapt": ()}, r"ttt\.adapt"),
        ({"kind": "sgd", "sgd_chunk_tokens": SEQ - 1}, r"ttt\.sgd_chunk_tokens=11 holds no row"),
        ({"kind": "phased", "sgd_chunk_tokens": 5}, r"ttt\.sgd_chunk_tokens=5 holds no row"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GolfError, match=message):
        adapted(gpt(), stream(), TttSection(**(LORA | changes)))


def test_a_document_longer_than_the_context_slides() -> None:
    result = adapted(gpt(), stream((100,)), TttSection(**LORA))
    assert result.scored_tokens == 99 and np.isfinite(result.nll).all()


def test_too_little_time_and_too_little_text_give_no_score() -> None:
    with pytest.raises(GolfError, match=r"passed its limit of 1e-09 s"):
        adapted(gpt(), stream(), TttSection(**LORA), limit_seconds=1e-9)
    with pytest.raises(GolfError, match="at least 2"):
        adapted(gpt(), stream()[:1], TttSection(**LORA))


def test_a_rate_that_breaks_the_weights_is_an_error_not_a_score() -> None:
    with pytest.raises(CheckFailed, match=r"ttt\.lr"):
        adapted(gpt(logit_softcap=0.0), stream(), TttSection(**(SGD | {"sgd_lr": 1e30, "sgd_clip": 0.0})))


def test_adapting_twice_is_the_same_as_once() -> None:
    model, tokens = gpt(), stream()
    once = adapted(model, tokens, TttSection(**PHASED)).nll
    adaptation = Adaptation(model, TttSection(**PHASED), tokens, documents_of(tokens, BOS), SEQ)
    assert adaptation.pauses == [3, 6] and np.array_equal(once, adapted(model, tokens, TttSection(**PHASED)).nll)


# -- the n-gram tilt ---------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.lists(st.integers(0, 4), max_size=40), st.integers(0, 39))
def test_hints_know_the_past_alone(tokens: list[int], cut: int) -> None:
    section = TiltSection(orders=(1, 3), min_count=1, threshold=0.5)
    whole = hints(np.array(tokens, np.int64), section)
    changed = np.array(tokens[:cut] + [4 - t for t in tokens[cut:]], np.int64)
    assert np.array_equal(hints(changed, section)[: cut + 1], whole[: cut + 1])


def test_hints_by_example() -> None:
    table = NgramTable(TiltSection(orders=(2,), min_count=2, threshold=0.6))
    for token in (5, 6, 7, 5, 6, 7, 5, 6):
        table.give(token)
    assert table.hint() == 7
    for token in (8, 5, 6):
        table.give(token)
    assert table.hint() == 7  # two of three
    for token in (9, 5, 6):
        table.give(token)
    assert table.hint() == NO_HINT
    with pytest.raises(GolfError, match=r"tilt\.orders"):
        NgramTable(TiltSection())


def test_the_tilt_is_normalised_and_two_ways_to_it_agree() -> None:
    logits = torch.randn(6, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hint, truth = torch.tensor([3, -1, 0, 22, 5, 6]), torch.tensor([3, 4, 1, 22, 6, 6])
    tilted = torch.log_softmax(tilt_logits(logits, hint, 2.5), -1)
    assert torch.allclose(tilted.exp().sum(-1), torch.ones(6, dtype=torch.float64))
    plain = -torch.log_softmax(logits, -1)
    own, other = (plain.gather(1, ids.clamp_min(0)[:, None])[:, 0].numpy() for ids in (truth, hint))
    nll = tilted_nll(own, other, truth.numpy(), hint.numpy(), 2.5)
    assert np.allclose(nll, -tilted.gather(1, truth[:, None])[:, 0].numpy(), atol=1e-6)


def test_the_tilt_alone_on_the_windows_of_the_score() -> None:
    model, tokens = gpt(), stream((60, 60))
    tilt = TiltSection(orders=(4,), min_count=1)
    result = score_adapted(model, tokens, TttSection(), tilt, token_bytes=OneByteEach(), seq_len=SEQ, stride=4)
    plain = score(model, tokens, token_bytes=OneByteEach(), seq_len=SEQ, stride=4)
    assert result.val_loss == pytest.approx(plain.val_loss, abs=1e-5)
    keys = result.as_dict()
    assert keys["val_bpb_tilt"] < result.val_bpb - 0.1 and "ttt" not in keys
    cut = {"token_bytes": OneByteEach(), "seq_len": SEQ, "lane_count": 2}
    assert score_adapted(model, tokens, TttSection(), tilt, **cut).val_loss == pytest.approx(
        score(model, tokens, **cut).val_loss, abs=1e-5
    )
    both = score_adapted(model, tokens, TttSection(**LORA), tilt, token_bytes=OneByteEach(), seq_len=SEQ).as_dict()
    assert both["val_bpb_ttt_tilt"] < both["val_bpb_ttt"] and both["ttt"] == "lora"
