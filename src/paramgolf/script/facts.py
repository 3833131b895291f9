"""What holds in a script made for one recipe: the recipe's values, and what a script never does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from paramgolf.pack.container import BYTE_CODECS
from paramgolf.recipe.sections import GridSection, Recipe
from paramgolf.script.rules import NAMED_GRIDS, store_function
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
PROCESS, TRAIN, PACK, SCORE, MODEL = (
    f"paramgolf.script.plain.{name}" for name in ("process", "train", "pack", "score", "model")
)
# What asks more of the machine, the user or other packages than a script needs to.
SUBSTITUTES = {
    Symbol(f"paramgolf.{module}", name): Symbol(PROCESS, own)
    for module, name, own in (
        ("train.runtime", "_default_threads", "default_threads"),
        ("train.clock", "Clock", "Stopwatch"),
        ("train.step", "raise_together", "raise_together"),
        ("data.shards", "open_shard", "open_shard"),
        ("dist", "init", "join"),
        ("model.parts.base", "read_config", "read_config"),
    )
}
GIVEN_TOKENIZER = {Symbol("paramgolf.data.tokenizer", "Tokenizer"): Symbol(PROCESS, "GivenTokenizer")}
UNCHANGED = Symbol(PROCESS, "unchanged")
# The environment sets these, or the machine does.
OPEN = frozenset({("TrainSection", "seed")})
# Where a check is about the numbers of the run, not about the recipe.
GUARDED = frozenset({"paramgolf.train.loop"})
# Quantisers that leave the clip of a grid as the recipe has it.
PLAIN_QUANTIZERS = ("rtn", "gptq")
# Parts of the model that have no share in the layers' attention.
WHOLE_ROW_PARTS = frozenset({"bigram_hash", "smear_gate", "smear_gate2"})


def substitutes_of(recipe: Recipe, *, own_tokenizer: bool) -> dict[Symbol, Symbol]:
    """What stands for what in the script of a recipe."""
    chosen = dict(SUBSTITUTES) if own_tokenizer else SUBSTITUTES | GIVEN_TOKENIZER
    if not recipe.quant.awq_columns:
        chosen[Symbol("paramgolf.quant.awq", "applied")] = UNCHANGED
    if not recipe.quant.lqer_tensors:
        chosen[Symbol("paramgolf.quant.lqer", "applied")] = UNCHANGED
    if has_plain_attention(recipe):
        chosen[Symbol("paramgolf.model.attention", "Attention")] = Symbol(MODEL, "Attention")
    elif recipe.train.attention in ("auto", "sdpa") and not recipe.model.document_mask:
        chosen[Symbol("paramgolf.model.attention", "choose")] = Symbol(PROCESS, "choose")
    if not recipe.quant.qat and not recipe.model.loop_extra:
        chosen[Symbol("paramgolf.train.modes", "ModeSwitch")] = Symbol(PROCESS, "OneMode")
    if is_plainly_trained(recipe):
        chosen[Symbol(ENTRY, "train_model")] = Symbol(TRAIN, "train_model")
    if is_plainly_packed(recipe):
        chosen |= {Symbol(ENTRY, name): Symbol(PACK, name) for name in ("pack", "unpack")}
    if is_plainly_scored(recipe):
        chosen[Symbol(ENTRY, "measure")] = Symbol(SCORE, "measure")
        chosen[Symbol("paramgolf.score.scorer", "Score")] = Symbol(SCORE, "Result")
    return chosen


def has_plain_attention(recipe: Recipe) -> bool:
    """Whether the attention of all layers is PyTorch's causal kernel over whole rows (see plain/model.py)."""
    plain = recipe.train.attention in ("auto", "sdpa") and not recipe.model.document_mask
    return plain and WHOLE_ROW_PARTS.issuperset(recipe.model.parts)


def is_plainly_trained(recipe: Recipe) -> bool:
    """Whether every step has one shape and one mode, and the data one order of rows (see plain/train.py)."""
    quant, model = recipe.quant, recipe.model
    changing = recipe.stages or model.loop_extra or (quant.qat and quant.qat_start)
    other = model.document_mask or recipe.data.order != "sequential" or recipe.optim.exchange != "all_reduce"
    return not changing and not other and bool(quant.rules)


def is_plainly_packed(recipe: Recipe) -> bool:
    """Whether weights are rounded to nearest on the grids of rules and coded by a byte compressor (plain/pack.py)."""
    quant, codec = recipe.quant, recipe.pack.codec
    more = quant.method != "rtn" or quant.coarse_fraction or quant.awq_columns or quant.lqer_tensors
    scored = recipe.ttt.kind != "none" or recipe.tilt.orders or recipe.ngram.levels  # the artifact would say so
    coded = codec in BYTE_CODECS - {"brotli"} and recipe.pack.level == -1
    return not more and not scored and coded and any(rule.store in quant.grids for rule in quant.rules)


def is_plainly_scored(recipe: Recipe) -> bool:
    """Whether one lane of exact windows is scored in whatever time it takes (plain/score.py)."""
    return recipe.score.windows == "exact" and recipe.score.lanes == 1 and not recipe.budget.eval_seconds


def written_of(recipe: Recipe) -> dict[Symbol, str]:
    """The functions that are not taken from a module but made for the recipe; `rules.IMPORTS` are theirs."""
    if not recipe.quant.rules:
        return {}
    written = {Symbol(PACK, "store_of"): store_function(recipe)}
    if used_grids(recipe).keys() <= {rule.store for rule in recipe.quant.rules}:
        written[Symbol(PACK, "named_grids")] = NAMED_GRIDS
    return written


def used_grids(recipe: Recipe) -> dict[str, GridSection]:
    """The grids that some rule or QAT of the recipe names."""
    named = {rule.store for rule in recipe.quant.rules} | {recipe.quant.qat, recipe.quant.post_qat}
    used = {name: grid for name, grid in recipe.quant.grids.items() if name in named}
    return used if recipe.quant.rules else dict(recipe.quant.grids)


def facts_of(recipe: Recipe) -> Facts:
    """What the recipe settles before any code is read: values, functions replaced or never called."""
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
    if recipe.average.kind != "none":
        values |= {("Trainer", "average"): PRESENT, ("Parts", "average"): PRESENT}
    tables: list[tuple[str, Iterable[object]]] = [("RuleSection", recipe.quant.rules)]
    if recipe.quant.method in PLAIN_QUANTIZERS:
        tables.append(("GridSection", used_grids(recipe).values()))
    for kind, rows in tables:
        found = choices_of(kind, list(rows))
        choices |= found
        values |= {key: next(iter(held)) for key, held in found.items() if len(held) == 1}
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
    if has_plain_attention(recipe):
        no_ops |= {"GPT.use_attention", "GPT._ready_attention"}
    return Facts(
        values, frozenset({("Interrupts", "pending")}), choices, absent, no_ops, parameters_of(recipe),
        never=frozenset(never), guarded=GUARDED,
    )  # fmt: skip


def choices_of(kind: str, rows: Sequence[Any]) -> dict[tuple[str, str], frozenset[Any]]:
    """The values that each field has in some row or other."""
    names = [f.name for f in dataclasses.fields(rows[0])] if rows else []
    return {(kind, name): frozenset(getattr(row, name) for row in rows) for name in names}


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
