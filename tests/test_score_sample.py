"""Sampling: determinism, the cache past its length, stop strings, whole characters; and the public API."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import paramgolf
from paramgolf.data import bpe
from paramgolf.data.tokenizer import Tokenizer
from paramgolf.errors import GolfError
from paramgolf.model.gpt import GPT
from paramgolf.pack.packer import pack_model
from paramgolf.recipe.load import load_recipe
from paramgolf.score import sample
from tests.run_common import error_line, golf_here

TEXT = [("the cat sat on the mat, naïve café \U0001f600 and the dog ran after the cat " * 8).encode()]
PROMPT = [5]  # what a text goes on from, where it does not matter what


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return bpe.train_bpe(TEXT, 300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    section = load_recipe("baseline").model
    sized = dataclasses.replace(section, dim=16, num_layers=2, num_heads=2, num_kv_heads=1, mlp_hidden=24)
    built = GPT(sized, tokenizer.vocab_size)
    built.init_weights(1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return built.eval()


def sampled(model: GPT, tokenizer: Tokenizer, **settings: Any) -> list[str]:
    return list(sample.generate(model, tokenizer, "the cat", **({"context": 32, "max_tokens": 60} | settings)))


def test_seed_decides(model: GPT, tokenizer: Tokenizer) -> None:
    assert sampled(model, tokenizer, seed=1) == sampled(model, tokenizer, seed=1) != sampled(model, tokenizer, seed=2)


def test_greedy_equals_reading_everything_again(model: GPT, tokenizer: Tokenizer) -> None:
    """Past the context the older half is forgotten: the same rule without a cache."""
    context, ids, expected = 16, [tokenizer.bos_id, *tokenizer.encode("the cat").tolist()], []
    window = list(ids)
    for _ in range(50):
        with torch.no_grad():
            token = int(model.logits(torch.tensor([window]))[0, -1].argmax())
        expected.append(token)
        window.append(token)
        if len(window) > context:
            window = window[-(context // 2) :]
    told = list(sample._tokens(model, ids, context, 50, 0.0, 1.0, 0, 0))
    assert told == expected


def test_a_prompt_longer_than_the_context(model: GPT, tokenizer: Tokenizer) -> None:
    pieces = list(sample.generate(model, tokenizer, "the cat sat " * 40, context=8, max_tokens=20))
    assert isinstance("".join(pieces), str)


def test_pieces_are_whole_characters(model: GPT, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\U0001f600 naïve \u2581 x").tolist()
    byte_ids = [i for raw in "€".encode() for i in tokenizer.encode(bytes([raw])).tolist()]
    pieces = list(sample._text(iter(ids + byte_ids), tokenizer, PROMPT, []))
    assert "".join(pieces) == "\U0001f600 naïve \u2581 x€" and not any("\ufffd" in piece for piece in pieces)
    cut = list(sample._text(iter(byte_ids[:2]), tokenizer, PROMPT, []))
    assert "".join(cut) == "\ufffd"  # an unfinished character at the end is shown as such


def test_capitals_that_a_prompt_leaves_open_go_on() -> None:
    cased = bpe.train_bpe([b"HELLO hello World the WORLD says hello"] * 9, 300, case_operators=True)
    ids = cased.encode("HELLO WORLD").tolist()
    for cut in range(1, len(ids)):
        told = "".join(sample._text(iter(ids[cut:]), cased, ids[:cut], []))
        assert cased.decode(ids[:cut]).decode() + told == "HELLO WORLD"


def test_stop_strings_never_show(model: GPT, tokenizer: Tokenizer) -> None:
    for stop in ("dog ran", "mat,", "g"):
        ids = tokenizer.encode("on the mat, and the dog ran away").tolist()
        pieces = list(sample._text(iter(ids), tokenizer, PROMPT, [stop, "zzz"]))
        assert "".join(pieces) == "on the mat, and the dog ran away".split(stop)[0]
    held = list(sample._text(iter(tokenizer.encode("the do").tolist()), tokenizer, PROMPT, ["dog"]))
    assert "".join(held) == "the do"  # what only looked like the beginning of a stop string comes at the end


def test_a_new_document_ends_the_text(model: GPT, tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("the cat").tolist(), tokenizer.bos_id, *tokenizer.encode("dog").tolist()]
    assert "".join(sample._text(iter(ids), tokenizer, PROMPT, [])) == "the cat"


def test_pick_respects_its_limits() -> None:
    logits = np.log(np.array([0.05, 0.5, 0.15, 0.3]))
    random = np.random.default_rng(0)
    draws = {kind: [sample.pick(logits, *kind, random) for _ in range(4000)] for kind in ((1.0, 1.0, 0), (1.0, 0.7, 0))}
    shares = np.bincount(draws[1.0, 1.0, 0], minlength=4) / 4000
    np.testing.assert_allclose(shares, [0.05, 0.5, 0.15, 0.3], atol=0.03)
    assert set(draws[1.0, 0.7, 0]) == {1, 3}
    assert (
        {sample.pick(logits, 1.0, 1.0, 1, random) for _ in range(50)}
        == {1}
        == {sample.pick(logits, 0.0, 1.0, 0, random)}
    )


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.5}, {"max_tokens": -1},
        {"stop": [""]}, {"seed": -1},
    ],
)  # fmt: skip
def test_bad_settings_are_refused(model: GPT, tokenizer: Tokenizer, bad: dict[str, Any]) -> None:
    with pytest.raises(GolfError):
        sampled(model, tokenizer, **bad)


@pytest.fixture(scope="module")
def artifact(model: GPT, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = load_recipe("baseline", ["train.seq_len=32", "budget.bytes=0", "score.stride=8"])
    recipe = dataclasses.replace(recipe, model=model.section)
    path = tmp_path_factory.mktemp("api") / "model.golf"
    pack_model(model.state_dict(), recipe, tokenizer.compact(), path, tokenizer.vocab_size)
    return path


def test_load_score_nll_sample(artifact: Path, tmp_path: Path) -> None:
    loaded = paramgolf.load(artifact, device="cpu")
    text = "the cat sat on the mat, naïve café " * 5
    result = loaded.score(text)
    assert (loaded.seq_len, result.seq_len, result.scored_bytes) == (32, 32, len(text.encode()))
    nll = loaded.nll(text)
    assert len(nll) == len(loaded.tokenizer.encode(text)) == result.scored_tokens
    assert nll.mean() == pytest.approx(result.val_loss, abs=1e-5)
    file = tmp_path / "text.txt"
    file.write_text(text)
    assert loaded.score(file).val_bpb == result.val_bpb
    for ids in (np.array([1, 300]), np.array([-1, 4]), np.array([0.5, 1.0]), np.array([[1, 2], [3, 4]])):
        with pytest.raises(GolfError, match="ids, integers from 0 to 299"):
            loaded.nll(ids)
    with pytest.raises(GolfError, match="the prompt is no text at character 2"):
        loaded.sample("a \ud800")
    with pytest.raises(GolfError, match="check the path"):
        paramgolf.load("a\0b")
    told = loaded.score_data(str(file))
    assert told["val_bpb"] == result.val_bpb and told["stride"] == 8 and "val_bpb_sliding" in told
    assert told["val_bpb_sliding"] == pytest.approx(loaded.score(text, stride=8).val_bpb)
    assert "val_bpb_sliding" not in loaded.score_data(str(file), stride=32), (
        "windows side by side are the standard score"
    )
    with pytest.raises(GolfError, match=r"score\.stride is 33, and a window has 32 tokens"):
        loaded.score_data(str(file), stride=33)
    assert loaded.sample("the", max_tokens=5, seed=3) == "".join(loaded.stream("the", max_tokens=5, seed=3))
    assert loaded.config["vocab_size"] == loaded.tokenizer.vocab_size and len(loaded.sha256) == 64
    with pytest.raises(GolfError, match="empty"):
        loaded.score("")
    with pytest.raises(GolfError):
        paramgolf.load(tmp_path / "absent.golf")


def test_the_command_samples_and_refuses_as_the_api_does(artifact: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told = json.loads(golf_here(capfd, "sample", artifact, "the", "--tokens", "40", "--json").out)
    assert told["text"] == paramgolf.load(artifact).sample("the", max_tokens=40)
    for top_p in ("0", "1.5", "nan"):
        line = error_line(golf_here(capfd, "sample", artifact, "the", "--top-p", top_p))
        assert "choose temperature >= 0, 0 < top_p <= 1" in line
