"""Export and restore: what is stored is what the grid says, and nothing odd slips through."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paramgolf.errors import GolfError
from paramgolf.pack.packing import pack6, unpack6
from paramgolf.pack.stored import StoredTensor, TensorSpec
from paramgolf.quant.export import export, payload_bytes, restore
from paramgolf.quant.grid import Grid
from paramgolf.recipe.sections import GridSection, QuantSection, RuleSection

INT6 = GridSection(bits=6)
QUANT = QuantSection(
    grids={"int6": INT6},
    rules=(
        RuleSection(match="@control", store="float32"),
        RuleSection(max_size=64, store="float16"),
        RuleSection(store="int6"),
    ),
)


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "blocks.0.attn.c_q.weight": torch.randn(24, 20, generator=draw),
        "blocks.0.attn_scale": torch.randn(100, generator=draw),
        "bias": torch.randn(30, generator=draw),
        "bank": torch.randn(3, 8, 5, generator=draw),
        "steps": torch.tensor([3, 2**40]),
    }


def test_round_trip_equals_the_grid_and_keeps_control_tensors_bit_exact() -> None:
    weights = state()
    stored = export(weights, QUANT, 1)
    back = restore(stored)
    assert list(back) == list(weights)
    grid = Grid(INT6)
    for name in ("blocks.0.attn.c_q.weight", "bank"):
        assert torch.equal(back[name], grid.dequantize(*grid.quantize(weights[name])))
    assert torch.equal(back["blocks.0.attn_scale"], weights["blocks.0.attn_scale"])
    assert torch.equal(back["bias"], weights["bias"].half().float())
    assert torch.equal(back["steps"], weights["steps"])
    assert payload_bytes(stored) == 24 * 20 + 24 * 2 + 100 * 4 + 30 * 2 + 120 + 24 * 2 + 16


def test_export_of_exported_weights_changes_nothing() -> None:
    once = restore(export(state(), QUANT, 1))
    again = restore(export(once, QUANT, 1))
    assert all(torch.equal(once[name], tensor) for name, tensor in again.items())


def test_half_precision_weights_are_taken_as_float32() -> None:
    weights = {"w": torch.randn(16, 8).bfloat16()}
    assert restore(export(weights, QUANT, 1))["w"].dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "value"),
    [("bias", float("nan")), ("blocks.0.attn_scale", float("inf")), ("blocks.0.attn.c_q.weight", float("nan"))],
)
def test_non_finite_weights_are_refused(name: str, value: float) -> None:
    weights = state()
    weights[name].view(-1)[3] = value
    with pytest.raises(GolfError):
        export(weights, QUANT, 1)


def test_values_beyond_float16_are_refused_by_name() -> None:
    weights = state()
    weights["bias"][0] = 1e6
    with pytest.raises(GolfError, match=r"bias: values up to 1e\+06 do not fit float16"):
        export(weights, QUANT, 1)


def test_unknown_quantiser_is_named() -> None:
    with pytest.raises(GolfError, match="unknown quantizer 'gtpq'"):
        export(state(), QuantSection(method="gtpq"), 1)


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 7, 8])
def test_pack6_layout_and_round_trip(columns: int) -> None:
    codes = np.random.default_rng(columns).integers(-31, 32, (5, columns)).astype(np.int8)
    packed = pack6(codes)
    assert packed.size == 5 * -(-columns // 4) * 3
    assert np.array_equal(unpack6(packed, 5, columns), codes)


def test_pack6_bit_order() -> None:
    # value 0 in bits 0-5 of byte 0, value 1 in bits 6-7 of byte 0 and 0-3 of byte 1, and so on
    assert pack6(np.array([[-30, -29, -28, -27]], np.int8)).tolist() == [
        1 | 2 << 6,
        2 >> 2 | (3 << 4 & 0xFF),
        3 >> 4 | 4 << 2,
    ]


def test_a_stored_tensor_that_contradicts_its_spec_is_refused() -> None:
    with pytest.raises(ValueError, match="is not"):
        StoredTensor(TensorSpec("w", (2, 3), "float16"), np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="scale must have shape"):
        StoredTensor(TensorSpec("w", (2, 3), "int6", 6), np.zeros((2, 3), np.int8), np.ones(3, np.float16))
