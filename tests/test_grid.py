"""Integer grids: error bounds, ranges, degenerate rows, straight-through gradients, one arithmetic for all uses."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from paramgolf.errors import GolfError
from paramgolf.quant.grid import SEARCH_FACTORS, Grid, round_to_float16, row_quantile
from paramgolf.recipe.sections import GridSection

CLIPS: list[dict[str, Any]] = [
    {"clip": "rowmax"},
    {"clip": "quantile", "clip_value": 0.99},
    {"clip": "sdclip", "clip_value": 3.0},
    {"clip": "search"},
]
ids_of_clips = [str(c["clip"]) for c in CLIPS]

matrices = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 40)),
    elements=st.floats(-1e4, 1e4, width=32, allow_nan=False),
)
grids = st.builds(
    lambda clip, **rest: Grid(GridSection(**clip, **rest)),
    clip=st.sampled_from(CLIPS),
    bits=st.integers(2, 8),
    floor=st.sampled_from([0.0, 1 / 127]),
    eps=st.sampled_from([0.0, 1e-8]),
    scale_dtype=st.sampled_from(["float16", "float32"]),
    round_scale_first=st.booleans(),
    low_code=st.sampled_from(["symmetric", "full"]),
)


def matrix(*shape: int, seed: int = 0, scale: float = 0.05) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@settings(max_examples=200, deadline=None)
@given(w=matrices, grid=grids)
def test_codes_stay_in_range_and_decode_to_what_training_saw(w: np.ndarray, grid: Grid) -> None:
    weight = torch.from_numpy(w)
    codes, scale = grid.quantize(weight)
    assert codes.dtype == torch.int8 and codes.shape == weight.shape
    assert scale.dtype == grid.scale_dtype and scale.shape == weight.shape[:1]
    assert int(codes.min()) >= grid.qmin and int(codes.max()) <= grid.qmax
    assert torch.isfinite(scale).all() and (scale >= 0).all()
    assert torch.equal(grid.dequantize(codes, scale), grid.fake_quantize(weight))


@settings(max_examples=200, deadline=None)
@given(w=matrices, bits=st.integers(2, 8), low=st.sampled_from(["symmetric", "full"]))
def test_rowmax_error_is_at_most_half_a_step(w: np.ndarray, bits: int, low: str) -> None:
    grid = Grid(GridSection(bits=bits, low_code=low))  # type: ignore[arg-type]
    weight = torch.from_numpy(w)
    codes, scale = grid.quantize(weight)
    error = (grid.dequantize(codes, scale) - weight).abs()
    # The scale was rounded to fp16: the largest value may sit up to qmax * 2^-11 steps outside, plus subnormals.
    bound = scale.float() * (0.5 + grid.qmax * 2.0**-11) + grid.qmax * 2.0**-24
    assert (error <= bound[:, None] * (1 + 1e-6)).all()


@settings(max_examples=50, deadline=None)
@given(w=matrices, grid=grids)
def test_rows_do_not_see_each_other(w: np.ndarray, grid: Grid) -> None:
    weight = torch.from_numpy(w)
    codes, scale = grid.quantize(weight)
    for row in range(weight.shape[0]):
        alone, its_scale = grid.quantize(weight[row : row + 1])
        assert torch.equal(alone[0], codes[row]) and torch.equal(its_scale[0], scale[row])


@pytest.mark.parametrize("clip", CLIPS, ids=ids_of_clips)
def test_zero_rows_constant_rows_and_single_columns(clip: dict[str, Any]) -> None:
    grid = Grid(GridSection(bits=6, **clip))
    w = torch.stack((torch.zeros(33), torch.full((33,), 0.25), torch.full((33,), -1.5), matrix(33)))
    codes, scale = grid.quantize(w)
    decoded = grid.dequantize(codes, scale)
    assert torch.equal(codes[0], torch.zeros(33, dtype=torch.int8)) and scale[0] == 1
    torch.testing.assert_close(decoded[1:3], w[1:3], rtol=2e-3, atol=0)
    column = torch.tensor([[0.3], [0.0], [-2.0]])
    torch.testing.assert_close(grid.dequantize(*grid.quantize(column)), column, rtol=2e-3, atol=0)


@pytest.mark.parametrize("clip", CLIPS, ids=ids_of_clips)
def test_underflowing_and_overflowing_scales_give_finite_weights(clip: dict[str, Any]) -> None:
    grid = Grid(GridSection(bits=6, **clip))
    tiny = matrix(4, 50, scale=1e-9)
    codes, scale = grid.quantize(tiny)
    assert not scale.any() and not codes.any()
    huge = matrix(2, 50, scale=1e8)
    assert torch.isfinite(grid.dequantize(*grid.quantize(huge))).all()
    assert torch.isfinite(grid.fake_quantize(huge)).all() and torch.isfinite(grid.fake_quantize(tiny)).all()


def test_vectors_scalars_and_empty_rows() -> None:
    grid = Grid(GridSection(bits=8))
    vector = matrix(30)
    codes, scale = grid.quantize(vector)
    assert codes.shape == (30,) and scale.shape == ()
    torch.testing.assert_close(grid.dequantize(codes, scale), vector, rtol=0, atol=float(scale) * 0.6)
    codes, scale = grid.quantize(torch.tensor(-0.37))
    assert codes.shape == () and int(codes) == -127
    cube = matrix(3, 4, 10)
    codes, scale = grid.quantize(cube)
    assert scale.shape == (3, 4)
    assert torch.equal(grid.dequantize(codes, scale), grid.fake_quantize(cube))


@pytest.mark.parametrize("clip", CLIPS, ids=ids_of_clips)
def test_gradient_passes_unchanged_also_where_clipped(clip: dict[str, Any]) -> None:
    w = matrix(5, 64).requires_grad_()
    upstream = matrix(5, 64, seed=1)
    (Grid(GridSection(bits=4, **clip)).fake_quantize(w) * upstream).sum().backward()
    assert w.grad is not None and torch.equal(w.grad, upstream)


@settings(max_examples=100, deadline=None)
@given(
    rows=hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 600)), elements=st.floats(0, 10, width=32)),
    q=st.sampled_from([0.0, 0.25, 0.5, 0.9, 0.999, 0.9999984, 1.0]),
)
def test_row_quantile_is_the_interpolated_quantile(rows: np.ndarray, q: float) -> None:
    ours = row_quantile(torch.from_numpy(rows), q).squeeze(-1)
    expected = torch.quantile(torch.from_numpy(rows), q, dim=-1)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_search_takes_the_best_factor_of_each_row() -> None:
    w = torch.distributions.StudentT(2.0).sample((40, 64)) * 0.1
    grid = Grid(GridSection(bits=5, clip="search"))
    ours = (grid.dequantize(*grid.quantize(w)) - w).square().mean(1)
    peak = w.abs().amax(1)
    for factor in SEARCH_FACTORS:
        scale = (peak * factor / grid.qmax).half().float()[:, None]
        cut = w.clamp(-(peak * factor)[:, None], (peak * factor)[:, None])
        error = ((cut / scale).round().clamp(-grid.qmax, grid.qmax) * scale - w).square().mean(1)
        assert (ours <= error * (1 + 1e-6)).all()
    rowmax = Grid(GridSection(bits=5))
    assert ours.mean() < (rowmax.dequantize(*rowmax.quantize(w)) - w).square().mean()


def test_sdclip_scale_is_k_standard_deviations() -> None:
    w = matrix(7, 200)
    codes, scale = Grid(GridSection(bits=6, clip="sdclip", clip_value=12.85)).quantize(w)
    assert torch.equal(scale, (12.85 * w.std(1) / 31).half())
    assert int(codes.abs().max()) < 31  # the clip lies beyond every weight: that is the size lever


def test_floor_and_eps_bound_the_scale() -> None:
    w = matrix(3, 64, scale=1e-4)
    assert torch.equal(Grid(GridSection(bits=6, floor=1 / 31)).quantize(w)[1], torch.full((3,), 1 / 31).half())
    section = GridSection(bits=6, eps=0.031, scale_dtype="float32")
    torch.testing.assert_close(Grid(section).quantize(w)[1], torch.full((3,), 0.001))


def test_full_range_has_one_more_code() -> None:
    full, symmetric = Grid(GridSection(bits=6, low_code="full")), Grid(GridSection(bits=6))
    assert (full.qmin, full.qmax, symmetric.qmin) == (-32, 31, -31)


def test_rounding_to_float16_is_the_cast() -> None:
    every = torch.arange(0x7BFF, dtype=torch.int16).view(torch.float16).float()
    between = (every[1:] + every[:-1]) / 2
    random = torch.rand(20_000) * 10.0 ** torch.randint(-9, 4, (20_000,))
    x = torch.cat((every, between, between.nextafter(every[1:]), between.nextafter(every[:-1]), random))
    assert torch.equal(round_to_float16(x), x.half().float())


@pytest.mark.full  # generates code
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
@pytest.mark.parametrize("clip", CLIPS, ids=ids_of_clips)
def test_compiled_training_sees_the_exported_weights(clip: dict[str, Any]) -> None:
    """A compiler that dropped the rounding of the scale would train on another grid than the file's."""
    grid = Grid(GridSection(bits=6, **clip))
    w = matrix(24, 48)
    compiled = torch.compile(grid.fake_quantize, fullgraph=True)
    torch.testing.assert_close(compiled(w), grid.dequantize(*grid.quantize(w)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_are_refused(bad: float) -> None:
    w = matrix(3, 5)
    w[1, 2] = bad
    with pytest.raises(GolfError, match="NaN or infinity"):
        Grid(GridSection()).quantize(w)
    with pytest.raises(GolfError, match="float"):
        Grid(GridSection()).quantize(torch.arange(5))


@pytest.mark.parametrize("section", [{"clip": "quantile"}, {"clip": "sdclip"}, {"clip": "quantile", "clip_value": 1.5}])
def test_a_clip_without_its_value_is_refused(section: dict[str, Any]) -> None:
    with pytest.raises(GolfError, match="clip_value"):
        Grid(GridSection(**section))
