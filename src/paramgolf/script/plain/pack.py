"""The artifact of a recipe that rounds to nearest and names a byte compressor: the file of pack/container.py, written
and read by who knows the recipe. Nothing is checked on reading: the file was written a moment before."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paramgolf.data.tokenizer import Tokenizer
from paramgolf.dist import Dist
from paramgolf.model.gpt import GPT
from paramgolf.pack.bytecoding import STANDARD
from paramgolf.pack.codecs.base import role
from paramgolf.pack.manifest import encode_manifest
from paramgolf.pack.wire import varint
from paramgolf.quant.grid import Grid
from paramgolf.quant.plan import fits
from paramgolf.recipe.sections import GridSection, Recipe
from paramgolf.script.plain.streams import (
    Array,
    coders_of,
    decode_arrays,
    decode_codes,
    encode_arrays,
    encode_codes,
    read_varint,
)

LAYER = re.compile(r"^blocks\.(\d+)\.")


@dataclass(frozen=True)
class Slot:
    """One tensor of the file. `grid` is None for what is kept in the type `store`."""

    name: str
    shape: tuple[int, ...]
    store: str
    grid: GridSection | None


def store_of(name: str, shape: tuple[int, ...], recipe: Recipe) -> str:
    """How a tensor is stored: by the first rule that fits. In a script the rules are written out (see rules.py)."""
    return next(r.store for r in recipe.quant.rules if fits(r, name, shape, recipe.model.num_layers))


def named_grids(recipe: Recipe) -> Mapping[str, GridSection]:
    """The grids that rules name."""
    stores = {rule.store for rule in recipe.quant.rules}
    return {name: grid for name, grid in recipe.quant.grids.items() if name in stores}


def layer_of(name: str) -> int:
    """Of a tensor of a block; -1 of any other."""
    found = LAYER.match(name)
    return int(found[1]) if found else -1


def slots_of(tensors: Mapping[str, Tensor], recipe: Recipe) -> list[Slot]:
    """In the order of the file: all layers of a tensor together, first appearance first."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    stores = {name: store_of(name, shape, recipe) for name, shape in shapes.items()}
    roles = list(dict.fromkeys(role(name) for name in shapes))
    names = sorted(shapes, key=lambda name: roles.index(role(name)))
    return [Slot(name, shapes[name], stores[name], recipe.quant.grids.get(stores[name])) for name in names]


def is_packed(slot: Slot) -> bool:
    """Whether four codes lie in three bytes."""
    return slot.grid is not None and slot.grid.packed and len(slot.shape) > 1


def groups_of(coded: Sequence[Slot]) -> list[list[Slot]]:
    """The tensors of each stream of codes: all layers of one kind."""
    groups: dict[tuple[str, bool], list[Slot]] = {}
    for slot in coded:
        groups.setdefault((role(slot.name), is_packed(slot)), []).append(slot)
    return list(groups.values())


def weight_grids(model: torch.nn.Module, recipe: Recipe, choice: str) -> dict[str, Grid]:
    """The grid of every weight that the file quantises: its own ("export"), or one for all by name."""
    grids = {name: Grid(section) for name, section in recipe.quant.grids.items()}  # one object for all it is used on
    slots = slots_of(dict(model.named_parameters()), recipe)
    return {s.name: grids[s.store if choice == "export" else choice] for s in slots if s.grid is not None}


def pack(
    model: GPT, shards: list[np.ndarray], recipe: Recipe, tokenizer: Tokenizer, dtype: str, dist: Dist, path: Path
) -> int:
    """Quantise, code and write the artifact on the main rank; its bytes as the challenge counts them: no tokenizer."""
    if not dist.is_main:
        return 0
    vocabulary = tokenizer.compact()
    data = encode(model.state_dict(), recipe, manifest_of(recipe, tokenizer.vocab_size, dtype), vocabulary)
    path.write_bytes(data)
    return len(data) - len(vocabulary)


def manifest_of(recipe: Recipe, vocab_size: int, dtype: str) -> dict[str, Any]:
    """What the artifact says of the model and of how it is meant to be scored (see pack/packer.py)."""
    score, train = recipe.score, recipe.train
    scoring = {"seq_len": score.seq_len or train.seq_len, "train_seq_len": train.seq_len, "stride": score.stride}
    grids = {name: dataclasses.asdict(grid) for name, grid in named_grids(recipe).items()}
    return {
        "format": "paramgolf", "name": recipe.name, "vocab_size": vocab_size, "model": dataclasses.asdict(recipe.model),
        "score": {**scoring, "dtype": dtype}, "tokenizer": "compact", "grids": grids,
    }  # fmt: skip


def encode(state: Mapping[str, Tensor], recipe: Recipe, manifest: dict[str, Any], vocabulary: bytes) -> bytes:
    """The whole file."""
    grids = {name: Grid(section) for name, section in recipe.quant.grids.items()}
    slots = slots_of(state, recipe)
    coded, kept = [s for s in slots if s.grid is not None], [s for s in slots if s.grid is None]
    pairs = [grids[s.store].quantize(state[s.name].float()) for s in coded]
    codes = {s.name: codes.cpu().numpy() for s, (codes, _) in zip(coded, pairs, strict=True)}
    plain = [state[s.name].float().to(getattr(torch, s.store)).cpu().numpy() for s in kept]
    own_coders = coders_of(recipe.pack.codec)
    coders = tuple(dict.fromkeys((*STANDARD, *own_coders)))
    sections = [
        b"".join(
            encode_codes([codes[s.name] for s in group], is_packed(group[0]), own_coders) for group in groups_of(coded)
        ),
        encode_arrays([scale.cpu().numpy() for _, scale in pairs], coders),
        encode_arrays(plain, coders),
        vocabulary,
    ]
    codec = recipe.pack.codec if coded else "raw"
    own = {"codec": codec, "extra": [], "stores": table_of_stores(coded), "tensors": table_of_tensors(slots)}
    head = b"GOLF\1" + encode_manifest({**manifest, **own}) + b"".join(varint(len(body)) for body in sections)
    data = head + b"".join(sections)
    return data + hashlib.blake2b(data, digest_size=16).digest()


def unpack(path: Path, recipe: Recipe, vocab_size: int) -> GPT:
    """The model that a file of this recipe holds."""
    model = GPT(recipe.model, vocab_size)
    slots, stream = slots_of(model.state_dict(), recipe), io.BytesIO(path.read_bytes()[len(b"GOLF\1") :])
    read_varint(stream)
    stream.read(read_varint(stream))  # the manifest says what the recipe does
    lengths = [read_varint(stream) for _ in range(4)]
    codes, scales, plain = (io.BytesIO(stream.read(length)) for length in lengths[:3])
    coded, kept = [s for s in slots if s.grid is not None], [s for s in slots if s.grid is None]
    found = decode_arrays(plain, [(s.store, s.shape) for s in kept])
    state = {s.name: array.astype(np.float32) for s, array in zip(kept, found, strict=True)}
    steps = dict(zip(coded, decode_arrays(scales, [_scales(s) for s in coded]), strict=True))
    for group in groups_of(coded):
        arrays = decode_codes(codes, [slot.shape for slot in group], is_packed(group[0]))
        for slot, array in zip(group, arrays, strict=True):
            state[slot.name] = array.astype(np.float32) * steps[slot].astype(np.float32)[..., None]
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    return model


def _scales(slot: Slot) -> Array:
    """Every row along the last axis has a scale."""
    assert slot.grid is not None
    return slot.grid.scale_dtype, slot.shape[:-1]


def table_of_stores(coded: Sequence[Slot]) -> dict[str, list[Any]]:
    """What a reader must know of each grid: bits, type of its scales, whether matrices on it are packed."""
    table: dict[str, list[Any]] = {}
    for slot in coded:
        assert slot.grid is not None
        row = table.setdefault(slot.store, [slot.grid.bits, slot.grid.scale_dtype, False])
        row[2] = row[2] or is_packed(slot)
    return table


def table_of_tensors(slots: Sequence[Slot]) -> list[list[Any]]:
    """[name, shape, store] of every tensor; alike layers are one row with the first and the last."""
    rows: list[list[Any]] = []
    for slot in slots:
        layer, shape = layer_of(slot.name), list(slot.shape)
        row = [f"blocks.#.{role(slot.name)}" if layer >= 0 else slot.name, shape, slot.store]
        if layer < 0:
            rows.append(row)
        elif rows and rows[-1][:3] == row and rows[-1][4] == layer - 1:
            rows[-1][4] = layer
        else:
            rows.append([*row, layer, layer])
    return rows
