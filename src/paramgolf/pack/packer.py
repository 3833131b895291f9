"""From a trained model to `model.golf` and back: quantise, code, check against the byte cap, write; read, rebuild."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from paramgolf.errors import GolfError
from paramgolf.files import atomic_write
from paramgolf.model.gpt import GPT
from paramgolf.pack.container import Artifact, encode_artifact, read_artifact
from paramgolf.pack.curves import Group, Loss, measure
from paramgolf.pack.ledger import Ledger, attribute
from paramgolf.pack.solver import LOWEST, Fit, solve
from paramgolf.pack.stored import StoredTensor
from paramgolf.quant.export import export, restore
from paramgolf.quant.sensitivity import mixed
from paramgolf.recipe.sections import ModelSection, QuantSection, Recipe

FORMAT = "paramgolf"
_MODEL: TypeAdapter[ModelSection] = TypeAdapter(ModelSection)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LoadedArtifact(NamedTuple):
    """`manifest` (plain data), `state` float32 state dict, `tokenizer` compact bytes, `extra` other sections."""

    manifest: dict[str, Any]
    state: dict[str, Tensor]
    tokenizer: bytes
    extra: dict[str, bytes]


class LoadedModel(NamedTuple):
    """`model` in evaluation mode with the artifact's weights; the rest as in `LoadedArtifact`."""

    model: GPT
    manifest: dict[str, Any]
    tokenizer: bytes


def manifest_of(recipe: Recipe, vocab_size: int, dtype: str = "") -> dict[str, Any]:
    """What the artifact says of the model and of how it is meant to be scored. No time, path or host name.

    `dtype`: the type of activations it was trained in, where `recipe.train.dtype` left that to the machine.
    """
    used = {rule.store for rule in recipe.quant.rules} or set(recipe.quant.grids)
    return {
        "format": FORMAT,
        "name": recipe.name,
        "vocab_size": vocab_size,
        "model": dataclasses.asdict(recipe.model),
        "score": {
            "seq_len": recipe.score.seq_len or recipe.train.seq_len,
            "train_seq_len": recipe.train.seq_len,
            "stride": recipe.score.stride,
            "dtype": dtype or recipe.train.dtype,
            **({"lanes": recipe.score.lanes} if recipe.score.lanes > 1 else {}),
        },
        "tokenizer": "compact",
        "grids": {name: dataclasses.asdict(grid) for name, grid in recipe.quant.grids.items() if name in used},
    }


def pack_model(
    state: Mapping[str, Tensor],
    recipe: Recipe,
    tokenizer_compact: bytes,
    path: str | Path,
    vocab_size: int,
    extra: Mapping[str, bytes] | None = None,
    *,
    code_bytes: int = 0,
    dtype: str = "",
    hessians: Mapping[str, Tensor] | None = None,
    loss: Loss | None = None,
    groups: Sequence[Group] | None = None,
) -> Ledger:
    """Quantise a state dict by the recipe's rules, code it and write the artifact whole or not at all.

    With `pack.fit` bits and clips are solved for, so that the file fills `budget.bytes`; the ledger says how.

    Args:
        tokenizer_compact: the tokenizer's bytes for the file (`Tokenizer.compact()`).
        extra: other named sections.
        code_bytes: size of the code that `pack.count = "challenge"` counts beside the file.
        dtype: see `manifest_of`.
        hessians: second moments of layer inputs by tensor name, for quantisers that use them and for `pack.fit`.
        loss: of a state dict, in nats on training text; `pack.fit` measures with it what errors cost, and at the end
            what the whole plan costs.
        groups: curves of the same state dict measured before (`curves.measure`), for `pack.fit`.

    Returns the ledger, cap and counting rule included. Raises GolfError when the result is over `budget.bytes`; then
    nothing is written.
    """

    quant = mixed(recipe.quant, state, recipe.model.num_layers, hessians)
    recipe = dataclasses.replace(recipe, quant=quant)

    def made(quant: QuantSection, clips: Mapping[str, float] | None, codec: str) -> _Made:
        tensors = export(state, quant, recipe.model.num_layers, hessians, clips)
        manifest = manifest_of(dataclasses.replace(recipe, quant=quant), vocab_size, dtype)
        manifest |= {"fit": True} if clips else {}
        artifact = Artifact(manifest, tensors, tokenizer_compact, dict(extra or {}))
        encoded = encode_artifact(artifact, codec, recipe.pack.level)
        ledger = dataclasses.replace(
            attribute(encoded.parts, tensors),
            code_bytes=code_bytes,
            count=recipe.pack.count,
            cap_bytes=recipe.budget.bytes,
            codec=encoded.codec,
        )
        return _Made(encoded.data, ledger, tensors)

    if not recipe.pack.fit:
        done, facts = made(recipe.quant, None, recipe.pack.codec), {}
    else:
        groups = measure(state, recipe, hessians or {}, loss) if groups is None else groups
        fit, done = _filled(groups, recipe, made)
        facts = fit.facts()
        if loss is not None:
            facts["measured_loss"] = loss(restore(done.tensors)) - loss(state)
    check_cap(done.ledger)
    atomic_write(path, done.data)
    return dataclasses.replace(done.ledger, fit=facts)


class _Made(NamedTuple):
    """A whole artifact in memory."""

    data: bytes
    ledger: Ledger
    tensors: list[StoredTensor]


def _filled(
    groups: Sequence[Group], recipe: Recipe, made: Callable[[QuantSection, Mapping[str, float] | None, str], _Made]
) -> tuple[Fit, _Made]:  # fmt: skip
    """The plan that fills the cap, and its file.

    The byte coders take minutes where rans takes a second, so with `auto` the sizes of rans are searched; where another
    codec then turns out so much smaller that there is room left, it is filled for that one.
    """
    tried = [codec := "rans" if recipe.pack.codec == "auto" else recipe.pack.codec]
    while True:
        fit = solve(groups, recipe, lambda quant, clips, codec=codec: made(quant, clips, codec).ledger.counted_bytes)
        done = made(fit.quant, fit.clips, recipe.pack.codec)
        codec = done.ledger.codec
        if codec in tried or done.ledger.counted_bytes >= LOWEST * recipe.budget.bytes:
            return fit, done
        tried.append(codec)


def check_cap(ledger: Ledger) -> None:
    """GolfError naming the largest groups and the smallest cap that would do, when the ledger is over its cap."""
    if not ledger.cap_bytes or ledger.counted_bytes <= ledger.cap_bytes:
        return
    largest = sorted(ledger.groups.items(), key=lambda item: -item[1])[:4]
    held = ", ".join(f"{name} {size:,}" for name, size in largest)
    code = f" and {ledger.code_bytes:,} of code" if ledger.count == "challenge" and ledger.code_bytes else ""
    raise GolfError(
        f"the artifact needs {ledger.counted_bytes:,} bytes, {ledger.counted_bytes - ledger.cap_bytes:,} over the cap "
        f"budget.bytes={ledger.cap_bytes}; largest: {held}{code}; shrink the model or a grid's clip, or set "
        f"budget.bytes={ledger.counted_bytes}"
    )


def load_artifact(path: str | Path) -> LoadedArtifact:
    """The verified contents of an artifact with the weights as a float32 state dict; no model is built."""
    artifact = read_artifact(path)
    manifest = dict(artifact.manifest)
    if manifest.get("format") != FORMAT or type(manifest.get("vocab_size")) is not int:
        raise GolfError(f"{path}: its manifest does not describe a language model; give a file that `golf run` wrote")
    return LoadedArtifact(manifest, restore(artifact.tensors), artifact.tokenizer, dict(artifact.extra))


def load_model(path: str | Path, device: torch.device | str = "cpu") -> LoadedModel:
    """The artifact's model, ready to score on `device`.

    Its compute type is that of the manifest where it names one, and `context_len` the training length. Raises GolfError
    when configuration and weights do not belong together.
    """
    loaded = load_artifact(path)
    section = _model_section(loaded.manifest, len(loaded.state), path)
    vocab_size = loaded.manifest["vocab_size"]
    if not 1 <= vocab_size <= 65_535:
        raise GolfError(f"{path}: vocab_size {vocab_size} is not between 1 and 65535; get the file again")
    with torch.device("meta"):  # costs nothing, whatever sizes a hostile manifest claims
        shapes = {name: tuple(t.shape) for name, t in GPT(section, vocab_size).state_dict().items()}
    if shapes != {name: tuple(t.shape) for name, t in loaded.state.items()}:
        raise GolfError(f"{path}: its tensors do not fit its model configuration; get the file again")
    model = GPT(section, vocab_size)
    model.load_state_dict(loaded.state)
    score = loaded.manifest.get("score")
    score = score if isinstance(score, dict) else {}
    model.compute_dtype = _DTYPES.get(str(score.get("dtype")), model.compute_dtype)
    train_seq_len = score.get("train_seq_len")
    model.context_len = train_seq_len if type(train_seq_len) is int and 0 <= train_seq_len <= 1 << 20 else 0
    return LoadedModel(model.to(device).eval(), loaded.manifest, loaded.tokenizer)


def unpack_model(path: str | Path, device: torch.device | str = "cpu") -> GPT:
    """Only the model of `load_model`."""
    return load_model(path, device).model


def _model_section(manifest: Mapping[str, Any], tensors: int, path: str | Path) -> ModelSection:
    """The typed model section of a manifest. GolfError unless it is one whose layers can all be in the file."""
    try:
        section = _MODEL.validate_python(manifest.get("model"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"])
        raise GolfError(f"{path}: model configuration, {place}: {first['msg']}; update paramgolf") from None
    if section.num_layers > tensors:
        raise GolfError(f"{path}: {section.num_layers} layers in {tensors} tensors; get the file again")
    return section
