"""Optional parts, and what a new one needs: a file, a registry line, nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paramgolf.model.cache import KVCache
from paramgolf.model.gpt import GPT
from paramgolf.model.parts.base import Flow, LayerPart, Part
from paramgolf.model.parts.bigram_hash import BigramHash, BigramHashConfig
from paramgolf.model.registry import PARTS
from paramgolf.recipe.sections import STRICT, ModelSection
from tests.model_common import VOCAB, section, small_gpt, tokens


def test_bigram_buckets_follow_the_formula() -> None:
    part = BigramHash(BigramHashConfig(buckets=50, dim=4), section(), VOCAB)
    ids = tokens(2, 30, vocab=60_000)
    rows = part.bucket(ids, Flow(ids).previous("bigram", ids, -1))
    for b in range(2):
        assert rows[b, 0] == 49
        for t in range(1, 30):
            assert int(rows[b, t]) == ((36313 * int(ids[b, t])) ^ (27191 * int(ids[b, t - 1]))) % 49


def test_smear_gate_mixes_in_the_previous_position() -> None:
    model = GPT(section(parts={"smear_gate": {"init": 0.0}}), VOCAB)
    model.init_weights(0)
    x = tokens(1, 6)
    plain = F.rms_norm(model.tok_emb.weight[x], (24,), eps=model.section.norm_eps)
    expected = 0.5 * plain + 0.5 * F.pad(plain, (0, 0, 1, 0))[:, :-1]
    torch.testing.assert_close(model.embed(Flow(x)), expected)


@dataclass(frozen=True, kw_only=True)
class EchoConfig:
    __pydantic_config__ = STRICT
    first_layer: int = 1


class EchoLayer(LayerPart):
    """Adds an embedding of the ids to the values and takes each head's output along its value away."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.full((dim,), 0.7))

    def value(self, v_BTGK: Tensor, n_BTD: Tensor, extras: dict[str, Tensor]) -> Tensor:
        return v_BTGK + (extras["echo"] * self.mix).view(v_BTGK.shape)

    def output(
        self, y_BTHK: Tensor, v_BTGK: Tensor, q_BTHK: Tensor, n_BTD: Tensor, extras: dict[str, Tensor]
    ) -> Tensor:
        unit = F.normalize(v_BTGK, dim=-1).repeat_interleave(y_BTHK.shape[2] // v_BTGK.shape[2], dim=2)
        return y_BTHK - (y_BTHK * unit).sum(-1, keepdim=True) * unit


class Echo(Part):
    attribute = "echo"
    Config = EchoConfig

    def __init__(self, config: EchoConfig, section: ModelSection, vocab_size: int) -> None:
        super().__init__(config, section, vocab_size)
        self.width = section.dim // section.num_heads * section.num_kv_heads
        self.first_layer = config.first_layer
        self.table = nn.Embedding(vocab_size, self.width, _weight=torch.zeros(vocab_size, self.width))

    def on_embedding(self, x_BTD: Tensor, flow: Flow) -> Tensor:
        flow.extras["echo"] = F.embedding(flow.ids_BT, self.table.weight).to(x_BTD.dtype)
        return x_BTD

    def for_layer(self, index: int) -> LayerPart | None:
        return EchoLayer(self.width) if index >= self.first_layer else None


@pytest.fixture
def with_echo(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, int]]:
    monkeypatch.setitem(PARTS._entries, "echo", "tests.test_model_parts:Echo")
    return {"echo": {"first_layer": 2}}


def test_a_new_part_reaches_the_layers(with_echo: dict[str, dict[str, int]]) -> None:
    model = small_gpt(parts=with_echo).eval()
    names = set(model.state_dict())
    assert "echo.table.weight" in names and "blocks.2.attn.echo.mix" in names
    assert "blocks.1.attn.echo.mix" not in names
    x, y = tokens(2, 12), tokens(2, 12, seed=1)
    full = model.logits(x)
    cache = KVCache(12)
    pieces = [model.logits(piece, cache) for piece in x.split((4, 1, 7), dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=0, atol=2e-5)
    changed = x.clone()
    changed[:, 5] = (changed[:, 5] + 1) % VOCAB
    assert torch.equal(model.logits(changed)[:, :5], full[:, :5])
    model(x, y).backward()
    mix = model.get_parameter("blocks.2.attn.echo.mix")
    assert mix.grad is not None and mix.grad.abs().min() > 0
