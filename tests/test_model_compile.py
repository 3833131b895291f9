"""Compiled regions compute what eager mode computes, share one graph over the layers, and do not recompile."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from paramgolf.model.gpt import GPT
from paramgolf.quant.grid import Grid
from paramgolf.recipe.sections import GridSection
from tests.model_common import PARTS, small_gpt, tokens

GRID = Grid(GridSection(bits=6))


def run(model: GPT, grid: Grid | None) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients with QAT on or off."""
    model.set_qat(grid)
    model.zero_grad()
    loss = model(tokens(2, 16), tokens(2, 16, seed=1))
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def graphs_built() -> int:
    return int(counters["stats"]["unique_graphs"])


def test_one_graph_serves_all_layers_and_both_sides_of_the_qat_switch() -> None:
    torch.compiler.reset()
    counters.clear()
    model = small_gpt(parts=PARTS, num_layers=5)
    eager = {grid: run(model, grid)[0] for grid in (None, GRID)}
    model.compile_regions(backend="aot_eager")  # graphs and guards as always, no code generation
    for grid in (None, GRID):
        assert run(model, grid)[0] == pytest.approx(eager[grid], abs=1e-5)
    assert graphs_built() == 3, "one block graph with QAT, one without, one for the loss"
    for grid in (None, GRID, None, GRID):
        run(model, grid)
    assert graphs_built() == 3
    with model.eager():
        model(tokens(1, 7), tokens(1, 7))
    with torch.no_grad():
        model.eval()
        for _ in range(2):
            model(tokens(2, 16), tokens(2, 16, seed=1))
    assert graphs_built() == 4, "and one without gradients"


@pytest.mark.full
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generated_code_computes_what_eager_mode_computes(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    model = small_gpt(parts=PARTS)
    model.compute_dtype = dtype
    eager = {grid: run(model, grid) for grid in (None, GRID)}
    model.compile_regions()
    loss_error, share = (1e-5, 1e-4) if dtype == torch.float32 else (0.03, 0.2)
    for grid in (None, GRID):
        loss, grads = run(model, grid)
        assert loss == pytest.approx(eager[grid][0], abs=loss_error)
        for ours, expected in zip(grads, eager[grid][1], strict=True):
            assert (ours - expected).norm() <= share * expected.norm() + 1e-6
