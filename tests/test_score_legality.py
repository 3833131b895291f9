"""The legality check: every planted cheat is caught by the condition it breaks, no honest scorer is flagged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paramgolf.errors import GolfError
from paramgolf.model.gpt import GPT
from paramgolf.model.parts.smear_gate import SmearGate
from paramgolf.recipe.sections import ModelSection, NgramLevel, NgramSection
from paramgolf.score import legality
from paramgolf.score.coder import Decoder
from paramgolf.score.exam import Exam
from paramgolf.score.legality import CONDITIONS, Legality, Verdict
from paramgolf.score.own_scorers import CacheScorer, WindowScorer, check_all, coded_log_probs
from paramgolf.score.stream import encode_stream
from tests import legality_cheats as cheats
from tests.run_common import error_line, golf_here, prose
from tests.test_score_scorer import VOCAB, T, stream, tiny_model
from tests.test_text_files import make_artifact


def flagged(result: Legality) -> set[str]:
    return {name for name, finding in result.findings.items() if finding.verdict is Verdict.VIOLATION}


def unknown(result: Legality) -> set[str]:
    return {name for name, finding in result.findings.items() if finding.verdict is Verdict.UNKNOWN}


@pytest.mark.parametrize("stride", [0, 5])
def test_all_our_paths_pass(stride: int) -> None:
    ngram = NgramSection(levels=(NgramLevel(order=1), NgramLevel(scope="text", order=2, strength=0.0)))
    results = check_all(tiny_model(), stream(200), seq_len=T, stride=stride, ngram=ngram)
    assert results.keys() >= {"windows", "lanes", "token by token", "text coder", "n-gram cache"}
    assert ("sliding windows" in results) == bool(stride)
    for name, result in results.items():
        assert result.verdict is Verdict.PASS, f"{name}\n{result.text()}"


MASKED = ModelSection(
    dim=16, num_layers=3, num_heads=2, num_kv_heads=1, mlp_hidden=24, document_mask=True,
    parts={"smear_gate": {}, "bigram_hash": {"buckets": 64, "dim": 8}, "xsa": {}},
)  # fmt: skip


def masked_model(leaks: bool) -> GPT:
    """Keeps to each document, but for a smear gate that does not (`leaks`)."""
    model = GPT(MASKED, VOCAB)
    if leaks:
        kept = model.smear
        model.smear = cheats.LeakySmear(SmearGate.Config(), MASKED, VOCAB)
        model.smear.load_state_dict(kept.state_dict())
    model.init_weights(1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def test_documents_that_a_model_keeps_apart() -> None:
    for name, result in check_all(masked_model(leaks=False), stream(90), seq_len=32, stride=24, cuts=2).items():
        assert result.verdict is Verdict.PASS, f"{name}\n{result.text()}"
    leaky = legality.check(WindowScorer(masked_model(leaks=True), seq_len=64), stream(120), cuts=2)
    assert flagged(leaky) == {"causal"} and "scored apart" in leaky.findings["causal"].evidence


def test_honest_scorers_pass() -> None:
    model = tiny_model()
    for scorer in (
        cheats.Bigram(), cheats.Trained(model, T, chunk=8), cheats.PackedDocuments(tiny_model(), leaks=False),
    ):  # fmt: skip
        result = legality.check(scorer, stream(120), cuts=6)
        assert result.verdict is Verdict.PASS, f"{type(scorer).__name__}\n{result.text()}"


STEP_CHEATS: dict[str, tuple[Any, set[str]]] = {
    "a smear gate that leaks over document starts": (
        lambda: cheats.PackedDocuments(tiny_model(), leaks=True), {"causal"},
    ),
    "test-time training before scoring": (
        lambda: cheats.Trained(tiny_model(), T, chunk=0), {"causal", "score_first", "normalised"},
    ),
    "a target-keyed n-gram cache": (cheats.TargetKeyed, {"normalised", "score_first"}),
    "an unnormalised mixture": (cheats.Unnormalised, {"normalised"}),
    "double scoring of a tail": (
        lambda: WindowScorer(tiny_model(), seq_len=T, stride=4, windows="with_tail"), {"once"},
    ),
    "a dropped tail": (lambda: WindowScorer(tiny_model(), seq_len=T, stride=7, windows="full_only"), {"once"}),
    "batch statistics": (
        lambda: WindowScorer(cheats.batch_statistics(tiny_model()), seq_len=T), {"causal", "score_first", "normalised"},
    ),
    "a look at what follows": (cheats.NextToken, {"causal", "score_first"}),
    "memory of an earlier run": (cheats.Memory, {"score_first"}),
    "charges below the distribution": (cheats.Flattered, {"normalised"}),
}  # fmt: skip


@pytest.mark.parametrize("name", STEP_CHEATS)
def test_planted_cheats_are_caught(name: str) -> None:
    make, conditions = STEP_CHEATS[name]
    result = legality.check(make(), stream(120) if name != "double scoring of a tail" else stream(119), cuts=6)
    assert result.verdict is Verdict.VIOLATION
    assert flagged(result) <= conditions and min(conditions) in flagged(result), result.text()
    for condition in flagged(result):
        assert any(c.isdigit() for c in result.findings[condition].evidence)


def test_where_only_scores_are_given() -> None:
    text = legality._phrases(VOCAB, 1, np.random.default_rng(0))[:90]
    honest = legality.check(cheats.Charges(cheats.Bigram()), text, cuts=6)
    assert not flagged(honest) and unknown(honest) == {"score_first"}
    mute = legality.check(cheats.Charges(cheats.Bigram(), says_targets=False), text, cuts=6)
    assert not flagged(mute) and unknown(mute) == {"score_first", "once"}
    for scorer, conditions in (
        (cheats.Charges(cheats.Unnormalised()), {"normalised"}),
        (cheats.Charges(cheats.TargetKeyed()), {"normalised"}),
        (cheats.Charges(cheats.NextToken()), {"causal"}),
        (cheats.Charges(cheats.Memory()), {"score_first"}),
        (cheats.BestOfTwo(cheats.Bigram()), {"causal"}),
        (cheats.SecondPass(cheats.Bigram()), {"once"}),
        (cheats.SecondPass(cheats.Bigram(), says_targets=False), {"once"}),
    ):
        found = flagged(legality.check(scorer, text, cuts=6))
        assert conditions <= found, f"{type(scorer).__name__} {type(scorer.inner).__name__}: {found}"


def test_the_coder_codes_with_probabilities_at_every_place() -> None:
    model, tokens = tiny_model(), stream(300)
    settings = Decoder(encode_stream(model, tokens, seq_len=T)).settings
    cache = CacheScorer(model, seq_len=T)
    cache.reset(tokens)
    cache.give(1)
    logits = cache._logits()
    for place in range(0, settings.grid.shifts, 7):
        coded = coded_log_probs(settings, logits, place)
        assert len(coded) == VOCAB and np.exp(coded).sum() == pytest.approx(1)
        exact = logits.double().log_softmax(-1)[0].numpy()
        assert (np.exp(exact) * (exact - coded)).sum() < 0.03  # nats that the cells cost


def test_damaged_distributions_are_violations() -> None:
    class Short(cheats.Bigram):
        def log_probs(self) -> np.ndarray:
            return np.log(np.full(3, 1 / 3))

    class Broken(cheats.Bigram):
        def log_probs(self) -> np.ndarray:
            return np.full(cheats.V, np.nan)

    for scorer, words in ((Short(), "shape (3,)"), (Broken(), "not numbers")):
        finding = legality.check(scorer, cuts=3).findings["normalised"]
        assert finding.verdict is Verdict.VIOLATION and words in finding.evidence


def test_streams_may_only_begin_at_documents() -> None:
    class Everywhere(cheats.Bigram):
        def starts(self, stream: np.ndarray) -> list[int]:
            return [0, 50]

    assert flagged(legality.check(Everywhere(), stream(100), cuts=3)) >= {"once"}


def test_refusals() -> None:
    with pytest.raises(GolfError, match="needs vocab_size"):
        legality.check(object())  # type: ignore[arg-type]
    with pytest.raises(GolfError, match="at least 8 token ids"):
        legality.check(cheats.Bigram(), np.array([1, 2]))
    with pytest.raises(GolfError, match="none but document starts"):
        legality.check(WindowScorer(tiny_model(), seq_len=T, lane_count=2), np.ones(20, np.int64))
    with pytest.raises(GolfError, match="id 48 is outside the scorer's vocabulary of 48"):
        legality.check(cheats.Bigram(), np.arange(40, 49))
    with pytest.raises(GolfError, match="at least 8 tokens"):
        check_all(tiny_model(), np.zeros(0, np.int64), seq_len=T)


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    artifact = make_artifact(tmp_path / "model.golf")
    (tmp_path / "val.txt").write_text("\x1e\n".join(prose()[at : at + 40] for at in range(0, 200, 40)))
    command = ("score", artifact, "--data", tmp_path / "val.txt", "--check-legality")
    answer = golf_here(capfd, *command, "--stride", "48", "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)["legality"]
    assert found.keys() == {"windows", "sliding windows", "lanes", "token by token", "text coder", "n-gram cache"}
    assert {one["verdict"] for one in found.values()} == {"pass"}
    (tmp_path / "short.txt").write_text("ab")
    short = golf_here(capfd, "score", artifact, "--data", tmp_path / "short.txt", "--check-legality")
    assert "at least 8 tokens" in error_line(short)
    (tmp_path / "val.txt").write_text(prose()[:100])
    with cheats.batch_statistics_everywhere():
        broken = golf_here(capfd, *command)
    assert broken.code == 1 and "the score is not legal: windows" in broken.err
    assert "causal: violation: the distribution of token" in broken.out


def test_the_result_is_json_and_text() -> None:
    result = legality.check(cheats.Bigram(), stream(60), cuts=3)
    assert result.as_dict()["conditions"].keys() == CONDITIONS.keys()
    assert result.as_dict()["verdict"] == "pass" and len(result.text().splitlines()) == 4


@pytest.mark.parametrize("count", [3, 4, 8, 12])
def test_some_place_follows_the_start_of_a_document(count: int) -> None:
    text = np.random.default_rng(0).integers(2, VOCAB, 400)
    text[[100, 300]] = 1
    for seed in range(20):
        places = Exam(None, text, 1, 1e-4, np.random.default_rng(seed)).places(count)
        assert len(places) == count and {101, 301} & set(places.tolist())
