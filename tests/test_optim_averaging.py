"""Weight averages: the arithmetic, when they collect, and resuming."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paramgolf.errors import GolfError
from paramgolf.optim.averaging import EMA, SWA, build_average, restore
from paramgolf.recipe.sections import AverageSection


def model_of(value: float) -> nn.Linear:
    model = nn.Linear(3, 2)
    fill(model, value)
    return model


def fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(value)


def test_ema_is_the_recursion_from_the_initial_weights() -> None:
    model = model_of(1.0)
    average = EMA(model, 0.9)
    expected = 1.0
    for step, value in enumerate([2.0, -1.0, 5.0]):
        fill(model, value)
        average.update(model, step, 1.0)
        expected = 0.9 * expected + 0.1 * value
    before = average.apply(model)
    torch.testing.assert_close(model.weight.detach(), torch.full((2, 3), expected))
    restore(model, before)
    assert torch.equal(model.weight.detach(), torch.full((2, 3), 5.0))


def test_swa_collects_late_at_once_and_at_multiples() -> None:
    model = model_of(0.0)
    average = SWA(start_lr_mul=0.5, every=10)
    taken = []
    for step in range(40):
        fill(model, float(step))
        count = average.count
        average.update(model, step, 1.0 - step / 40)
        taken += [step] if average.count > count else []
    assert taken == [21, 30]
    average.apply(model)
    torch.testing.assert_close(model.bias.detach(), torch.full((2,), 25.5))


def test_nothing_collected_leaves_the_model_alone() -> None:
    model = model_of(3.0)
    average = SWA(start_lr_mul=0.5, every=1)
    average.update(model, 0, 1.0)
    assert not average.ready
    average.apply(model)
    assert torch.equal(model.bias.detach(), torch.full((2,), 3.0))


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_resume_is_exact(kind: str) -> None:
    section = AverageSection(kind=kind, decay=0.8, every=1)  # type: ignore[arg-type]
    model = model_of(1.0)
    straight, first = build_average(section, model), build_average(section, model)
    assert straight is not None and first is not None
    second = None
    for step in range(6):
        torch.manual_seed(step)
        nn.init.normal_(model.weight)
        straight.update(model, step, 0.5)
        if step == 3:
            second = build_average(section, model)
            assert second is not None
            second.load_state_dict(first.state_dict())
        (second or first).update(model, step, 0.5)
    assert second is not None and second.count == straight.count
    assert all(torch.equal(second.shadow[name], straight.shadow[name]) for name in straight.shadow)
    assert all(tensor.dtype == torch.float32 for tensor in straight.shadow.values())


def test_kind_none_and_a_foreign_average() -> None:
    assert build_average(AverageSection(kind="none"), model_of(1.0)) is None
    with pytest.raises(GolfError, match="different models"):
        restore(model_of(1.0), {"weight": torch.zeros(2, 3)})
    with pytest.raises(GolfError, match="no weight average"):
        EMA(model_of(1.0), 0.9).load_state_dict({})
