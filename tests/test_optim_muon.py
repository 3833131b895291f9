"""Orthogonalisation and the matrix optimizers against plain mathematics, one matrix at a time, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from paramgolf.dist import Dist
from paramgolf.errors import GolfError
from paramgolf.optim import newton_schulz as ns
from paramgolf.optim.muon import Muon, assign_owners, orthogonalize_cost
from paramgolf.optim.registry import MATRIX_OPTIMIZERS
from paramgolf.recipe.sections import OptimSection

SHAPES = [(16, 16), (24, 16), (48, 16), (16, 24), (16, 80), (1, 40), (40, 1), (1, 1), (128, 260), (300, 130)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def naive_orthogonalize(matrix: Tensor, table: list[ns.Coefficients], safety: float = 1.0) -> Tensor:
    x = matrix.double()
    x = x / (x.norm() * safety + 1e-7)
    if x.size(0) > x.size(1):
        return naive_iterate(x.T, table).T
    return naive_iterate(x, table)


def naive_iterate(x: Tensor, table: list[ns.Coefficients]) -> Tensor:
    for a, b, c in table:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coefficients", [ns.QUINTIC, ns.POLAR_EXPRESS], ids=["quintic", "polar"])
def test_orthogonalize_equals_the_plain_iteration(shape: tuple[int, int], coefficients: ns.Coefficients) -> None:
    stack = random(3, *shape)
    ours = ns.orthogonalize(stack, 5, coefficients, safety=1.02)
    for matrix, result in zip(stack, ours, strict=True):
        expected = naive_orthogonalize(matrix, ns.schedule_of(coefficients, 5), 1.02)
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_end_near_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = random(1, *shape, seed=1)
    # A spread of 30 between the singular values is what random gradients have and the iteration resolves.
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    matrix = u @ torch.diag_embed(s.clamp_min(s.max() / 30)) @ v
    values = torch.linalg.svdvals(ns.orthogonalize(matrix, dtype=dtype).float())
    assert values.min() > 0.6 and values.max() < 1.3, values
    tight = torch.linalg.svdvals(ns.orthogonalize(matrix, 6, ns.POLAR_EXPRESS, torch.float32, 1.02))
    assert tight.min() > 0.85 and tight.max() < 1.15, tight


def test_singular_vectors_stay() -> None:
    matrix = random(20, 50)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    core = u.T @ ns.orthogonalize(matrix[None])[0] @ v.T
    assert (core - torch.diag(core.diagonal())).abs().max() < 1e-4
    assert core.diagonal().min() > 0.6


@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (64, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_and_rank_deficient_input(shape: tuple[int, int], dtype: torch.dtype) -> None:
    zero = ns.orthogonalize(torch.zeros(2, *shape), dtype=dtype)
    assert zero.dtype == dtype and torch.equal(zero, torch.zeros_like(zero))
    low = random(1, shape[0], 2) @ random(1, 2, shape[1], seed=1)
    result = ns.orthogonalize(low, dtype=dtype).float()
    assert torch.isfinite(result).all()
    values = torch.linalg.svdvals(result)[0]
    assert values[1] > 0.6 and values[0] < 1.3
    if dtype == torch.float32:
        assert values[2] < 0.1  # rounding noise is amplified at most a few hundred times
    mixed = torch.cat([torch.zeros(1, *shape), random(1, *shape)])
    torch.testing.assert_close(
        ns.orthogonalize(mixed, dtype=dtype)[1], ns.orthogonalize(mixed[1:], dtype=dtype)[0], rtol=0, atol=1e-2
    )


def test_scale_of_the_gradient_does_not_matter() -> None:
    matrix = random(1, 12, 30)
    torch.testing.assert_close(ns.orthogonalize(matrix * 1e3), ns.orthogonalize(matrix), rtol=0, atol=1e-4)
    tiny = ns.orthogonalize(matrix * 1e-12)
    assert torch.isfinite(tiny).all() and tiny.abs().max() < 1e-1  # the norm's floor keeps noise from being blown up


class Naive:
    """One matrix in float64, straight from the definitions."""

    def __init__(self, kind: str, param: Tensor, section: OptimSection) -> None:
        self.kind, self.param, self.section = kind, param.double(), section
        self.buffer = torch.zeros_like(self.param)
        self.second = torch.zeros(param.size(0), 1, dtype=torch.float64)

    def step(self, grad: Tensor, lr: float, mu: float) -> None:
        grad = grad.double()
        published = self.kind == "normuon"
        self.buffer = mu * self.buffer + (1 - mu if published else 1) * grad
        update = (1 - mu if published else 1) * grad + mu * self.buffer
        if not self.section.nesterov:
            update = self.buffer
        polar = self.kind in ("muoneq_r", "muoneq_r_pr1855")
        if self.kind.startswith("muoneq_r"):
            update = update / update.norm(dim=1, keepdim=True).clamp_min(1e-7)
        table = ns.schedule_of(ns.POLAR_EXPRESS if polar else ns.QUINTIC, self.section.ns_steps)
        update = self.normalise(naive_orthogonalize(update, table, 1.02 if self.kind == "muoneq_r" else 1.0), mu)
        rows, cols = update.shape
        self.param = self.param * (1 - lr * self.section.weight_decay)
        self.param = self.param - lr * math.sqrt(max(1.0, rows / cols)) * update

    def normalise(self, update: Tensor, mu: float) -> Tensor:
        mean = (update**2).mean(dim=1, keepdim=True)
        if self.kind == "normuon":
            decay = self.section.matrix_beta2
            self.second = decay * self.second + (1 - decay) * mean
            scaled = update / (self.second.sqrt() + 1e-10)
            return scaled * update.norm() / (scaled.norm() + 1e-10)
        if self.kind == "normuon_pr137":
            self.second = mu * self.second + (1 - mu) * mean
            return update / (self.second + 1e-8).sqrt()
        return update


@pytest.mark.parametrize("kind", sorted(MATRIX_OPTIMIZERS))
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_equal_the_definition(kind: str, nesterov: bool) -> None:
    section = OptimSection(matrix=kind, weight_decay=0.3, nesterov=nesterov)
    shapes = [(12, 12), (30, 12), (12, 30), (12, 12), (12, 30)]
    params = {f"m{i}": Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes)}
    naive = {name: Naive(kind, param.detach(), section) for name, param in params.items()}
    optimizer = MATRIX_OPTIMIZERS[kind](params.items(), section, Dist())
    for step in range(4):
        lr, mu = 0.05 / (step + 1), 0.9 + 0.02 * step
        for i, (name, param) in enumerate(params.items()):
            param.grad = random(*param.shape, seed=100 * step + i)
            naive[name].step(param.grad, lr, mu)
        optimizer.step(lr, mu)
    for name, param in params.items():
        torch.testing.assert_close(param.detach().double(), naive[name].param, rtol=0, atol=2e-4)


def one(kind: str, make: Callable[[int], Tensor], steps: int = 1, **settings: float) -> Tensor:
    """The sum of updates of one matrix that starts at zero, learning rate 1."""
    first = make(0)
    param = Parameter(torch.zeros_like(first))
    optimizer = MATRIX_OPTIMIZERS[kind]([("m", param)], OptimSection(**settings), Dist())  # type: ignore[arg-type]
    for step in range(steps):
        param.grad = make(step)
        optimizer.step(1.0, 0.95)
    return param.detach()


def test_normuon_levels_rows_and_keeps_the_norm() -> None:
    gradient = random(24, 60) * torch.logspace(-2, 0, 24).unsqueeze(1)
    plain, normed = one("muon", lambda _: gradient.clone()), one("normuon", lambda _: gradient.clone())
    rms = normed.square().mean(dim=1).sqrt()
    assert rms.max() / rms.min() < 1.001
    torch.testing.assert_close(normed.norm(), plain.norm(), rtol=1e-3, atol=0)


def test_muoneq_r_ignores_the_scale_of_rows() -> None:
    gradient, scale = random(16, 40), torch.logspace(-3, 3, 16).unsqueeze(1)
    torch.testing.assert_close(
        one("muoneq_r", lambda _: gradient * scale), one("muoneq_r", lambda _: gradient.clone()), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("kind", sorted(MATRIX_OPTIMIZERS))
@pytest.mark.parametrize("shape", [(8, 20), (1, 20), (20, 1), (20, 8)])
def test_zero_and_missing_gradients_only_decay(kind: str, shape: tuple[int, int]) -> None:
    start = random(*shape)
    param = Parameter(start.clone())
    optimizer = MATRIX_OPTIMIZERS[kind]([("m", param)], OptimSection(weight_decay=0.5), Dist())
    for grad in (torch.zeros(shape), None):
        param.grad = grad
        optimizer.step(0.1, 0.95)
    torch.testing.assert_close(param.detach(), start * (1 - 0.1 * 0.5) ** 2)


@pytest.mark.parametrize("kind", sorted(MATRIX_OPTIMIZERS))
def test_a_dead_row_stays_finite(kind: str) -> None:
    gradient = random(12, 32)
    gradient[3] = 0
    moved = one(kind, lambda _: gradient.clone(), steps=3)
    assert torch.isfinite(moved).all()
    assert moved.abs().sum() > 0


@pytest.mark.parametrize("kind", sorted(MATRIX_OPTIMIZERS))
def test_two_runs_agree_bit_for_bit(kind: str) -> None:
    runs = [one(kind, lambda step: random(20, 44, seed=step), steps=3, ns_steps=5) for _ in range(2)]
    assert torch.equal(*runs)


def test_gradients_are_left_alone() -> None:
    param = Parameter(random(8, 16))
    optimizer = Muon([("m", param)], OptimSection(), Dist())
    param.grad = random(8, 16, seed=5)
    optimizer.step(0.1, 0.95)
    assert torch.equal(param.grad, random(8, 16, seed=5))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_owners_share_the_cost(world: int) -> None:
    shapes = [(256, 256), (128, 256), (128, 256), (256, 256), (768, 256), (256, 768)] * 6
    owner = assign_owners(shapes, world)
    load = [sum(orthogonalize_cost(*s) for s, o in zip(shapes, owner, strict=True) if o == r) for r in range(world)]
    assert max(load) - min(load) <= max(orthogonalize_cost(*s) for s in shapes)
    assert sum(load) == sum(orthogonalize_cost(*s) for s in shapes)


def test_only_float32_matrices_are_taken() -> None:
    for bad in (torch.zeros(4), torch.zeros(2, 3, 4), torch.zeros(3, 3, dtype=torch.bfloat16)):
        with pytest.raises(GolfError, match="'odd'"):
            Muon([("odd", Parameter(bad))], OptimSection(), Dist())


def test_nothing_to_do() -> None:
    optimizer = Muon([], OptimSection(), Dist())
    optimizer.step(0.1, 0.9)
    assert optimizer.state_dict() == {}
