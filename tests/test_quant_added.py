"""What a matrix gets beside its codes: low-rank corrections, and salient columns that keep eight bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from paramgolf.errors import GolfError
from paramgolf.pack.container import Artifact, decode_artifact, encode_artifact
from paramgolf.pack.stored import StoredTensor
from paramgolf.quant import lqer
from paramgolf.quant.export import export, payload_bytes, restore
from paramgolf.quant.gptq import weighted_error
from paramgolf.recipe.sections import GridSection, QuantSection, RuleSection
from tests.quant_common import INT6, layer, quant

# -- low-rank corrections ------------------------------------------------------------------------------------------


def low_rank_case() -> dict[str, torch.Tensor]:
    """`b` has a direction that its grid clips away; `a` and `c` have not."""
    draw = torch.Generator().manual_seed(4)
    state = {name: torch.randn(64, 48, generator=draw) * 0.1 for name in "abc"}
    state["b"] = state["b"] + torch.outer(torch.randn(64, generator=draw), torch.randn(48, generator=draw))
    return state | {"gain": torch.ones(5)}


CLIPPED = QuantSection(grids={"int4": GridSection(bits=4, clip="sdclip", clip_value=2.0)}, rules=(
    RuleSection(max_size=10, store="float16"), RuleSection(store="int4")), lqer_tensors=1)  # fmt: skip


def test_the_worst_matrix_is_corrected_and_the_file_gives_it_back() -> None:
    state = low_rank_case()
    plain = restore(export(state, replace(CLIPPED, lqer_tensors=0), 1))
    stored = export(state, CLIPPED, 1)
    names = [t.name for t in stored]
    assert names == ["a", "b", "b.lqer_a", "b.lqer_b", "c", "gain"]
    back = restore(stored)
    assert list(back) == list(state)
    assert all(torch.equal(back[name], plain[name]) for name in ("a", "c", "gain"))
    assert float((back["b"] - state["b"]).norm()) < 0.9 * float((plain["b"] - state["b"]).norm())
    read = decode_artifact(encode_artifact(Artifact({}, stored), "rans").data)
    again = restore(read.tensors)
    assert all(torch.equal(again[name], back[name]) for name in state)
    extra = 4 * 64 + 2 + 4 * 48 + 2 * (4 * 48 // 64)
    assert payload_bytes(stored) == payload_bytes(export(state, replace(CLIPPED, lqer_tensors=0), 1)) + extra


def test_a_correction_is_the_best_approximation_before_it_is_rounded() -> None:
    error = torch.randn(30, 20)
    a, b = lqer.factors(error, 4)
    singular = torch.linalg.svdvals(error)
    assert torch.allclose((error - a @ b).norm(), singular[4:].norm(), rtol=1e-4)


@pytest.mark.parametrize(("shape", "group"), [((20, 32), 64), ((20, 31), 64), ((7, 5), 64), ((16, 9), 6)])
def test_groups_divide_the_right_factor(shape: tuple[int, int], group: int) -> None:
    rank = 3
    a, b = torch.randn(shape[0], rank), torch.randn(rank, shape[1])
    left, right = lqer.packed("w", a, b, group)
    assert left.values.size == shape[0] * rank and right.values.size == rank * shape[1]
    assert right.values.shape[1] <= group and left.scale is not None and left.scale.shape == ()
    assert left.values.min() >= -2 and left.values.max() <= 1 and abs(right.values.astype(int)).max() <= 8


def test_small_matrices_and_vectors_are_left_alone() -> None:
    state = {"w": torch.randn(6, 5), "v": torch.randn(400)}
    section = QuantSection(grids={"g": GridSection(bits=2)}, rules=(RuleSection(store="g"),), lqer_tensors=5)
    assert [t.name for t in export(state, section, 1)] == ["w", "v"]


def test_corrections_that_do_not_fit_are_refused_by_name() -> None:
    stored = {t.name: t for t in export(low_rank_case(), CLIPPED, 1)}
    short = lqer.packed("b", torch.randn(63, 4), torch.randn(4, 48), 64)
    wide = lqer.packed("b", torch.randn(64, 4), torch.randn(4, 47), 64)
    cases: list[list[StoredTensor]] = [
        [t for n, t in stored.items() if n != "b"],
        [t for n, t in stored.items() if n != "b.lqer_a"],
        [t for n, t in stored.items() if n != "b.lqer_b"],
        [*(t for n, t in stored.items() if not n.startswith("b.")), *short],
        [*(t for n, t in stored.items() if not n.startswith("b.")), *wide],
        [stored["gain"], *lqer.packed("gain", torch.randn(5, 1), torch.randn(1, 5), 5)],
    ]
    for tensors in cases:
        with pytest.raises(GolfError, match="lqer_"):
            restore(tensors)


# -- salient columns ------------------------------------------------------------------------------------------------


def salient_case() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Columns 32..39 of `b` read inputs a hundred times as large as the rest."""
    (a, hessian), (b, _) = layer(seed=1), layer(seed=2)
    size = torch.ones(96)
    size[32:40] = 100
    return {"a": a, "b": b, "v": b[0].clone()}, {"a": hessian, "b": hessian * size[:, None] * size}


def test_the_most_salient_columns_keep_eight_bits_and_the_file_gives_them_back() -> None:
    state, hessians = salient_case()
    section = quant(method="gptq", awq_columns=8)
    stored = {t.name: t for t in export(state, section, 1, hessians)}
    assert list(stored) == ["a", "b", "b.awq_32", "v"]
    assert not stored["b"].values[:, 32:40].any() and stored["b.awq_32"].spec.bits == 8
    back = restore(decode_artifact(encode_artifact(Artifact({}, list(stored.values())), "rans").data).tensors)
    plain = restore(export(state, replace(section, awq_columns=0), 1, hessians))
    assert list(back) == list(state) and torch.equal(back["a"], plain["a"])
    errors = [weighted_error(state["b"], weights["b"], hessians["b"]) for weights in (back, plain)]
    assert errors[0] < 0.5 * errors[1]
    both = export(state, replace(section, lqer_tensors=1), 1, hessians)
    assert [t.name for t in both if t.name.startswith("b")] in (
        ["b", "b.awq_32"],
        ["b", "b.lqer_a", "b.lqer_b", "b.awq_32"],
    )
    assert list(restore(both)) == list(state)


def test_the_salient_group_is_chosen_and_scaled_as_published() -> None:
    """#1908: RMS of the input x mean |w|, summed over the group; only where the grid has fewer than eight bits; the
    scale is k row deviations over 127, of the whole row."""
    state, hessians = salient_case()
    saliency = {n: hessians[n].diagonal().sqrt() * state[n].abs().mean(0) for n in "ab"}
    sums = {(n, at): float(saliency[n][at : at + 8].sum()) for n in "ab" for at in range(0, 96, 8)}
    assert max(sums, key=sums.__getitem__) == ("b", 32)
    stored = {t.name: t for t in export(state, quant(method="gptq", awq_columns=8, input_share=50.0), 1, hessians)}
    group, whole = stored["b.awq_32"], stored["b"]
    assert group.scale is not None and whole.scale is not None
    assert np.array_equal(group.scale, (12.85 * state["b"].std(1) / 127).half().numpy())
    assert np.array_equal(whole.scale, (12.85 * state["b"].std(1) / 31).half().numpy())
    grids = {"int6": INT6, "int8": replace(INT6, bits=8)}
    rules = (RuleSection(match="b", store="int8"), RuleSection(store="int6"))
    names = [t.name for t in export(state, QuantSection(method="gptq", awq_columns=8, grids=grids, rules=rules), 1,
                                    hessians)]  # fmt: skip
    first = max(range(0, 96, 8), key=lambda at: sums["a", at])
    assert names == ["a", f"a.awq_{first}", "b", "v"], "eight bits are nothing more to a matrix that has them"


def test_salient_columns_need_gptq_and_a_matrix_that_is_wide_enough() -> None:
    state, hessians = salient_case()
    with pytest.raises(GolfError, match="awq_columns needs"):
        export(state, quant(awq_columns=8), 1, hessians)
    narrow = export(state, quant(method="gptq", awq_columns=96), 1, hessians)
    assert [t.name for t in narrow] == list(state)


def test_columns_that_do_not_fit_are_refused_by_name() -> None:
    state, hessians = salient_case()
    stored = {t.name: t for t in export(state, quant(method="gptq", awq_columns=8), 1, hessians)}
    group = stored.pop("b.awq_32")
    moved = replace(group, spec=replace(group.spec, name="b.awq_90"))
    taken = replace(group, spec=replace(group.spec, name="b.awq_8"))
    lost = replace(group, spec=replace(group.spec, name="c.awq_8"))
    for wrong in (moved, taken, lost):
        with pytest.raises(GolfError, match="awq_"):
            restore([*stored.values(), wrong])
