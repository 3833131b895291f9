"""Proofs with test-time training: the decoder learns what the encoder learnt, or nothing comes back."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paramgolf.data.sources import SEPARATOR
from paramgolf.errors import CheckFailed, GolfError
from paramgolf.model.gpt import GPT
from paramgolf.pack.wire import varint
from paramgolf.recipe.load import load_recipe, recipe_names
from paramgolf.recipe.sections import TttSection
from paramgolf.score.scorer import OneByteEach
from paramgolf.score.ttt.scorer import score_adapted
from paramgolf.text.adapted import check_codable, check_room, decode_adapted, encode_adapted
from paramgolf.text.prove import prove, ttt_section
from tests.model_common import PARTS, small_gpt
from tests.run_common import prose
from tests.test_text_files import make_artifact

VOCAB, BOS, SEQ = 23, 1, 16
LORA = TttSection(kind="lora", rank=2, lr=0.02, chunk=5, batch_docs=3)
PHASED = TttSection(
    kind="phased", rank=2, lr=0.02, chunk=5, batch_docs=2, prefix_docs=4, phases=2, sgd_chunk_tokens=16, sgd_lr=0.05
)
SHORT = TttSection(kind="lora", rank=2, lr=0.02, chunk=5, batch_docs=3, short_chunks=((3, 1), (12, 2)))


def stream() -> np.ndarray:
    random = np.random.default_rng(3)
    lengths = (9, 1, 33, 6, 14, 2, 27)
    return np.concatenate([[BOS, *random.integers(2, VOCAB, n - 1)] for n in lengths]).astype(np.uint16)


@pytest.mark.parametrize("section", [LORA, PHASED, SHORT], ids=["lora", "phased", "short"])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"parts": PARTS},
        {"document_mask": True, "loop_layers": (1, 1), "loop_extra": 1, "lanes_from": 2, "parts": {"smear_gate2": {}}},
        {"rope_ref_len": 8},
    ],
)
def test_what_was_coded_comes_back_at_the_size_of_its_score(section: TttSection, shape: dict[str, Any]) -> None:
    model, tokens = small_gpt(vocab=VOCAB, **shape), stream()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data, bits = encode_adapted(model, tokens, section, seq_len=SEQ, tolerance=1e-4)
    back = decode_adapted(model, data, seq_len=SEQ, limit=len(tokens))
    assert np.array_equal(back, tokens)
    score = score_adapted(model, tokens, section, token_bytes=OneByteEach(), seq_len=SEQ)
    assert bits == pytest.approx(score.nll.sum() / math.log(2), rel=1e-6)
    assert 8 * len(data) < bits + 8 * (300 + 12 * 7)  # settings, and a few bytes for each document
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_model_or_a_damaged_stream_is_noticed() -> None:
    model, tokens = small_gpt(vocab=VOCAB), stream()
    data, _ = encode_adapted(model, tokens, LORA, seq_len=SEQ, tolerance=1e-4)
    with pytest.raises((CheckFailed, GolfError)):
        decode_adapted(small_gpt(vocab=VOCAB, seed=1), data, seq_len=SEQ, limit=len(tokens))
    with pytest.raises(GolfError, match=r"impossible sizes|above its limit"):
        decode_adapted(model, data, seq_len=SEQ, limit=len(tokens) - 1)
    for cut in range(0, len(data) - 1, 7):
        with pytest.raises((CheckFailed, GolfError)):
            decode_adapted(model, data[:cut], seq_len=SEQ, limit=len(tokens))
    random = np.random.default_rng(0)
    for at in random.integers(0, len(data), 25).tolist():
        broken = bytearray(data)
        broken[at] ^= 1 << int(random.integers(8))
        try:
            back = decode_adapted(model, bytes(broken), seq_len=SEQ, limit=len(tokens))
        except (CheckFailed, GolfError):
            continue
        assert np.array_equal(back, tokens)  # a bit that means nothing, such as a rate of a setting never used


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (TttSection(kind="sgd"), r"ttt\.kind=sgd cannot be proved"),
        (TttSection(kind="lora", order="longest"), r"ttt\.order=longest cannot be proved"),
        (TttSection(kind="lora", rank=5000), r"ttt\.rank up to 1024"),
        (TttSection(kind="lora", grad_steps=1 << 53), r"ttt\.grad_steps up to 64"),
        (TttSection(kind="phased", phases=50_000_000), r"ttt\.phases up to 64"),
        (TttSection(kind="phased", sgd_epochs=65), r"ttt\.sgd_epochs up to 64"),
    ],
)
def test_what_a_decoder_could_not_follow_is_refused(section: TttSection, message: str) -> None:
    with pytest.raises(GolfError, match=message):
        encode_adapted(small_gpt(vocab=VOCAB), stream(), section, seq_len=SEQ, tolerance=1e-4)


def payload(section: dict[str, Any], targets: list[int]) -> bytes:
    """What `decode_adapted` is given, up to the coded streams."""
    said = json.dumps(section).encode()
    return b"".join([varint(len(said)), said, varint(len(targets)), *map(varint, targets)])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kind": "lora", "grad_steps": 1 << 53, "chunk": 1}, r"ttt\.grad_steps up to 64"),
        ({"kind": "lora", "rank": 1024, "batch_docs": 400}, r"lower ttt\.rank or ttt\.batch_docs"),
        ({"kind": "lora", "rank": 1, "chunk": 1 << 20, "context": 1 << 20}, r"lower ttt\.chunk"),
    ],
)
def test_settings_that_would_take_all_memory_or_time_are_refused_on_both_sides(
    section: dict[str, Any], message: str
) -> None:
    model, documents = small_gpt(vocab=VOCAB), 400
    with pytest.raises(GolfError, match=message):
        decode_adapted(model, payload(section, [2] * documents), seq_len=SEQ, limit=1 << 20)
    tokens = np.tile(np.array([BOS, 5, 6], np.uint16), documents)
    with pytest.raises(GolfError, match=message):
        encode_adapted(model, tokens, TttSection(**section), seq_len=SEQ, tolerance=1e-4)


def test_the_adapters_that_shipped_recipes_ask_for_fit() -> None:
    for name in recipe_names():
        recipe = load_recipe(name)
        with torch.device("meta"):
            model = GPT(recipe.model, recipe.data.vocab_size)
        check_room(model, recipe.ttt, 50_000)
        check_codable(dataclasses.replace(recipe.ttt, kind="phased", order="stream"))


def test_memory_follows_what_is_decoded_not_what_is_promised() -> None:
    hostile = payload({"kind": "lora", "rank": 1}, [1 << 29]) + varint(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(GolfError, match="coded stream"):
        decode_adapted(small_gpt(vocab=VOCAB), hostile, seq_len=64, limit=1 << 30)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_a_proof_with_test_time_training(tmp_path: Path) -> None:
    artifact, text = make_artifact(tmp_path / "model.golf"), tmp_path / "val.txt"
    documents = [prose()[at : at + 300].strip().encode() for at in range(0, 1800, 300)]
    text.write_bytes(SEPARATOR.join(documents))
    section = ttt_section(artifact, ["ttt.chunk=16", "ttt.batch_docs=4", "ttt.rank=2"], True)
    assert section is not None and section.kind == "lora" and section.chunk == 16
    with pytest.raises(GolfError, match="only ttt"):
        ttt_section(artifact, ["model.dim=3"], True)
    proof = prove(artifact, str(text), ttt=section, say=lambda line: None)
    assert proof["documents"] == 6 and proof["ttt"] == "lora" and proof["text_bytes"] == sum(map(len, documents))
    score_bytes = proof["val_bpb_same_windows"] * proof["text_bytes"] / 8
    assert score_bytes < proof["file_bytes"] < score_bytes + 300  # settings, and each short document a lane of its own
