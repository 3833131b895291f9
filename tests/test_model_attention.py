"""Attention kernels against the definition, and how one is chosen; rotary tables."""

from __future__ import annotations

import math

import pytest
import torch

from paramgolf.errors import GolfError
from paramgolf.model.attention import choose
from paramgolf.model.registry import ATTENTION_BACKENDS
from paramgolf.model.rope import apply_rope, rope_tables, stretched_base
from tests.model_common import small_gpt, tokens

CPU = torch.device("cpu")


def runnable(name: str, device: torch.device, dtype: torch.dtype) -> None:
    reason = ATTENTION_BACKENDS[name].why_not(device, dtype, 16)
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("name", list(ATTENTION_BACKENDS))
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("length", "span"), [(1, 1), (17, 17), (1, 9), (5, 12)])
def test_every_backend_equals_the_definition(name: str, heads: int, kv_heads: int, length: int, span: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    runnable(name, device, dtype)
    draw = torch.Generator().manual_seed(1)
    q = torch.randn(2, length, heads, 16, generator=draw).to(device, dtype)
    k, v = (torch.randn(2, span, kv_heads, 16, generator=draw).to(device, dtype) for _ in range(2))
    ours = ATTENTION_BACKENDS[name]()(q, k, v).double().cpu()
    q, k, v = (t.double().cpu() for t in (q, k, v))
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for head in range(heads):
        source = head // (heads // kv_heads)
        for t in range(length):
            seen = span - length + t + 1
            score = (k[:, :seen, source] @ q[:, t, head, :, None]).squeeze(-1) / math.sqrt(16)
            expected = (score.softmax(-1)[:, None] @ v[:, :seen, source]).squeeze(1)
            torch.testing.assert_close(ours[:, t, head], expected, rtol=0, atol=tolerance)


def test_backends_agree_on_gradients_of_a_whole_model() -> None:
    x, y = tokens(2, 19), tokens(2, 19, seed=1)
    grads = {}
    for name in ("math", "sdpa"):
        model = small_gpt()
        assert model.use_attention(name).name == name
        model(x, y).backward()
        grads[name] = [p.grad for p in model.parameters()]
    for a, b in zip(grads["math"], grads["sdpa"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_auto_takes_the_first_that_runs_and_says_why() -> None:
    choice = choose("auto", CPU, torch.float32, 16)
    assert choice.name == "sdpa" and "fa3 needs a CUDA device" in choice.reason
    assert choose("math", CPU, torch.float32, 16).reason == ""


def test_a_forced_backend_that_cannot_run_is_refused() -> None:
    with pytest.raises(GolfError, match=r"fa3.*CUDA"):
        choose("fa3", CPU, torch.bfloat16, 64)
    with pytest.raises(GolfError, match="did you mean 'sdpa'"):
        choose("spda", CPU, torch.float32, 64)


def test_the_choice_is_made_at_first_use_and_again_for_another_type() -> None:
    model = small_gpt()
    model(tokens(1, 4))
    first = model.attention
    assert first is not None and first.name == "sdpa"
    model(tokens(1, 5))
    assert model.attention is first
    model.use_attention("math")
    model.compute_dtype = torch.bfloat16
    model(tokens(1, 5))
    assert model.attention is not None and model.attention.name == "math"


def test_rotation_depends_on_the_distance_only() -> None:
    cos, sin = rope_tables(40, 16, 10_000.0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def score(i: int, j: int) -> float:
        a = apply_rope(q, cos[i : i + 1], sin[i : i + 1])
        b = apply_rope(k, cos[j : j + 1], sin[j : j + 1])
        return float((a * b).sum())

    assert score(12, 5) == pytest.approx(score(39, 32), abs=1e-4)
    assert abs(score(12, 5) - score(12, 6)) > 1e-3
    rotated = apply_rope(q, cos[7:8], sin[7:8])
    torch.testing.assert_close(rotated.norm(), q.norm())
    angle = torch.tensor(7 * 10_000 ** (-2 / 16))
    torch.testing.assert_close(rotated[..., 1], q[..., 1] * angle.cos() + q[..., 9] * angle.sin())


def test_the_base_is_stretched_beyond_the_reference_length() -> None:
    assert stretched_base(10_000.0, 1024, 1024, 64) == 10_000.0
    assert stretched_base(10_000.0, 4096, 0, 64) == 10_000.0
    assert stretched_base(10_000.0, 2048, 1024, 64) == pytest.approx(20_452.2, abs=0.1)
