"""Groups, Adam, clipping and resuming, on a small model with every kind of parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from paramgolf.dist import Dist
from paramgolf.errors import GolfError
from paramgolf.optim.adam import Adam
from paramgolf.optim.groups import OptimizerSet, build_optimizers, group_of, matrix_dtype
from paramgolf.optim.registry import MATRIX_OPTIMIZERS
from paramgolf.recipe.sections import OptimSection


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Holder(nn.Module):
    """Parameters under dotted names, without a forward."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for i, (name, shape) in enumerate(shapes.items()):
            module: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(leaf, Parameter(random(*shape, seed=i)))


SHAPES: dict[str, tuple[int, ...]] = {
    "tok_emb.weight": (40, 12),
    "lm_head.weight": (40, 12),
    "skip_weights": (1, 12),
    "blocks.0.attn_scale": (12,),
    "blocks.0.resid_mix": (2, 12),
    "blocks.0.attn.q_gain": (4,),
    "blocks.0.attn.c_q.weight": (12, 12),
    "blocks.0.mlp.fc.weight": (24, 12),
    "blocks.0.mlp.proj.weight": (12, 24),
    "bigram.embed.weight": (32, 6),
    "bigram.proj.weight": (12, 6),
    "bigram.scale": (),
    "smear.gate": (12,),
}
GROUP = {
    "tok_emb.weight": "embed",
    "bigram.embed.weight": "embed",
    "lm_head.weight": "head",
    "blocks.0.attn.c_q.weight": "matrix",
    "blocks.0.mlp.fc.weight": "matrix",
    "blocks.0.mlp.proj.weight": "matrix",
    "bigram.proj.weight": "matrix",
}


def set_gradients(model: nn.Module, step: int, scale: float = 1.0) -> None:
    for i, param in enumerate(model.parameters()):
        param.grad = scale * random(*param.shape, seed=1000 * (step + 1) + i)


def train(model: nn.Module, optimizers: OptimizerSet, steps: range) -> None:
    for step in steps:
        set_gradients(model, step)
        optimizers.clip(0.3)
        optimizers.step(1.0 / (step + 1), 0.9 + 0.01 * step)
        optimizers.zero_grad()


def test_groups_by_name() -> None:
    optimizers = build_optimizers(Holder(SHAPES), OptimSection(), Dist())
    assert {name: optimizers.group_of(name) for name in SHAPES} == {name: GROUP.get(name, "scalar") for name in SHAPES}
    assert len(optimizers.params) == len(SHAPES)


def test_a_part_may_name_the_group() -> None:
    param = Parameter(torch.zeros(4, 4))
    assert group_of("hyper.weight", param) == "scalar"
    param.optim_group = "matrix"  # type: ignore[attr-defined]
    assert group_of("hyper.weight", param) == "matrix"
    param.optim_group = "muon"  # type: ignore[attr-defined]
    with pytest.raises(GolfError, match="muon"):
        group_of("hyper.weight", param)


def test_every_group_steps_at_its_own_rate() -> None:
    section = OptimSection(matrix_lr=0.01, scalar_lr=0.02, embed_lr=0.03, head_lr=0.04)
    model = Holder(SHAPES)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = build_optimizers(model, section, Dist())
    set_gradients(model, 0)
    optimizers.step(0.5, 0.95)
    rates = {"scalar": 0.02, "embed": 0.03, "head": 0.04}
    for name, param in model.named_parameters():
        moved = (param.detach() - before[name]).abs()
        group = GROUP.get(name, "scalar")
        if group in rates:  # the first Adam step is lr * sign(g)
            torch.testing.assert_close(moved, torch.full_like(moved, 0.5 * rates[group]), rtol=1e-3, atol=1e-6)
        else:
            assert 0 < torch.linalg.matrix_norm(moved, 2) < 0.5 * 0.01 * 10


def test_every_group_has_its_own_decay() -> None:
    section = OptimSection(
        matrix_lr=0.1, scalar_lr=0.1, embed_lr=0.1, head_lr=0.1, weight_decay=0.1, embed_weight_decay=0.2,
        scalar_weight_decay=0.3,
    )  # fmt: skip
    model = Holder(SHAPES)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    build_optimizers(model, section, Dist()).step(1.0, 0.95)  # no gradients: only the decay is left
    decay = {"matrix": 0.1, "embed": 0.2, "head": 0.2, "scalar": 0.3}
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.detach(), before[name] * (1 - 0.1 * decay[GROUP.get(name, "scalar")]))


def test_lr_zero_moves_nothing() -> None:
    model = Holder(SHAPES)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = build_optimizers(model, OptimSection(weight_decay=0.1, embed_weight_decay=0.1), Dist())
    set_gradients(model, 0)
    optimizers.step(0.0, 0.95)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_equals_torch(decay: float) -> None:
    shapes = [(40, 12), (7,), ()]
    ours = [Parameter(random(*s, seed=i)) for i, s in enumerate(shapes)]
    theirs = [Parameter(p.detach().clone()) for p in ours]
    adam = Adam([(str(i), p) for i, p in enumerate(ours)], betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
    reference = torch.optim.AdamW(theirs, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay, foreach=False)
    for step in range(12):
        lr = 0.05 / (step + 1)
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = random(*a.shape, seed=100 * step + i) * (0.0 if step == 4 else 1.0)
            b.grad = a.grad.clone()
        reference.param_groups[0]["lr"] = lr
        adam.step(lr)
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)


def test_clip_is_torch_s_rule() -> None:
    model, reference = Holder(SHAPES), Holder(SHAPES)
    optimizers = build_optimizers(model, OptimSection(), Dist())
    for scale in (1.0, 1e-4, 0.0):
        set_gradients(model, 0, scale)
        set_gradients(reference, 0, scale)
        norm = optimizers.clip(0.3)
        expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.3)
        torch.testing.assert_close(norm, expected)
        for a, b in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    set_gradients(model, 0)
    optimizers.clip(0.0)
    set_gradients(reference, 0)
    assert all(
        torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
        for a, b in zip(model.parameters(), reference.parameters(), strict=True)
    )
    optimizers.zero_grad()
    assert float(optimizers.clip(1.0)) == 0.0


@pytest.mark.parametrize("kind", sorted(MATRIX_OPTIMIZERS))
def test_resume_is_exact(kind: str) -> None:
    section = OptimSection(matrix=kind, weight_decay=0.1, scalar_weight_decay=0.01)
    straight = Holder(SHAPES)
    train(straight, build_optimizers(straight, section, Dist()), range(6))

    first = Holder(SHAPES)
    optimizers = build_optimizers(first, section, Dist())
    train(first, optimizers, range(3))
    state, weights = optimizers.state_dict(), {k: v.clone() for k, v in first.state_dict().items()}
    train(first, optimizers, range(3, 5))  # what comes after must not reach into the saved state

    second = Holder(SHAPES)
    second.load_state_dict(weights)
    resumed = build_optimizers(second, section, Dist())
    resumed.load_state_dict(state)
    train(second, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), straight.parameters(), strict=True))


def test_state_is_flat_float32_and_numbers() -> None:
    model = Holder(SHAPES)
    optimizers = build_optimizers(model, OptimSection(matrix="normuon"), Dist())
    train(model, optimizers, range(2))
    state = optimizers.state_dict()
    assert state["scalar.steps"] == 2
    assert all(v.dtype == torch.float32 for v in state.values() if isinstance(v, Tensor))
    assert state["matrix.second.blocks.0.mlp.fc.weight"].shape == (24,)  # type: ignore[union-attr]


@pytest.mark.parametrize("harm", ["missing", "extra", "shape"])
def test_a_foreign_state_is_refused_unchanged(harm: str) -> None:
    model = Holder(SHAPES)
    optimizers = build_optimizers(model, OptimSection(), Dist())
    train(model, optimizers, range(2))
    state: dict[str, Any] = optimizers.state_dict()
    before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
    bad = {k: torch.zeros_like(v) if isinstance(v, Tensor) else 0 for k, v in state.items()}
    if harm == "missing":
        del bad["head.mean.lm_head.weight"]
    elif harm == "extra":
        bad["matrix.second.blocks.0.mlp.fc.weight"] = torch.zeros(24)
    else:
        bad["matrix.momentum.blocks.0.mlp.fc.weight"] = torch.zeros(12, 24)
    with pytest.raises(GolfError, match="another model"):
        optimizers.load_state_dict(bad)
    after = optimizers.state_dict()
    assert all(torch.equal(torch.as_tensor(after[k]), torch.as_tensor(before[k])) for k in before)


def test_unknown_optimizer_names_the_nearest() -> None:
    with pytest.raises(GolfError, match="did you mean 'normuon'"):
        build_optimizers(Holder(SHAPES), OptimSection(matrix="normoun"), Dist())


def test_matrix_dtype() -> None:
    cpu = torch.device("cpu")
    assert matrix_dtype("auto", cpu) == matrix_dtype("float32", cpu) == torch.float32
    assert matrix_dtype("auto", torch.device("cuda")) == matrix_dtype("bfloat16", cpu) == torch.bfloat16
    assert matrix_dtype("fast", cpu) in (torch.float32, torch.bfloat16)


def test_training_a_linear_map_converges() -> None:
    """The whole set on a real loss: fit a linear map from data."""
    torch.manual_seed(0)
    model = Holder({"blocks.0.attn.c_q.weight": (8, 8), "blocks.0.attn_scale": (8,)})
    weight, scale = model.get_parameter("blocks.0.attn.c_q.weight"), model.get_parameter("blocks.0.attn_scale")
    target, x = torch.randn(8, 8), torch.randn(256, 8)
    optimizers = build_optimizers(model, OptimSection(matrix_lr=0.05, scalar_lr=0.02), Dist())
    losses = []
    for step in range(200):
        loss = ((x @ weight.T * scale - x @ target.T) ** 2).mean()
        optimizers.zero_grad()
        loss.backward()
        optimizers.step(1.0 - step / 200, 0.9)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.01 * losses[0]
