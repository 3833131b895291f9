"""What holds in a script made for one recipe: the recipe's values, and what a script never does."""

from __future__ import annotations

import dataclasses
from typing import Any

from paramgolf.pack.container import BYTE_CODECS
from paramgolf.recipe.sections import GridSection, Recipe
from paramgolf.script.source import Symbol
from paramgolf.script.values import PRESENT, Facts

ENTRY = "paramgolf.script.entry"
MAIN = Symbol(ENTRY, "main")

# A script never decodes token by token, writes no checkpoints and leaves signals to the system.
ABSENT = frozenset({
    Symbol("paramgolf.model.cache", "KVCache"), Symbol("paramgolf.model.cache", "LayerCache"),
    Symbol("paramgolf.train.checkpoint", "Store"), Symbol("paramgolf.train.checkpoint", "Snapshot"),
    Symbol("paramgolf.train.signals", "Interrupts"),
})  # fmt: skip
AVERAGE = Symbol("paramgolf.optim.averaging", "Average")
NO_OPS = frozenset({"Trainer.save", "Trainer._save_if_due", "_keep_freed_memory", "check_section", "check_switches"})
# Without stages every step has one shape.
UNSTAGED = frozenset({"Loader.set_shape", "TokenSource.set_shape", "StepTimer.reset"})
NEVER: dict[tuple[str, str], Any] = {("Interrupts", "pending"): 0, ("StepReport", "interrupted"): False}
# What asks more of the machine, the user or other packages than a script needs to; see the end of entry.py.
SUBSTITUTES = {
    Symbol(f"paramgolf.{module}", name): Symbol(ENTRY, own)
    for module, name, own in (
        ("train.runtime", "_default_threads", "default_threads"),
        ("train.clock", "Clock", "Stopwatch"),
        ("train.step", "raise_together", "raise_together"),
        ("dist", "init", "join"),
        ("model.parts.base", "read_config", "read_config"),
    )
}
GIVEN_TOKENIZER = {Symbol("paramgolf.data.tokenizer", "Tokenizer"): Symbol(ENTRY, "GivenTokenizer")}
UNCHANGED = Symbol(ENTRY, "unchanged")
# The environment sets these, or the machine does.
OPEN = frozenset({("TrainSection", "seed")})
# Where a check is about the numbers of the run, not about the recipe.
GUARDED = frozenset({"paramgolf.train.loop"})
# Quantisers that leave the clip of a grid as the recipe has it.
PLAIN_QUANTIZERS = ("rtn", "gptq")


def substitutes_of(recipe: Recipe, *, own_tokenizer: bool) -> dict[Symbol, Symbol]:
    """What stands for what in the script of a recipe."""
    chosen = dict(SUBSTITUTES) if own_tokenizer else SUBSTITUTES | GIVEN_TOKENIZER
    if not recipe.quant.awq_columns:
        chosen[Symbol("paramgolf.quant.awq", "applied")] = UNCHANGED
    if not recipe.quant.lqer_tensors:
        chosen[Symbol("paramgolf.quant.lqer", "applied")] = UNCHANGED
    if recipe.train.attention in ("auto", "sdpa") and not recipe.model.document_mask:
        chosen[Symbol("paramgolf.model.attention", "choose")] = Symbol(ENTRY, "choose")
    if not recipe.quant.qat and not recipe.model.loop_extra:
        chosen[Symbol("paramgolf.train.modes", "ModeSwitch")] = Symbol(ENTRY, "OneMode")
    return chosen


def used_grids(recipe: Recipe) -> dict[str, GridSection]:
    """The grids that some rule or QAT of the recipe names."""
    named = {rule.store for rule in recipe.quant.rules} | {recipe.quant.qat, recipe.quant.post_qat}
    used = {name: grid for name, grid in recipe.quant.grids.items() if name in named}
    return used if recipe.quant.rules else dict(recipe.quant.grids)


def facts_of(recipe: Recipe) -> Facts:
    values: dict[tuple[str, str], Any] = dict(NEVER)
    for section_field in dataclasses.fields(recipe):
        section = getattr(recipe, section_field.name)
        if dataclasses.is_dataclass(section):
            kind = type(section).__name__
            values |= {(kind, f.name): getattr(section, f.name) for f in dataclasses.fields(section)}
        else:
            values["Recipe", section_field.name] = section
    choices: dict[tuple[str, str], frozenset[Any]] = {}
    if not recipe.model.ln_scale:
        values["Block", "depth_scale"] = None
    if recipe.quant.method in PLAIN_QUANTIZERS:
        grids = list(used_grids(recipe).values())
        for grid_field in dataclasses.fields(GridSection):
            held = {getattr(grid, grid_field.name) for grid in grids}
            choices["GridSection", grid_field.name] = frozenset(held)
            if len(held) == 1:
                values["GridSection", grid_field.name] = held.pop()
    for key in OPEN:
        values.pop(key, None)
    absent = ABSENT | ({AVERAGE} if recipe.average.kind == "none" else set())
    libraries = {"ZSTD": "zstd", "BROTLI": "brotli"} if recipe.pack.codec in BYTE_CODECS else {}
    never = {Symbol("paramgolf.pack.bytecoding", n) for n, codec in libraries.items() if codec != recipe.pack.codec}
    if libraries:
        never.add(Symbol("paramgolf.pack.side", "_FLOATS"))
    no_ops = NO_OPS if recipe.stages else NO_OPS | UNSTAGED
    if recipe.average.kind == "none" and not recipe.quant.post_qat and not recipe.model.loop_extra:
        no_ops |= {"finish"}
    return Facts(
        values, frozenset({("Interrupts", "pending")}), choices, absent, no_ops, parameters_of(recipe),
        never=frozenset(never), guarded=GUARDED,
    )  # fmt: skip


def parameters_of(recipe: Recipe) -> dict[tuple[str, str, str], Any]:
    """What torch passes on to methods that are not called by name."""
    known: dict[tuple[str, str, str], Any] = {("paramgolf.model.gpt", "GPT.forward", "targets_BT"): PRESENT}
    if recipe.average.kind == "none" or recipe.average.select != "train":
        known["paramgolf.model.gpt", "GPT.forward", "reduction"] = "mean"
    if not recipe.model.document_mask:
        known["paramgolf.model.backends", "ScaledDotProduct.__call__", "mask"] = None
        known["paramgolf.model.gpt", "GPT.forward", "segments_BT"] = None
    return known


def registries_of(recipe: Recipe) -> dict[str, list[str]]:
    """The entries of each registry that the recipe can use."""
    attention = recipe.train.attention
    return {
        "ATTENTION_BACKENDS": ["sdpa"] if attention == "auto" else [attention],
        "ACTIVATIONS": [recipe.model.activation],
        "PARTS": list(recipe.model.parts),
        "MATRIX_OPTIMIZERS": [recipe.optim.matrix],
        "QUANTIZERS": [recipe.quant.method],
        "CODECS": [recipe.pack.codec],
    }
