"""From trained weights to stored tensors and back: the precision plan applied with a quantiser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from paramgolf.errors import GolfError
from paramgolf.pack.stored import PLAIN_DTYPES, StoredTensor, TensorSpec
from paramgolf.pack.stored import payload_bytes as payload_bytes  # the size belongs to what is exported
from paramgolf.quant import awq, lqer
from paramgolf.quant.grid import Grid
from paramgolf.quant.plan import Store, plan
from paramgolf.quant.registry import QUANTIZERS, Quantizer
from paramgolf.quant.sensitivity import mixed
from paramgolf.quant.weighted import with_input_share
from paramgolf.recipe.sections import QuantSection

_FLOAT16_MAX = 65_504.0


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of torch.float32."""
    return str(dtype).removeprefix("torch.")


def export(
    state: Mapping[str, Tensor],
    section: QuantSection,
    num_layers: int,
    hessians: Mapping[str, Tensor] | None = None,
    clips: Mapping[str, float] | None = None,
) -> list[StoredTensor]:
    """Every tensor of a state dict as the rules of `section` store it, in the order of `state`.

    Quantised tensors go through `QUANTIZERS[section.method]` (with the input second moments `hessians`, keyed by tensor
    name, where given); others are cast. `clips` replace the grid's `clip_value` for the tensors they name. Salient
    columns and low-rank corrections (see awq.py, lqer.py) follow the matrices they belong to. The weights are taken as
    float32, whatever type and device they have.
    Raises GolfError for non-finite weights, for values too large for float16, and for tensors without a rule.
    """
    inputs = hessians or {}
    hessians = with_input_share(inputs, state, section.input_share)
    section = mixed(section, state, num_layers, hessians)
    quantize: Quantizer = QUANTIZERS[section.method]
    grids = {name: Grid(grid) for name, grid in section.grids.items()}
    floats = {name: tuple(t.shape) for name, t in state.items() if t.is_floating_point()}
    stores = plan(floats, section, num_layers)
    salient = _salient(state, section, stores, inputs)  # as the layers' inputs are, whatever weighs the errors
    out = []
    for name, tensor in state.items():
        weight = tensor.detach()
        if name not in stores:
            out.append(_kept(name, weight, dtype_name(weight.dtype)))
        elif stores[name].grid is None:
            out.append(_kept(name, weight.float(), stores[name].name))
        else:
            hessian, grid = hessians.get(name), grids[stores[name].name]
            if clips and name in clips:
                grid = Grid(replace(grid.section, clip_value=clips[name]))
            group: list[StoredTensor] = []
            try:
                if salient is not None and salient[0] == name and hessian is not None:
                    first, columns = salient[1], section.awq_columns
                    (codes, scale), fine = awq.quantize(name, weight.float(), grid, hessian, first, columns)
                    group = [fine]
                else:
                    codes, scale = quantize(weight.float(), grid, hessian)
            except GolfError as error:
                raise GolfError(f"tensor {name}: {error}") from None
            out += [_quantised(name, stores[name], codes, scale), *group]
    return lqer.corrected(out, state, section) if section.lqer_tensors else out


def _salient(
    state: Mapping[str, Tensor], section: QuantSection, stores: Mapping[str, Store], hessians: Mapping[str, Tensor]
) -> tuple[str, int] | None:  # fmt: skip
    """(matrix, first column) that `quant.awq_columns` asks for, if any."""
    if not section.awq_columns:
        return None
    awq.check(section.method)
    names = [name for name, store in stores.items() if store.grid is not None and store.grid.bits < awq.BITS]
    return awq.most_salient(state, hessians, names, section.awq_columns)


def check_added(section: QuantSection, specs: Iterable[TensorSpec]) -> None:
    """GolfError for salient columns that every matrix of `specs` is too narrow for, and for a grid named like one that
    columns or corrections bring along."""
    own = set(lqer.GRIDS) if section.lqer_tensors else set()
    if section.awq_columns:
        awq.check(section.method)
        own.add(awq.STORE)
        widest = max((s.shape[1] for s in specs if len(s.shape) == 2 and 0 < s.bits < awq.BITS), default=0)
        if 0 < widest <= section.awq_columns:
            raise GolfError(
                f"quant.awq_columns={section.awq_columns} is no part of a matrix: of those with fewer than {awq.BITS} "
                f"bits the widest has {widest} columns; lower it, or set 0 for none"
            )
    if taken := sorted(own & set(section.grids)):
        raise GolfError(f"quant.grids.{taken[0]}: the file has a grid of its own by that name; use another one")


def _kept(name: str, weight: Tensor, dtype: str) -> StoredTensor:
    if dtype not in PLAIN_DTYPES:
        raise GolfError(f"tensor {name}: type {dtype} cannot be stored; known: {', '.join(PLAIN_DTYPES)}")
    values = weight.to(getattr(torch, dtype)).cpu().contiguous().numpy()
    stored = StoredTensor(TensorSpec(name, tuple(weight.shape), dtype), values)
    if dtype == "float16" and bool((torch.isfinite(weight) & (weight.abs() > _FLOAT16_MAX)).any()):
        peak = float(weight.abs().max())
        raise GolfError(f"tensor {name}: values up to {peak:g} do not fit float16; store it as float32")
    stored.check_finite()
    return stored


def _quantised(name: str, store: Store, codes: Tensor, scale: Tensor) -> StoredTensor:
    spec = store.spec(name, tuple(codes.shape))
    return StoredTensor(spec, codes.cpu().contiguous().numpy(), scale.cpu().contiguous().numpy())


def restore(tensors: Iterable[StoredTensor]) -> dict[str, Tensor]:
    """The state dict the artifact stands for: float32 (code times stored scale); non-float tensors as they were.

    Salient columns and low-rank corrections are put into their matrices. GolfError where they do not fit.
    """
    arrays = lqer.applied(awq.applied({t.name: t.dequantised() for t in tensors}))
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
