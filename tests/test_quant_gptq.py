"""GPTQ: codes of the grid, a smaller output error than rounding, and Hessians of every kind."""

from __future__ import annotations

import pytest
import torch

from paramgolf.errors import GolfError
from paramgolf.quant import gptq, percentile
from paramgolf.quant.export import export, restore
from paramgolf.quant.gptq import weighted_error
from paramgolf.quant.grid import Grid
from paramgolf.recipe.sections import GridSection, QuantSection, RuleSection

GRID = Grid(GridSection(bits=4, clip="sdclip", clip_value=3.0))


def layer(rows: int = 48, columns: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and the second moments of correlated inputs."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draw) / columns**0.5 + torch.eye(columns)
    x = torch.randn(2000, columns, generator=draw) @ mix * torch.rand(columns, generator=draw)
    return torch.randn(rows, columns, generator=draw) * 0.1, x.t() @ x / len(x)


@pytest.mark.parametrize("columns", [1, 7, 127, 128, 129, 300])
def test_output_error_is_well_below_that_of_rounding(columns: int) -> None:
    weight, hessian = layer(columns=columns)
    before = weight.clone(), hessian.clone()
    codes, scale = gptq.quantize(weight, GRID, hessian)
    plain_codes, plain_scale = GRID.quantize(weight)
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])
    assert codes.dtype == torch.int8 and codes.shape == weight.shape and torch.equal(scale, plain_scale)
    assert int(codes.max()) <= GRID.qmax and int(codes.min()) >= GRID.qmin
    left = weighted_error(weight, GRID.dequantize(codes, scale), hessian)
    plain = weighted_error(weight, GRID.dequantize(plain_codes, plain_scale), hessian)
    assert left <= plain * (0.8 if columns >= 127 else 1.001)


def test_independent_inputs_of_equal_size_leave_plain_rounding() -> None:
    weight, _ = layer()
    codes, _ = gptq.quantize(weight, GRID, 7.0 * torch.eye(200))
    assert torch.equal(codes, GRID.quantize(weight)[0])


def test_the_size_of_the_hessian_does_not_matter() -> None:
    weight, hessian = layer()
    assert torch.equal(gptq.quantize(weight, GRID, hessian)[0], gptq.quantize(weight, GRID, 1024 * hessian)[0])


def test_inputs_that_were_always_zero_get_zero_weights() -> None:
    weight, hessian = layer()
    dead = torch.arange(200) % 9 == 0
    hessian[dead] = 0
    hessian[:, dead] = 0
    codes, _ = gptq.quantize(weight, GRID, hessian)
    assert not codes[:, dead].any() and codes[:, ~dead].any()


@pytest.mark.parametrize("hessian", [torch.ones(200, 200), torch.zeros(200, 200), -torch.eye(200)])
def test_singular_hessians_are_handled(hessian: torch.Tensor) -> None:
    weight, _ = layer()
    codes, scale = gptq.quantize(weight, GRID, hessian)
    assert torch.isfinite(GRID.dequantize(codes, scale)).all()


def test_indefinite_and_non_finite_hessians_are_refused_with_the_name_of_the_tensor() -> None:
    weight, hessian = layer()
    broken = hessian.clone()
    broken[3, 4] = float("nan")
    far = torch.eye(200)
    far[0, 1] = far[1, 0] = 1e9
    section = QuantSection(method="gptq", grids={"g": GRID.section}, rules=(RuleSection(store="g"),))
    for bad, words in ((broken, "NaN"), (far, "semi-definite"), (torch.eye(3), "shape")):
        with pytest.raises(GolfError, match=f"fc.weight.*{words}"):
            export({"fc.weight": weight}, section, 1, {"fc.weight": bad})


def test_rows_of_zeros_and_vectors_and_missing_hessians() -> None:
    weight, hessian = layer()
    weight[5] = 0
    codes, scale = gptq.quantize(weight, GRID, hessian)
    assert not GRID.dequantize(codes, scale)[5].any()
    assert torch.equal(gptq.quantize(weight[0], GRID, hessian)[0], GRID.quantize(weight[0])[0])
    assert torch.equal(gptq.quantize(weight, GRID)[0], GRID.quantize(weight)[0])


def test_export_uses_each_tensors_own_hessian() -> None:
    weight, hessian = layer()
    section = QuantSection(method="gptq", grids={"g": GRID.section}, rules=(RuleSection(store="g"),))
    stored = export({"a": weight, "b": weight}, section, 1, {"a": hessian})
    assert torch.equal(torch.from_numpy(stored[0].values), gptq.quantize(weight, GRID, hessian)[0])
    assert torch.equal(torch.from_numpy(stored[1].values), GRID.quantize(weight)[0])
    assert set(restore(stored)) == {"a", "b"}


def test_percentile_search_is_never_worse_than_the_row_maximum() -> None:
    weight, _ = layer()
    weight[:, 0] *= 20
    grid = Grid(GridSection(bits=6))
    errors = [
        float((grid.dequantize(*pair) - weight).square().mean())
        for pair in (percentile.quantize(weight, grid), grid.quantize(weight))
    ]
    assert errors[0] <= errors[1]


def test_a_floored_scale_leaves_what_lies_above_the_percentile_as_it_is() -> None:
    """#374: the percentile chooses the scale and cuts nothing else."""
    weight = 0.3 * torch.randn(16, 200, generator=torch.Generator().manual_seed(0))
    codes, scale = percentile.quantize(weight, Grid(GridSection(bits=6, floor=1 / 31)))
    assert torch.equal(codes, (weight / scale.float()[:, None]).round().clamp(-31, 31).to(torch.int8))
    assert int(scale.eq(scale.min()).sum()) > 8, "most rows lie below the floor"
