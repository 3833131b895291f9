"""The scorer: against a plain loop, across batch sizes and ranks, and its refusals."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from paramgolf.data.token_bytes import TokenBytes
from paramgolf.dist import Dist, init
from paramgolf.errors import CheckFailed, GolfError
from paramgolf.model.gpt import GPT
from paramgolf.recipe.sections import ModelSection
from paramgolf.score.scorer import Score, score

VOCAB, T = 48, 16
TABLE = TokenBytes(
    base_bytes=np.array([0, 0] + [1 + i % 3 for i in range(VOCAB - 2)], dtype=np.int16),
    leading_space=np.arange(VOCAB) % 5 == 4,
    boundary=np.arange(VOCAB) < 2,
)


def tiny_model(seed: int = 3) -> GPT:
    model = GPT(ModelSection(dim=16, num_layers=2, num_heads=2, num_kv_heads=1, mlp_hidden=24), VOCAB)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # away from the zero output maps, so that context matters
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def stream(n: int, seed: int = 0) -> np.ndarray:
    tokens = np.random.default_rng(seed).integers(2, VOCAB, n).astype(np.uint16)
    tokens[::37] = 1
    return tokens


def by_hand(model: GPT, tokens: np.ndarray, stride: int) -> np.ndarray:
    """Each target on its own, with the context the rule promises: an independent, slow computation."""
    out, ids = [], torch.from_numpy(tokens.astype(np.int64))
    with torch.no_grad():
        for target in range(1, len(tokens)):
            behind = max(0, -(-(target - T) // stride))  # windows before the one that scores it
            logits = model.logits(ids[None, behind * stride : target])[0, -1]
            out.append(-torch.log_softmax(logits.double(), -1)[ids[target]].item())
    return np.array(out)


@pytest.mark.parametrize("stride", [T, 5, 1])
@pytest.mark.parametrize("n", [2, T, T + 1, 103])
def test_agrees_with_a_loop_over_targets(n: int, stride: int) -> None:
    model, tokens = tiny_model(), stream(n)
    expected = by_hand(model, tokens, stride)
    result = score(model, tokens, token_bytes=TABLE, seq_len=T, stride=stride, batch_tokens=5 * T, keep_nll=True)
    assert result.nll is not None
    np.testing.assert_allclose(result.nll, expected, atol=2e-5)
    size = int(TABLE.count(tokens[:-1], tokens[1:]).sum())
    assert (result.scored_tokens, result.scored_bytes, result.bytes_from) == (n - 1, size, "table")
    assert result.val_loss == pytest.approx(expected.mean(), abs=1e-5)
    assert result.val_bpb == pytest.approx(expected.sum() / math.log(2) / size, rel=1e-5)


def test_document_bytes_are_the_denominator_where_known() -> None:
    tokens = stream(60)
    result = score(tiny_model(), tokens, token_bytes=TABLE, true_bytes=200, seq_len=T)
    assert (result.scored_bytes, result.bytes_from) == (200, "documents")
    assert result.table_bytes == int(TABLE.count(tokens[:-1], tokens[1:]).sum()) != 200
    assert result.val_bpb == pytest.approx(result.val_loss * 59 / math.log(2) / 200)
    headless = score(tiny_model(), tokens[1:], token_bytes=TABLE, true_bytes=200, seq_len=T)
    assert headless.scored_bytes == 200 - TABLE.base_bytes[tokens[1]] - TABLE.leading_space[tokens[1]]


def test_begin_tokens_cost_loss_and_count_no_bytes() -> None:
    tokens = np.array([1, 5, 1, 7], dtype=np.uint16)
    result = score(tiny_model(), tokens, token_bytes=TABLE, seq_len=T)
    assert result.scored_tokens == 3 and result.scored_bytes == int(TABLE.base_bytes[[5, 7]].sum())


@pytest.mark.parametrize("stride", [T, 3])
def test_batch_size_does_not_matter(stride: int) -> None:
    model, tokens = tiny_model(), stream(500)
    results = [
        score(model, tokens, token_bytes=TABLE, seq_len=T, stride=stride, batch_tokens=b) for b in (1, 7 * T, 10**6)
    ]
    assert {r.scored_tokens for r in results} == {499}
    assert max(r.val_loss for r in results) - min(r.val_loss for r in results) < 1e-6


def test_every_batch_has_one_shape() -> None:
    model, shapes = tiny_model(), set()
    model.blocks[0].register_forward_hook(lambda _m, args, _out: shapes.add(tuple(args[0].shape)))
    score(model, stream(T * 21 + 4), token_bytes=TABLE, seq_len=T, batch_tokens=4 * T)
    assert len(shapes) == 1


def test_lanes_score_all_but_their_first_tokens() -> None:
    model, tokens = tiny_model(), stream(400)
    result = score(model, tokens, token_bytes=TABLE, seq_len=T, lane_count=4, keep_nll=True)
    assert result.lanes == 4 and result.scored_tokens == 396 and result.nll is not None
    first = score(model, tokens[: 37 * 3], token_bytes=TABLE, seq_len=T, keep_nll=True)  # the first lane on its own
    np.testing.assert_allclose(result.nll[: 37 * 3 - 1], first.nll, atol=1e-5)


def test_training_goes_on_after_a_score() -> None:
    model = tiny_model().train()
    score(model, stream(100), token_bytes=TABLE, seq_len=T)
    ids = torch.from_numpy(stream(T + 1).astype(np.int64))[None]
    model(ids[:, :-1], ids[:, 1:]).backward()
    assert model.training and model.tok_emb.weight.grad is not None


def test_reference_rules_count_as_the_references() -> None:
    model, tokens = tiny_model(), stream(100)
    lost = score(model, tokens, token_bytes=TABLE, seq_len=T, stride=8, windows="full_only")
    twice = score(model, tokens, token_bytes=TABLE, seq_len=T, stride=8, windows="with_tail", true_bytes=5)
    assert lost.scored_tokens == 96 and twice.scored_tokens == 16 + 11 * 8 and twice.bytes_from == "table"


def test_refusals() -> None:
    model, tokens = tiny_model(), stream(3000)
    with pytest.raises(GolfError, match=r"passed its limit of 1e-09 s .* of 2,999 targets; no score"):
        score(model, tokens, token_bytes=TABLE, seq_len=T, batch_tokens=T, limit_seconds=1e-9)
    with pytest.raises(GolfError, match="no full window"):
        score(model, tokens[:10], token_bytes=TABLE, seq_len=T, windows="full_only")
    with pytest.raises(GolfError, match="no bytes"):
        score(model, np.ones(5, np.uint16), token_bytes=TABLE, seq_len=T)
    with torch.no_grad():
        model.tok_emb.weight[7] = math.nan
    with pytest.raises(CheckFailed, match="not a number"):
        score(model, tokens, token_bytes=TABLE, seq_len=T)


def test_result_keys() -> None:
    model, tokens = tiny_model(), stream(80)
    plain = score(model, tokens, token_bytes=TABLE, seq_len=T).as_dict()
    sliding = score(model, tokens, token_bytes=TABLE, seq_len=T, stride=4).as_dict()
    assert {"val_loss", "val_bpb", "scored_tokens", "scored_bytes"} <= plain.keys()
    assert {"val_bpb_sliding", "stride"} <= sliding.keys() and not plain.keys() & sliding.keys()


def _rank(rank: int, world: int, port: int, out: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist = init("cpu")
    result = _scored(dist)
    late = ""
    try:
        score(
            tiny_model(), stream(3000), token_bytes=TABLE, seq_len=T, batch_tokens=2 * T, dist=dist, limit_seconds=1e-9
        )
    except GolfError as error:
        late = str(error)
    dist.close()
    lines = [repr(result.val_loss), str(result.scored_tokens), str(result.scored_bytes), late]
    Path(out, str(rank)).write_text("\n".join(lines))


def _scored(dist: Dist | None) -> Score:
    tokens = stream(777)
    return score(tiny_model(), tokens, token_bytes=TABLE, seq_len=T, stride=6, batch_tokens=9 * T, dist=dist)


def test_two_processes_give_the_same_score(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, args=(2, port, str(tmp_path)), nprocs=2)
    alone = _scored(None)
    told = [(tmp_path / str(rank)).read_text().split("\n") for rank in range(2)]
    assert told[0] == told[1]
    assert float(told[0][0]) == pytest.approx(alone.val_loss, abs=1e-7)
    assert told[0][1:3] == [str(alone.scored_tokens), str(alone.scored_bytes)]
    assert "passed its limit" in told[0][3]
