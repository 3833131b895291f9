"""The budget solver: files that fill their caps and never pass them, better plans than one k for all, refusals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from paramgolf.errors import GolfError
from paramgolf.pack.curves import Curves
from paramgolf.pack.packer import load_artifact, pack_model
from paramgolf.pack.solver import rough_plan
from paramgolf.quant.gptq import weighted_error
from paramgolf.recipe.load import load_recipe
from paramgolf.recipe.sections import Recipe
from paramgolf.runner.run import run
from tests.run_common import TINY, prose
from tests.test_pack_packer import SMALL, VOCAB, weights

WIDER = [*SMALL, "model.dim=96", "pack.codec=rans"]  # all matrices above the size that is kept in half precision
GRIDS = tuple(load_recipe("pocket").quant.grids)
Loss = Callable[[Mapping[str, Tensor]], float]


def recipe(cap: int, *overrides: str) -> Recipe:
    return load_recipe("pocket", [*WIDER, "pack.fit=true", f"budget.bytes={cap}", *overrides])


def moments(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Correlated inputs for every matrix, larger for some tensors than for others."""
    made = {}
    for index, (name, tensor) in enumerate(state.items()):
        if tensor.ndim == 2:
            x = torch.randn(500, tensor.shape[1], generator=torch.Generator().manual_seed(index))
            x = x * torch.linspace(0.2, 2, tensor.shape[1])
            made[name] = x.t() @ x / 500 * (1 + 3 * (index % 3))
    return made


def quadratic(state: Mapping[str, Tensor], hessians: Mapping[str, Tensor]) -> Loss:
    """A loss that knows the true cost of errors: some tensors matter ten times as much as their output error says."""
    start = {name: tensor.clone() for name, tensor in state.items()}

    def loss(other: Mapping[str, Tensor]) -> float:
        return 3.0 + sum(
            (10.0 if "mlp" in name else 1.0) * 1e-4 * weighted_error(start[name], other[name], hessian)
            for name, hessian in hessians.items()
        )

    return loss


@pytest.mark.parametrize(("cap", "method"), [(45_000, "rtn"), (70_000, "gptq"), (95_000, "rtn"), (115_000, "gptq")])
def test_the_file_fills_its_cap_and_never_passes_it(tmp_path: Path, cap: int, method: str) -> None:
    chosen = recipe(cap, f"quant.method={method}")
    state = weights(chosen).state_dict()
    hessians = moments(state)
    path = tmp_path / "m.golf"
    ledger = pack_model(
        state, chosen, b"tok", path, VOCAB, hessians=hessians, loss=quadratic(state, hessians)
    )  # fmt: skip
    assert 0.998 * cap <= path.stat().st_size == ledger.counted_bytes <= cap
    assert ledger.fit["encodes"] <= 6 and ledger.fit["nats_per_kilobyte"] > 0
    assert set(load_artifact(path).state) == set(state)


def test_the_plan_beats_one_k_for_all_and_predicts_its_loss(tmp_path: Path) -> None:
    alike = [f"quant.grids.{name}={{bits=6, clip='sdclip', clip_value=12.0}}" for name in GRIDS]
    plain = load_recipe("pocket", [*WIDER, *alike])
    state = weights(plain).state_dict()
    hessians = moments(state)
    loss = quadratic(state, hessians)
    one = pack_model(state, plain, b"tok", tmp_path / "one", VOCAB).counted_bytes
    fitted = pack_model(state, recipe(one), b"tok", tmp_path / "fit", VOCAB, hessians=hessians, loss=loss)
    before, after = (loss(load_artifact(tmp_path / name).state) - 3.0 for name in ("one", "fit"))
    assert after < 0.95 * before
    assert fitted.fit["predicted_loss"] == pytest.approx(after, rel=0.1)
    steps = {name.split()[0]: group["step"] for name, group in fitted.fit["groups"].items()}
    assert steps["mlp.fc.weight"] < steps["attn.c_v.weight"]  # what matters more gets the finer steps
    assert fitted.fit["measured_loss"] == pytest.approx(after, rel=1e-3)


def test_curves_hold_only_pairs_that_no_other_beats() -> None:
    chosen = recipe(80_000, "quant.method=rtn")
    state = weights(chosen).state_dict()
    hessians = moments(state)
    curves = Curves(state, chosen, hessians, quadratic(state, hessians))
    before = {group.name: group.cost[0] for group in curves.groups}
    for group in curves.groups:
        assert (np.diff(group.bytes) > 0).all() and (np.diff(group.cost) < 0).all()
        assert 2 <= group.bits.min() < group.bits.max() == 8
        steps = group.k / (2.0 ** (group.bits - 1) - 1)
        assert steps.max() <= 2.0 and group.weights == sum(state[name].numel() for name in group.members)
        assert group.bytes[group.within(group.bytes[5] + 0.5)] == group.bytes[5] and group.within(0.0) == 0
    curves.refine(rough_plan(curves.groups, 60_000))  # a quadratic loss costs the same for a unit everywhere
    assert all(group.cost[0] == pytest.approx(before[group.name], rel=0.05) for group in curves.groups)


def test_odd_tensors_are_packed_or_refused_by_name(tmp_path: Path) -> None:
    chosen = recipe(70_000)
    state = dict(weights(chosen).state_dict())
    state["blocks.0.mlp.fc.weight"] = torch.zeros_like(state["blocks.0.mlp.fc.weight"])
    state["blocks.1.mlp.fc.weight"] = torch.full_like(state["blocks.1.mlp.fc.weight"], 0.25)
    ledger = pack_model(state, chosen, b"tok", tmp_path / "m", VOCAB)
    assert 0.998 * 70_000 <= ledger.counted_bytes <= 70_000
    loaded = load_artifact(tmp_path / "m").state
    assert not loaded["blocks.0.mlp.fc.weight"].any()
    state["blocks.2.mlp.fc.weight"] = torch.full_like(state["blocks.2.mlp.fc.weight"], torch.inf)
    with pytest.raises(GolfError, match=r"blocks\.2\.mlp\.fc\.weight"):
        pack_model(state, chosen, b"tok", tmp_path / "n", VOCAB)


def test_a_cap_beyond_the_finest_plan_gives_the_finest_plan(tmp_path: Path) -> None:
    chosen = recipe(10_000_000)
    state = weights(chosen).state_dict()
    ledger = pack_model(state, chosen, b"tok", tmp_path / "m", VOCAB)
    assert ledger.counted_bytes < 200_000 and ledger.fit["nats_per_kilobyte"] == 0


def test_a_cap_below_the_coarsest_plan_is_refused_with_the_smallest_size_that_does(tmp_path: Path) -> None:
    chosen = recipe(5_000)
    state = weights(chosen).state_dict()
    with pytest.raises(GolfError, match="on its coarsest grids") as caught:
        pack_model(state, chosen, b"tok", tmp_path / "m", VOCAB)
    assert list(tmp_path.iterdir()) == []
    smallest = int(str(caught.value).rpartition("budget.bytes=")[2])
    assert pack_model(state, recipe(smallest), b"tok", tmp_path / "m", VOCAB).counted_bytes <= smallest


def test_what_cannot_be_fitted_is_said() -> None:
    state = weights(recipe(1)).state_dict()
    with pytest.raises(GolfError, match="there is none; set"):
        pack_model(state, recipe(0), b"tok", "unused", VOCAB)
    with pytest.raises(GolfError, match="sdclip"):
        pack_model(
            state,
            recipe(80_000, *[f"quant.grids.{name}.clip=rowmax" for name in GRIDS]),
            b"tok",
            "unused",
            VOCAB,
        )


def test_equal_input_gives_equal_files(tmp_path: Path) -> None:
    chosen = recipe(80_000)
    state = weights(chosen).state_dict()
    for name in "ab":
        pack_model(state, chosen, b"tok", tmp_path / name, VOCAB)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_run_fills_its_cap(tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text(prose())
    overrides = [
        *TINY,
        "model.dim=96",
        "model.mlp_hidden=96",
        "quant.method=gptq",
        "pack.fit=true",
        "pack.fit_tokens=1024",
    ]
    record = run(load_recipe("pocket", [*overrides, "budget.bytes=100000"]), data=str(source), out=tmp_path / "run")
    assert record is not None
    assert 0.998 * 100_000 <= record["artifact_bytes"] <= 100_000
    assert record["fit"]["groups"] and record["seconds"]["calibrate"] > 0
