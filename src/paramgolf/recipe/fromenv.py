"""An official command line (`MLP_HIDDEN=1488 EVAL_STRIDE=64 ... train_gpt.py`) as recipe overrides.

The public scripts are configured by environment variables; these are the ones whose meaning a recipe has.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Mapping

from paramgolf.errors import GolfError
from paramgolf.registry import close_match

VARIABLES = {
    "DATA_PATH": "data.train",
    "TOKENIZER_PATH": "data.tokenizer",
    "VOCAB_SIZE": "data.vocab_size",
    "SEED": "train.seed",
    "ITERATIONS": "budget.steps",
    "MAX_WALLCLOCK_SECONDS": "budget.seconds",
    "WARMUP_STEPS": "schedule.warmup_steps",
    "WARMDOWN_ITERS": "schedule.warmdown_iters",
    "WARMDOWN_FRAC": "schedule.warmdown_frac",
    "MIN_LR": "schedule.min_lr",
    "TRAIN_BATCH_TOKENS": "train.batch_tokens",
    "TRAIN_SEQ_LEN": "train.seq_len",
    "TRAIN_LOG_EVERY": "train.log_every",
    "EVAL_SEQ_LEN": "score.seq_len",
    "EVAL_STRIDE": "score.stride",
    "NUM_LAYERS": "model.num_layers",
    "MODEL_DIM": "model.dim",
    "NUM_HEADS": "model.num_heads",
    "NUM_KV_HEADS": "model.num_kv_heads",
    "MLP_HIDDEN": "model.mlp_hidden",
    "TIED_EMBED_INIT_STD": "model.embed_init_std",
    "ROPE_BASE": "model.rope_base",
    "LOGIT_SOFTCAP": "model.logit_softcap",
    "QK_GAIN_INIT": "model.qk_gain",
    "MATRIX_LR": "optim.matrix_lr",
    "SCALAR_LR": "optim.scalar_lr",
    "TIED_EMBED_LR": "optim.embed_lr",
    "HEAD_LR": "optim.head_lr",
    "BETA1": "optim.beta1",
    "BETA2": "optim.beta2",
    "ADAM_EPS": "optim.adam_eps",
    "MUON_MOMENTUM": "optim.momentum",
    "MUON_BACKEND_STEPS": "optim.ns_steps",
    "MUON_WD": "optim.weight_decay",
    "WEIGHT_DECAY": "optim.weight_decay",
    "GRAD_CLIP_NORM": "optim.grad_clip",
    "MUON_MOMENTUM_WARMUP_START": "schedule.momentum_warmup_start",
    "MUON_MOMENTUM_WARMUP_STEPS": "schedule.momentum_warmup_steps",
    "MUON_WEIGHT_DECAY": "optim.weight_decay",
    "MUON_WARMUP_FRAC": "schedule.momentum_warmup_frac",
    "QAT_START_FRAC": "quant.qat_start",
    "POST_QAT_LR": "quant.post_qat_lr",
    "SERIAL_COMPRESSOR": "pack.codec",
    "BIGRAM_VOCAB_SIZE": "model.parts.bigram_hash.buckets",
    "BIGRAM_DIM": "model.parts.bigram_hash.dim",
    "EMA_DECAY": "average.decay",
    "SWA_EVERY": "average.every",
}


def _flag(value: str) -> bool:
    return value not in ("0", "", "false", "False")


def _number(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise GolfError(f"--from-env: {name}={value} is not a number")
    return number


def _mlp_mult(value: str, pairs: Mapping[str, str]) -> str:
    dim = _number("MODEL_DIM", pairs.get("MODEL_DIM", "512"))
    return f"model.mlp_hidden={int(_number('MLP_MULT', value) * dim)}"


def _post_qat_seconds(value: str, pairs: Mapping[str, str]) -> str:
    total = _number("MAX_WALLCLOCK_SECONDS", pairs.get("MAX_WALLCLOCK_SECONDS", "600"))
    if total <= 0:
        raise GolfError("--from-env: POST_QAT_SECONDS is a part of MAX_WALLCLOCK_SECONDS; give that too")
    return f"quant.post_qat_frac={_number('POST_QAT_SECONDS', value) / total}"


def _qat(value: str, pairs: Mapping[str, str]) -> str:
    return f"quant.qat={'export' if _flag(value) else ''}"


# Variables whose value means something else in a recipe: (value, all variables) -> override.
DERIVED: dict[str, Callable[[str, Mapping[str, str]], str]] = {
    "MLP_MULT": _mlp_mult,
    "POST_QAT_SECONDS": _post_qat_seconds,
    "QAT": _qat,
    "ENABLE_QAT": _qat,
    "TIE_EMBEDDINGS": lambda value, _: f"model.tie_embeddings={'true' if _flag(value) else 'false'}",
}
# Variables that say where to log or which file to write: a recipe has nothing to set for them.
IGNORED = {"RUN_ID", "VAL_LOSS_EVERY", "VAL_BATCH_SIZE", "EVAL_BATCH_SEQS", "NCCL_IB_DISABLE", "OMP_NUM_THREADS"}
_ASSIGNMENT = re.compile(r"^[A-Z][A-Z0-9_]*=")


def from_command_line(text: str) -> tuple[list[str], list[str]]:
    """(overrides, names that were ignored) of the assignments in an official command line.

    >>> from_command_line("MLP_HIDDEN=1488 EVAL_STRIDE=64 torchrun train_gpt.py")
    (['model.mlp_hidden=1488', 'score.stride=64'], [])
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise GolfError(f"--from-env: cannot read the command line: {error}; quote it as a whole") from None
    pairs = dict(word.split("=", 1) for word in words if _ASSIGNMENT.match(word))
    if not pairs:
        raise GolfError(f"--from-env: no VARIABLE=value in '{text}'; e.g. --from-env 'MLP_HIDDEN=1488 EVAL_STRIDE=64'")
    return from_variables(pairs)


def from_variables(pairs: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The same from a mapping; an unknown variable is an error, since dropping it would change the run."""
    overrides, ignored = [], []
    for name, value in pairs.items():
        if name in IGNORED:
            ignored.append(name)
        elif name in DERIVED:
            overrides.append(DERIVED[name](value, pairs))
        elif name in VARIABLES:
            overrides.append(f"{VARIABLES[name]}={value}")
        else:
            raise GolfError(f"--from-env: no recipe key for variable {name}{close_match(name, [*VARIABLES, *DERIVED])}")
    return overrides, ignored
