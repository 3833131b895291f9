"""What later records add to quantisation: clips by error, coarser scales, mixed bits, gates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paramgolf.errors import GolfError
from paramgolf.model.gpt import GPT
from paramgolf.pack.container import Artifact, decode_artifact, encode_artifact, read_artifact
from paramgolf.pack.packer import load_model, pack_model
from paramgolf.quant import gptq, weighted
from paramgolf.quant.export import export, restore
from paramgolf.quant.gptq import weighted_error
from paramgolf.quant.grid import Grid, round_to_float16
from paramgolf.quant.registry import QUANTIZERS, calibrated
from paramgolf.quant.sensitivity import mixed
from paramgolf.recipe.load import load_recipe
from paramgolf.recipe.sections import GridSection, QuantSection, RuleSection
from tests.quant_common import INT6, layer, quant

# -- clips and scales ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_clips_leave_less_error_than_the_row_maximum_and_at_most_a_little_more_than_any_clip(bits: int) -> None:
    weight, _ = layer()

    def error(section: GridSection) -> torch.Tensor:
        grid = Grid(section)
        return (grid.dequantize(*grid.quantize(weight)) - weight).square().sum(-1)

    found = error(GridSection(bits=bits, clip="mse"))
    assert (found <= error(GridSection(bits=bits)) * 1.0001).all()
    steps = 2 ** (bits - 1) - 1
    any_k = [error(GridSection(bits=bits, clip="sdclip", clip_value=0.4 * steps * 1.07**n)) for n in range(40)]
    assert (found <= 1.05 * torch.stack(any_k).amin(0)).all()


def test_weighted_clips_trade_error_of_weights_for_error_of_outputs() -> None:
    weight, hessian = layer()
    grid = Grid(GridSection(bits=3, clip="mse"))
    plain, by_output = grid.quantize(weight), weighted.quantize(weight, grid, hessian)
    diagonal = torch.diag(hessian.diagonal())
    errors = [weighted_error(weight, grid.dequantize(*pair), diagonal) for pair in (by_output, plain)]
    assert errors[0] < 0.95 * errors[1]
    assert weighted_error(weight, grid.dequantize(*by_output), None) > weighted_error(
        weight, grid.dequantize(*plain), None
    )


def test_row_weight_moves_the_clips_of_rows_by_their_importance() -> None:
    """#1412: k of a row times 1 + 0.175 (r - 1), r its mean |w| x diag(H) over that of all rows."""
    weight, hessian = layer()
    base, moved = Grid(INT6), Grid(replace(INT6, row_weight=0.175))
    assert torch.equal(moved.quantize(weight)[1], base.quantize(weight)[1])  # no Hessian: nothing to weigh by
    row = (weight.abs() * hessian.diagonal()).mean(-1)
    expected = 12.85 * weight.std(-1) * (1 + 0.175 * (row / row.mean() - 1)) / 31
    for method in ("weighted", "gptq"):
        scale = QUANTIZERS[method](weight, moved, hessian)[1]
        assert torch.allclose(scale.float(), expected, rtol=1e-3)


@given(st.integers(2, 10), st.lists(st.floats(0, 65504, width=32), min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_scales_of_fewer_mantissa_bits_are_the_nearest(mantissa: int, values: list[float]) -> None:
    x = torch.tensor(values).clamp_max((2 - 0.5**mantissa) * 2.0**15)
    rounded = round_to_float16(x, mantissa)
    assert torch.equal(rounded.half().float(), rounded)
    normal = x >= 2.0**-14
    fraction = torch.frexp(rounded)[0] * 2.0 ** (mantissa + 1)
    assert (fraction == fraction.round())[normal].all()
    step = 2.0 ** (torch.frexp(x.clamp_min(2.0**-14))[1] - 1 - mantissa)
    assert ((rounded - x).abs() <= step / 2)[normal].all()
    if mantissa == 10:
        assert torch.equal(rounded, x.half().float())


def test_coarse_scales_save_bytes_and_hardly_any_quality() -> None:
    weight, _ = layer(512, 128)
    sizes, errors = [], []
    for bits in (10, 5):
        section = QuantSection(grids={"g": replace(INT6, scale_bits=bits)}, rules=(RuleSection(store="g"),))
        stored = export({"w": weight}, section, 1)
        sizes.append(encode_artifact(Artifact({}, stored), "rans").parts["scales"])
        errors.append(float((restore(stored)["w"] - weight).square().mean()))
    assert sizes[1] < sizes[0] - 512 * 4 / 8
    assert errors[1] < 1.01 * errors[0]


def test_coarse_scales_need_float16() -> None:
    with pytest.raises(GolfError, match="scale_bits=5"):
        Grid(GridSection(scale_bits=5, scale_dtype="float32"))


def test_training_and_export_agree_on_every_kind_of_grid() -> None:
    weight, _ = layer()
    kinds = [{"clip": "mse"}, {"clip": "search"}, {"scale_bits": 4}, {"low_code": "half"}, {"low_code": "full"}]
    for changes in kinds:
        for bits in (2, 5):
            grid = Grid(GridSection(bits=bits, **changes))  # type: ignore[arg-type]
            assert torch.equal(grid.fake_quantize(weight), grid.dequantize(*grid.quantize(weight)))


def test_the_input_share_of_a_tied_embedding_spreads_its_error_over_all_directions() -> None:
    weight, hessian = layer(rows=200)
    state, hessians = {"tok_emb.weight": weight, "other": weight}, {"tok_emb.weight": hessian, "other": hessian}
    section = QuantSection(method="gptq", grids={"g": GridSection(bits=4)}, rules=(RuleSection(store="g"),))
    tied = [restore(export(state, replace(section, input_share=s), 1, hessians)) for s in (0.0, 0.3)]
    plain = [weighted_error(weight, back["tok_emb.weight"], None) for back in tied]
    output = [weighted_error(weight, back["tok_emb.weight"], hessian) for back in tied]
    assert plain[1] < 0.95 * plain[0] and output[1] > output[0]
    assert torch.equal(tied[0]["other"], tied[1]["other"]) and torch.equal(tied[0]["other"], tied[0]["tok_emb.weight"])
    untied = {**state, "lm_head.weight": weight}
    alone = restore(export(untied, replace(section, input_share=0.3), 1, {**hessians, "lm_head.weight": hessian}))
    assert torch.equal(alone["tok_emb.weight"], tied[0]["other"])


# -- mixed bits ----------------------------------------------------------------------------------------------------


def test_the_coarse_grid_goes_where_it_costs_least() -> None:
    loud, hessian = layer()
    state = {"loud": loud, "quiet": loud.clone(), "vector": loud[0].clone()}
    hessians = {"loud": hessian, "quiet": hessian / 100}
    section = quant(coarse_grid="int4", coarse_fraction=0.5)
    assert calibrated(section) and not calibrated(quant())
    stores = {t.name: t.spec.store for t in export(state, section, 1, hessians)}
    assert stores == {"loud": "int6", "quiet": "int4", "vector": "int6"}
    chosen = mixed(section, state, 1, hessians)
    assert chosen.coarse_fraction == 0 and mixed(chosen, state, 1, hessians) == chosen
    swapped = export(state, section, 1, {"loud": hessian / 100, "quiet": hessian})
    assert [t.spec.store for t in swapped] == ["int4", "int6", "int6"]


def test_an_unknown_coarse_grid_is_named() -> None:
    with pytest.raises(GolfError, match="no grid 'int5'"):
        export({"w": layer()[0]}, quant(coarse_grid="int5", coarse_fraction=0.5), 1)


def test_gates_are_stored_by_row_in_eight_bits_by_a_rule_before_the_small_tensors() -> None:
    grids = {"int6": INT6, "gate": GridSection(bits=8, eps=1e-10)}
    rules = (
        RuleSection(match="*gate*", ndim=2, min_size=32, max_size=8192, store="gate"),
        RuleSection(max_size=65_536, store="float16"),
        RuleSection(store="int6"),
    )
    gate = torch.randn(8, 12)
    stored = export(
        {"blocks.0.attn.gate.weight": gate, "gain": torch.ones(8)}, QuantSection(grids=grids, rules=rules), 1
    )
    scale = (gate.abs().amax(-1) / 127).half()
    assert stored[0].scale is not None and np.array_equal(stored[0].scale, scale.numpy())
    expected = torch.round(gate / scale.float()[:, None]).clamp(-127, 127).to(torch.int8)
    assert np.array_equal(stored[0].values, expected.numpy()) and stored[1].spec.store == "float16"


# -- odd tensors ---------------------------------------------------------------------------------------------------

ODD = {
    "zeros": torch.zeros(16, 12),
    "one": torch.tensor([0.3]),
    "scalar": torch.tensor(-2.0),
    "one_by_one": torch.tensor([[5.0]]),
    "constant": torch.full((4, 6), 0.25),
    "column": torch.randn(9, 1),
    "row": torch.randn(1, 9),
    "tiny": torch.full((3, 4), 1e-9),
    "empty": torch.zeros(0, 4),
}


@pytest.mark.parametrize("method", sorted(QUANTIZERS))
@pytest.mark.parametrize("clip", ["rowmax", "sdclip", "quantile", "search", "mse"])
def test_zeros_constants_and_single_elements_are_handled_by_every_quantiser(method: str, clip: str) -> None:
    value = {"sdclip": 5.0, "quantile": 0.99}.get(clip, 0.0)
    grid = GridSection(bits=4, clip=clip, clip_value=value)  # type: ignore[arg-type]
    section = QuantSection(method=method, grids={"g": grid}, rules=(RuleSection(store="g"),), lqer_tensors=2)
    hessians = {n: torch.ones(t.shape[1], t.shape[1]) for n, t in ODD.items() if t.ndim == 2}
    hessians["zeros"] = torch.zeros(12, 12)
    stored = export(ODD, section, 1, hessians)
    back = restore(decode_artifact(encode_artifact(Artifact({}, stored), "rans").data).tensors)
    for name, weight in ODD.items():
        assert back[name].shape == weight.shape and torch.isfinite(back[name]).all()
        assert (
            float((back[name] - weight).abs().max()) <= float(weight.abs().max()) * 0.6 + 1e-6
            if weight.numel()
            else True
        )
    assert not back["zeros"].any()


@pytest.mark.parametrize("method", sorted(QUANTIZERS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(method: str, bad: float) -> None:
    weight, hessian = layer()
    weight[3, 3] = bad
    section = replace(quant(), method=method)
    with pytest.raises(GolfError, match=r"tensor fc\.weight: .*NaN or infinity"):
        export({"fc.weight": weight}, section, 1, {"fc.weight": hessian})


def test_every_quantiser_keeps_to_its_grid() -> None:
    weight, hessian = layer()
    for method in QUANTIZERS:
        for low in ("symmetric", "full", "half"):
            grid = Grid(GridSection(bits=3, low_code=low))  # type: ignore[arg-type]
            codes, scale = QUANTIZERS[method](weight, grid, hessian)
            assert codes.dtype == torch.int8 and codes.shape == weight.shape
            assert scale.dtype == torch.float16 and scale.shape == (len(weight),)
            assert int(codes.min()) >= grid.qmin and int(codes.max()) <= grid.qmax
    assert gptq.quantize in [QUANTIZERS[name] for name in QUANTIZERS]


def test_a_model_with_everything_on_goes_into_a_file_and_comes_out_ready(tmp_path: Path) -> None:
    """Mixed bits, GPTQ with weighted clips, coarse scales, salient columns and corrections, all by keys."""
    sizes = ["model.dim=96", "model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=2", "model.mlp_hidden=192"]
    section = QuantSection(
        method="gptq",
        grids={
            "int6": GridSection(bits=6, clip="sdclip", clip_value=12.0, scale_bits=5, row_weight=0.175),
            "int4": GridSection(bits=4, clip="mse"),
        },
        rules=(RuleSection(match="@control", store="float16"), RuleSection(store="int6")),
        coarse_grid="int4",
        coarse_fraction=0.3,
        input_share=0.1,
        awq_columns=32,
        lqer_tensors=2,
    )
    recipe = replace(load_recipe("baseline", [*sizes, "budget.bytes=0", "pack.codec=rans"]), quant=section)
    model = GPT(recipe.model, 300)
    draw = torch.Generator().manual_seed(5)
    state = {name: torch.randn(t.shape, generator=draw) * 0.1 for name, t in model.state_dict().items()}
    inputs = {name: torch.randn(400, t.shape[1], generator=draw) for name, t in state.items() if t.ndim == 2}
    hessians = {name: x.t() @ x / 400 for name, x in inputs.items() if "scale" not in name and "mix" not in name}
    ledger = pack_model(state, recipe, b"tok", tmp_path / "m.golf", 300, hessians=hessians)
    assert ledger.groups["corrections"] > 0 and sum(ledger.groups.values()) == (tmp_path / "m.golf").stat().st_size
    loaded = load_model(tmp_path / "m.golf").model.state_dict()
    expected = restore(export(state, recipe.quant, 2, hessians))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    stores = {row[2] for row in read_artifact(tmp_path / "m.golf").manifest["tensors"]}
    assert {"int4", "int6", "lqer_a", "lqer_b", "awq"} <= stores
