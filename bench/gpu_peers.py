"""The public scripts of openai/parameter-golf as peers: where they are, how they are set, and what they read.

The scripts themselves never come with this project: their folder is given on the command line.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paramgolf.data.cache import cache_root
from paramgolf.data.dataset import prepare
from paramgolf.data.progress import ProgressReport
from paramgolf.data.tokenizer import Tokenizer
from paramgolf.errors import GolfError
from paramgolf.files import sha256_file
from paramgolf.recipe.load import load_recipe
from paramgolf.recipe.sections import DataSection

# How the file of a recipe's script may begin. Pull request 137 committed another script than the one it ran;
# recipe pr137-script is the committed one.
SCRIPTS = {
    "baseline": ("baseline", "train_gpt"),
    "pr107": ("pr107",),
    "pr114": ("pr114",),
    "pr128": ("pr128",),
    "pr137": ("pr137",),
    "pr137-script": ("pr137",),
    "record-1.0611": ("pr1855",),
    "frontier": ("pr1855",),
}
FINAL_BYTES = {"pr107": 64_517}  # the code size that the reported log states, where a pull request had several commits

_LONG = {"MLP_HIDDEN": "1536", "TRAIN_SEQ_LEN": "2048", "MATRIX_LR": "0.02", "SCALAR_LR": "0.02"}
_LONG |= {"TIED_EMBED_LR": "0.03", "MUON_MOMENTUM": "0.99", "MUON_MOMENTUM_WARMUP_START": "0.92"}
_LONG |= {"MUON_MOMENTUM_WARMUP_STEPS": "1500", "WARMDOWN_ITERS": "3000", "GRAD_CLIP_NORM": "0.3"}
# What each submission set on its command line; the others are their scripts' defaults.
REPORTED: dict[str, dict[str, str]] = {
    "pr107": {**_LONG, "MLP_HIDDEN": "1488", "QK_GAIN_INIT": "1.7", "EVAL_STRIDE": "64", "EVAL_BATCH_SEQS": "32"},
    "pr114": {**_LONG, "TRAIN_BATCH_TOKENS": "786432", "EVAL_SEQ_LEN": "2048", "EVAL_STRIDE": "256"},
}
REPORTED_SECONDS, REPORTED_GPUS = 600.0, 8
PATHS = ("DATA_PATH", "TOKENIZER_PATH")
# The command of #1855. Most of it has no recipe key by the same name: the recipes hold those values themselves, and
# are told only of the run (RUN_VARIABLES). `frontier` is measured against the same script.
RECORD_SCRIPT = {
    "CASEOPS_ENABLED": "1", "EMBED_BITS": "7", "MATRIX_LR": "0.026", "MIN_LR": "0.1", "MLP_CLIP_SIGMAS": "11.5",
    "ATTN_CLIP_SIGMAS": "13.0", "EMBED_CLIP_SIGMAS": "14.0", "GRAD_CLIP_NORM": "0.3", "WARMUP_STEPS": "20",
    "MUON_BACKEND_STEPS": "5", "WARMDOWN_FRAC": "0.85", "BETA2": "0.99", "PHASED_TTT_ENABLED": "1",
    "PHASED_TTT_PREFIX_DOCS": "2500", "PHASED_TTT_NUM_PHASES": "3", "GLOBAL_TTT_MOMENTUM": "0.9",
    "TTT_CHUNK_SIZE": "48", "TTT_BETA2": "0.99", "TTT_WEIGHT_DECAY": "0.5", "TTT_LORA_RANK": "80",
    "SPARSE_ATTN_GATE_ENABLED": "1", "SPARSE_ATTN_GATE_SCALE": "0.5", "GATED_ATTN_QUANT_GATE": "1",
    "SMEAR_GATE_ENABLED": "1", "GATE_WINDOW": "12", "LQER_ENABLED": "1", "LQER_ASYM_ENABLED": "1", "LQER_RANK": "4",
    "LQER_FACTOR_BITS": "4", "LQER_ASYM_GROUP": "64", "LQER_TOP_K": "3", "FUSED_CE_ENABLED": "1",
    "GPTQ_RESERVE_SECONDS": "0.5", "GPTQ_CALIBRATION_BATCHES": "16",
}  # fmt: skip
RECORDS = ("record-1.0611", "frontier")
RUN_VARIABLES = {
    *PATHS, "VOCAB_SIZE", "SEED", "ITERATIONS", "MAX_WALLCLOCK_SECONDS", "TRAIN_LOG_EVERY", "VAL_LOSS_EVERY", "RUN_ID",
}  # fmt: skip


def find_script(folder: Path, recipe: str) -> Path:
    """The script of `recipe` in `folder`: NAME.py, NAME-anything.py or NAME-anything/train_gpt.py."""
    if recipe not in SCRIPTS:
        raise GolfError(f"recipe '{recipe}' has no public script; with one: {', '.join(SCRIPTS)}")
    names = SCRIPTS[recipe]
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    own = [e for e in entries if any(e.stem == n or e.name.startswith((f"{n}-", f"{n}_")) for n in names)]
    found = [e for e in own if e.suffix == ".py" and e.is_file()]
    found += [e / "train_gpt.py" for e in own if (e / "train_gpt.py").is_file()]
    if len(found) > 1 and recipe in FINAL_BYTES:
        found = [f for f in found if f.stat().st_size == FINAL_BYTES[recipe]] or found
    if len(found) != 1:
        seen = ", ".join(f.name for f in found) or "none"
        raise GolfError(f"{folder}: one script called {names[0]}*.py is needed for '{recipe}', found {seen}")
    return found[0]


def decay_steps(recipe: str, seconds: float, gpus: int = 1) -> int:
    """Steps of the final decay that are the same part of this shorter run as of the reported one."""
    steps = load_recipe(recipe).schedule.warmdown_iters
    return max(1, round(steps * seconds * gpus / (REPORTED_SECONDS * REPORTED_GPUS)))


def variables(
    recipe: str, data: Path, *, seconds: float, seed: int, log_every: int, steps: int = 0, ttt: bool = False
) -> dict[str, str]:
    """The environment variables that set a public script to the reported run, shortened to `seconds` on one GPU.

    The recipe gets the same through `recipe.fromenv` (of a record `our_variables`), so that each change is stated once.

    Args:
        steps: so many steps instead, the rates falling by steps too; of records only. ttt: score with test-time
            training as well; of records only.
    """
    model = tokenizer_of(data)
    named = {
        **REPORTED.get(recipe, {}),
        "DATA_PATH": str(data),
        "TOKENIZER_PATH": str(model),
        "VOCAB_SIZE": str(Tokenizer.load(model).vocab_size),
        "MAX_WALLCLOCK_SECONDS": str(seconds),
        "SEED": str(seed),
        "TRAIN_LOG_EVERY": str(log_every),
        "VAL_LOSS_EVERY": "0",  # once, after the last step
        "RUN_ID": "bench",
    }
    if recipe in RECORDS:
        packer = "pergroup" if shutil.which("lrzip") else "brotli"  # the record's own needs that program
        named |= RECORD_SCRIPT | {"COMPRESSOR": packer, "TTT_ENABLED": str(int(ttt))}
        return named | ({"ITERATIONS": str(steps), "MAX_WALLCLOCK_SECONDS": "0"} if steps else {})
    if steps or ttt:
        raise GolfError(f"--steps and --ttt are for {' and '.join(RECORDS)}; '{recipe}' decays by its clock")
    named["WARMDOWN_ITERS"] = str(decay_steps(recipe, seconds))
    post = load_recipe(recipe).quant
    if post.post_qat:
        named["POST_QAT_SECONDS"] = str(post.post_qat_frac * seconds)
    return named


def our_variables(recipe: str, env: Mapping[str, str]) -> dict[str, str]:
    """Those of them that the recipe is told of."""
    return {key: value for key, value in env.items() if recipe not in RECORDS or key in RUN_VARIABLES}


def our_overrides(recipe: str, *, ttt: bool = False) -> list[str]:
    """What of a record's recipe is not as its script has it: there the clock starts after compilation and stops before
    calibration, and scores that learn are left out unless asked for."""
    if recipe not in RECORDS:
        return []
    rules = ["budget.clock=challenge", "budget.count_packing=false"]
    return rules if ttt else [*rules, "ttt.kind=none", "tilt.orders=[]"]


def tokenizer_of(data: Path) -> Path:
    """The one tokenizer that lies with the shards."""
    models = sorted(data.glob("*.model"))
    if len(models) != 1:
        raise GolfError(f"{data}: {len(models)} .model files, one is needed beside the shards; make them with --text")
    return models[0]


def make_shards(text: str, tokenizer: Path, folder: Path, *, val: str = "", val_bytes: int = 1_000_000) -> Path:
    """Tokenise `text` into `folder` as the scripts expect it: fineweb_train_*.bin, fineweb_val_*.bin, the tokenizer.

    Shards alone, without the documents: then our score counts bytes by the tokenizer's table, as the scripts do; of a
    CaseOps tokenizer by the sidecar fineweb_val_bytes_*.bin.
    """
    vocab_size = Tokenizer.load(tokenizer).vocab_size
    section = DataSection(train=text, val=val, tokenizer=str(tokenizer), vocab_size=vocab_size, val_max_bytes=val_bytes)
    with ProgressReport() as progress:
        dataset = prepare(section, cache=cache_root(), progress=progress)
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("fineweb_*.bin"), *folder.glob("*.model")]:
        old.unlink()
    kinds = {"train": dataset.train_shards, "val": dataset.val_shards, "val_bytes": dataset.val_sizes}
    for kind, shards in kinds.items():
        for number, shard in enumerate(shards):
            _link(shard, folder / f"fineweb_{kind}_{number:06d}.bin")
    shutil.copyfile(tokenizer, folder / tokenizer.name)
    return folder


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def data_facts(data: Path) -> dict[str, Any]:
    """What both sides read: names, sizes and hashes."""
    files = [*sorted(data.glob("fineweb_*.bin")), tokenizer_of(data)]
    if not any(f.name.startswith("fineweb_train_") for f in files) or not any("_val_" in f.name for f in files):
        raise GolfError(f"{data}: no fineweb_train_*.bin and fineweb_val_*.bin; make them with --text")
    return {f.name: {"bytes": f.stat().st_size, "sha256": sha256_file(f)} for f in files}
