"""Documents inside rows: where segments begin, and one result whatever the kernel, the packing or the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from paramgolf.errors import GolfError
from paramgolf.model.attention import choose
from paramgolf.model.backends import FlexAttention, PlainMath, ScaledDotProduct
from paramgolf.model.cache import KVCache
from paramgolf.model.documents import BOS_ID, bounds, cumulative_lengths, room_for, segment_numbers
from paramgolf.model.gpt import GPT
from tests.model_common import small_gpt, tokens

PARTS = {"bigram_hash": {"buckets": 31, "dim": 4}, "smear_gate": {}, "value_embed": {"dim": 4}, "xsa": {}}
FULL: dict[str, Any] = {"document_mask": True, "parts": PARTS, "rope_dims": 4}


def masked(**changes: Any) -> GPT:
    return small_gpt(**(FULL | changes))


def documents(*lengths: int, seed: int = 0) -> Tensor:
    """(1, sum) ids of documents of these lengths, each begun by its token."""
    ids = tokens(1, sum(lengths), seed=seed)
    ids[ids == BOS_ID] = 2
    start = 0
    for length in lengths:
        ids[0, start] = BOS_ID
        start += length
    return ids


def test_segments_begin_at_documents_and_where_they_are_cut() -> None:
    ids = torch.tensor([[5, BOS_ID, 6, 7, 8, 9, BOS_ID, BOS_ID, 3], [BOS_ID, 2, 2, 2, 2, 2, 2, 2, 2]])
    assert segment_numbers(ids).tolist() == [[0, 1, 1, 1, 1, 1, 2, 3, 3], [0] * 9]
    assert segment_numbers(ids, cut=3).tolist() == [[0, 1, 1, 1, 2, 2, 3, 4, 4], [0, 0, 0, 1, 1, 1, 2, 2, 2]]
    assert bounds(segment_numbers(ids)) == [0, 1, 6, 7, 9, 18]


def test_cumulative_lengths_have_one_size_and_refuse_too_many() -> None:
    segments = segment_numbers(documents(3, 1, 6))
    assert cumulative_lengths(segments, 5).tolist() == [0, 3, 4, 10, 10, 10]
    assert cumulative_lengths(segments, 3).tolist() == [0, 3, 4, 10]
    with pytest.raises(RuntimeError):
        cumulative_lengths(segments, 2)
    assert [room_for(n) for n in (1, 64, 65, 200)] == [64, 64, 128, 256]


def test_a_packed_row_equals_its_documents_alone() -> None:
    model, lengths = masked(), (5, 1, 9, 4)
    packed = documents(*lengths)
    together = model.logits(packed)
    alone = [model.logits(piece) for piece in packed.split(lengths, dim=1)]
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=0, atol=3e-5)


def test_cut_documents_see_only_their_segment() -> None:
    model = masked(parts={})
    ids = documents(11)
    model.segment_len = 4
    together = model.logits(ids)
    model.segment_len = 0
    alone = [model.logits(piece) for piece in ids.split(4, dim=1)]
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=0, atol=3e-5)
    numbers = torch.arange(11, dtype=torch.int32)[None] // 4
    torch.testing.assert_close(model.hidden(ids, segments_BT=numbers), model.hidden(ids.view(1, -1), None, numbers))


@pytest.mark.parametrize("pieces", [(19,), (7, 1, 1, 10), (1,) * 19])
def test_a_cache_respects_documents(pieces: tuple[int, ...]) -> None:
    model = masked().eval()
    ids = torch.cat([documents(6, 4, 9), documents(12, 7, seed=1)])
    cache = KVCache(19)
    parts = [model.logits(piece, cache) for piece in ids.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model.logits(ids), rtol=0, atol=3e-5)
    cache.reset()
    torch.testing.assert_close(model.logits(ids, cache), model.logits(ids), rtol=0, atol=3e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_computes_the_definition() -> None:
    segments = segment_numbers(torch.cat([documents(6, 4, 9), documents(12, 7, seed=1)]))
    q, k, v = torch.randn(2, 19, 4, 16), torch.randn(2, 19, 2, 16), torch.randn(2, 19, 2, 16)
    flex, plain = FlexAttention(), PlainMath()
    ours = flex(q, k, v, flex.mask(segments, 64, 19))
    torch.testing.assert_close(ours, plain(q, k, v, plain.mask(segments, 64, 19)), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["sdpa", "one by one"])
def test_kernels_agree_on_values_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.cat([documents(6, 4, 9), documents(12, 7, seed=1)])
    y = tokens(2, 19, seed=3)
    found = {}
    for kind in ("math", name):
        if kind == "one by one":
            monkeypatch.setattr("paramgolf.model.backends.DENSE_LENGTH", 8)
        model = masked()
        model.use_attention("sdpa" if kind == "one by one" else kind)
        loss = model(x, y)
        loss.backward()
        found[kind] = [loss.detach(), *(p.grad for p in model.parameters())]
    for ours, expected in zip(found[name], found["math"], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["fa3", "varlen", "flex", "sdpa"])
def test_gpu_kernels_agree(name: str) -> None:
    x = torch.cat([documents(60, 40, 90), documents(120, 70, seed=1)]).cuda()
    y = tokens(2, 190, seed=3).cuda()
    model = small_gpt(**(FULL | {"dim": 64})).cuda()
    model.compute_dtype = torch.bfloat16
    model.use_attention("math")
    expected = model(x, y, "none")
    try:
        model.use_attention(name)
    except GolfError as error:
        pytest.skip(str(error))
    model.expect_documents(x.cpu())
    ours = model(x, y, "none")
    assert (ours - expected).abs().mean() < 0.05
    ours.sum().backward()


def test_auto_prefers_kernels_for_documents_where_there_are_any() -> None:
    choice = choose("auto", torch.device("cpu"), torch.float32, 16, masked=True)
    assert choice.name == "sdpa" and isinstance(choice.attend, ScaledDotProduct)
    with pytest.raises(GolfError, match="varlen needs a CUDA device"):
        choose("varlen", torch.device("cpu"), torch.bfloat16, 64, masked=True)


def test_room_is_announced_for_one_pass() -> None:
    model = masked(parts={})
    choice, rooms = model.use_attention("math"), []

    class Spy:
        def mask(self, segments: Tensor, room: int, longest: int) -> Any:
            rooms.append((room, longest))
            return choice.mask(segments, room, longest)

    model.attention = Spy()  # type: ignore[assignment]
    few, many = documents(3, 4), documents(*[1] * 100)
    model.expect_documents(many)
    model.hidden(many)
    model.expect_documents(few)
    model.hidden(few)
    model.hidden(few)
    model.segment_len = 5
    model.hidden(many)
    assert rooms == [(256, 100), (256, 7), (64, 7), (128, 5)]


def test_rows_too_long_for_a_mask_refuse_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paramgolf.model.backends.DENSE_LENGTH", 8)
    model = masked(parts={})
    x = documents(6, 4, 9)
    expected = model.logits(x)
    model.compile_regions(backend="eager")
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):  # training then goes on uncompiled and says why
        model.logits(x)
    with model.eager():
        assert torch.equal(model.logits(x), expected)
