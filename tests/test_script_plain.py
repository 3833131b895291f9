"""The plain forms that scripts take of the package's pieces: the same numbers and the same bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from paramgolf.data.loader import Loader
from paramgolf.data.token_bytes import TokenBytes
from paramgolf.dist import Dist
from paramgolf.model import attention
from paramgolf.model.gpt import GPT
from paramgolf.model.rope import rope_tables
from paramgolf.pack.container import Artifact, encode_artifact
from paramgolf.pack.packer import load_artifact, manifest_of
from paramgolf.quant.export import export
from paramgolf.quant.plan import plan
from paramgolf.recipe.load import load_recipe
from paramgolf.recipe.sections import Recipe
from paramgolf.score.scorer import score
from paramgolf.script.layout import STYLES, layout
from paramgolf.script.plain import model as plain_model
from paramgolf.script.plain import pack
from paramgolf.script.plain.data import SequentialRows
from paramgolf.script.plain.score import measure
from paramgolf.script.rules import IMPORTS, store_function

REFERENCES = ["baseline", "pr107", "pr114", "pr128", "pr137", "pr137-script"]
SMALL = ["model.dim=64", "model.num_layers=3", "model.num_heads=4", "model.num_kv_heads=2", "model.mlp_hidden=96"]
VOCAB = 300


def small(name: str, *overrides: str) -> Recipe:
    return load_recipe(name, [*SMALL, "train.seq_len=32", *overrides])


def quantising(recipe: Recipe) -> Recipe:
    """Small matrices on the grids, too."""
    rules = tuple(replace(rule, max_size=min(rule.max_size, 512)) for rule in recipe.quant.rules)
    return replace(recipe, quant=replace(recipe.quant, rules=rules))


def random_model(recipe: Recipe) -> GPT:
    torch.manual_seed(1)
    model = GPT(recipe.model, VOCAB)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model.eval()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_rows_are_those_of_the_loader(world: int) -> None:
    shards = [np.arange(n, dtype=np.uint16) for n in (700, 41, 333)]
    for rank in range(world):
        loader = Loader(shards, seq_len=16, batch_tokens=12 * 16, rank=rank, world=world, order="sequential")
        rows = SequentialRows(shards, 16, 12 * 16, rank, world)
        for _ in range(9):
            for got, expected in zip(rows.next_batch(), loader.next_batch(), strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("count", [20, 33, 500])
@pytest.mark.parametrize("stride", [0, 8])
def test_score_is_that_of_the_scorer(count: int, stride: int) -> None:
    recipe = small("pr114")  # its rotary base depends on the length that a window would have
    model, tokens = random_model(recipe), np.random.default_rng(0).integers(0, VOCAB, count).astype(np.uint16)
    table = TokenBytes(np.arange(1, VOCAB + 1, dtype=np.int16), np.arange(VOCAB) % 3 == 0, np.arange(VOCAB) < 5)

    class Tokenizer:
        token_bytes = table

    batch = recipe.score.batch_tokens
    expected = score(model, tokens, token_bytes=table, seq_len=32, stride=stride, batch_tokens=batch)
    got = measure(model, tokens, Tokenizer(), recipe, Dist(), stride)  # type: ignore[arg-type]
    assert (got.val_loss, got.val_bpb, got.sliding) == (expected.val_loss, expected.val_bpb, expected.sliding)
    assert (got.scored_tokens, got.scored_bytes) == (expected.scored_tokens, expected.scored_bytes)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("codec", ["raw", "zlib", "zstd", "lzma"])
def test_artifact_is_that_of_the_container(name: str, codec: str, tmp_path: Path) -> None:
    recipe = small(name, f"pack.codec={codec}")
    if codec != "raw":  # with raw also a file that quantises nothing, as these matrices are small
        recipe = quantising(recipe)
    model = random_model(recipe)
    tensors = export(model.state_dict(), recipe.quant, recipe.model.num_layers)
    manifest = manifest_of(recipe, VOCAB, "float32")
    assert pack.manifest_of(recipe, VOCAB, "float32") == manifest
    expected = encode_artifact(Artifact(manifest, tensors, b"words"), codec, -1).data
    path = tmp_path / "model.golf"
    path.write_bytes(pack.encode(model.state_dict(), recipe, manifest, b"words"))
    assert path.read_bytes() == expected
    decoded = pack.unpack(path, recipe, VOCAB).state_dict()
    for key, tensor in load_artifact(path).state.items():
        assert torch.equal(decoded[key], tensor), key


@pytest.mark.parametrize("name", [*REFERENCES, "pocket", "frontier"])
def test_rules_written_out_decide_as_the_rules(name: str) -> None:
    recipe = load_recipe(name)
    scope: dict[str, object] = {}
    for found in IMPORTS:
        exec(f"from {found.module} import {found.name}" if found.name else f"import {found.module}", scope)
    scope["layer_of"] = pack.layer_of
    exec(f"from __future__ import annotations\n{store_function(recipe)}", scope)
    with torch.device("meta"):
        shapes = {key: tuple(t.shape) for key, t in GPT(recipe.model, 1024).state_dict().items()}
    chosen = {key: scope["store_of"](key, shape, recipe) for key, shape in shapes.items()}  # type: ignore[operator]
    assert chosen == {key: s.name for key, s in plan(shapes, recipe.quant, recipe.model.num_layers).items()}


def test_attention_is_that_of_the_model() -> None:
    section = small("pr137").model
    one = attention.Attention(section.dim, section.num_heads, section.num_kv_heads, section.qk_gain, section.norm_eps)
    two = plain_model.Attention(section.dim, section.num_heads, section.num_kv_heads, section.qk_gain, section.norm_eps)
    for parameter in one.parameters():
        torch.nn.init.normal_(parameter)
    two.load_state_dict(one.state_dict())
    assert list(one.state_dict()) == list(two.state_dict())
    x, rope = torch.randn(2, 32, section.dim), rope_tables(32, section.dim // section.num_heads, 1e4)
    one.attend = attention.choose("sdpa", torch.device("cpu"), torch.float32, 16).attend
    assert torch.equal(one(x, rope, {}), two(x, rope, {}))


def test_layout_keeps_what_brackets_mean() -> None:
    text = 'def f(a, b):\n    x = (a) if (b.c) else g(a)\n    return (x), h((a), "(b)"), -(b.c).d\n'
    expected = 'def f(a, b):\n    x = a if b.c else g(a)\n    return x, h(a, "(b)"), -b.c.d'
    assert layout(text, replace(STYLES[-1], short=False, merged=False)) == expected
