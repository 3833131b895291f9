"""Folders of ready-made token shards: the official export of openai/parameter-golf and anything in its format."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paramgolf.data.cache import remembered_sha256
from paramgolf.data.shards import check_ids, is_shard, open_shard, read_header
from paramgolf.data.sources import kind_of
from paramgolf.data.tokenizer import Tokenizer
from paramgolf.errors import GolfError
from paramgolf.files import user_path
from paramgolf.recipe.sections import DataSection

SIDECAR = "val_bytes"
_CHECKED_TOKENS = 200_000_000  # training ids checked up front; the loader checks every batch anyway


@dataclass(frozen=True)
class Shards:
    """`sizes`: the sidecar of a CaseOps export, the bytes of original text of every validation token."""

    tokenizer: Tokenizer
    train: list[Path]
    val: list[Path]
    sizes: list[Path]
    passport: dict[str, Any]


def has_shards(folder: Path) -> bool:
    """Whether a folder is one of token shards. A .bin among texts may be anything: there its first word decides."""
    paths = list(folder.glob("*.bin"))
    return any(is_shard(path) for path in paths) or (
        bool(paths) and not any(kind_of(path) for path in folder.iterdir())
    )


def shard_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """(training, validation) shards of a folder in name order; validation shards have `val` in their name."""
    paths = [path for path in sorted(folder.glob("*.bin")) if SIDECAR not in path.name.lower()]
    val = [path for path in paths if "val" in path.name.lower()]
    if not val:
        raise GolfError(
            f"{folder}: no validation shard (*val*.bin) among {len(paths)} .bin files; fetch or prepare it again"
        )
    return [path for path in paths if path not in val], val


def find(folder: Path, section: DataSection, cache: Path) -> Shards:
    """The shards of `folder` with their tokenizer, checked against each other and the recipe."""
    train, val = shard_files(folder)
    if not train:
        raise GolfError(f"{folder}: no training shard (*.bin without 'val' in its name); fetch with --train-shards 1")
    model = user_path(section.tokenizer) if section.tokenizer else _model_beside(folder, section.vocab_size)
    tokenizer = Tokenizer.load(model)
    check_vocabulary(tokenizer, section, where=str(model), given=True)
    check_case(tokenizer, section, where=str(model))
    sizes = sidecar(folder, tokenizer, val)
    stated = re.search(r"sp(\d+)$", folder.resolve().name)
    if stated and int(stated[1]) != tokenizer.vocab_size:
        raise GolfError(f"{folder}: shards of vocabulary {stated[1]}, but {model} has {tokenizer.vocab_size}")
    counts = {path: read_header(path) for path in [*train, *val]}
    left = _CHECKED_TOKENS
    for path in [*val, *train]:
        if path in val or left > 0:
            check_ids(open_shard(path), tokenizer.vocab_size, str(path))
            left -= counts[path] if path in train else 0
    passport = _passport(folder, tokenizer, train, val, counts, cache)
    if sizes:
        passport["val"]["bytes"] = sum(int(open_shard(path).sum(dtype=np.int64)) for path in sizes)
        passport["val"]["sizes"] = [{"name": p.name, "sha256": remembered_sha256(p, cache)} for p in sizes]
    return Shards(tokenizer, train, val, sizes, passport)


def sidecar(folder: Path, tokenizer: Tokenizer, val: list[Path]) -> list[Path]:
    """The files that count the bytes of the validation shards' tokens, [] if the tokenizer's table does.

    A CaseOps tokenizer (#1729) needs them: `*val_bytes*.bin` beside the shards, a number for every token.
    """
    if not tokenizer.case_operators:
        return []
    paths = [path for path in sorted(folder.glob("*.bin")) if SIDECAR in path.name.lower()]
    if not paths:
        raise GolfError(
            f"{folder}: CaseOps shards without the sidecar that counts their bytes (*{SIDECAR}*.bin); fetch it too"
        )
    counts = sum(read_header(path) for path in paths), sum(read_header(path) for path in val)
    if counts[0] != counts[1]:
        raise GolfError(
            f"{folder}: the sidecar *{SIDECAR}*.bin counts {counts[0]:,} tokens, the validation shards hold "
            f"{counts[1]:,}; fetch both again"
        )
    return paths


def sidecar_of(shard: Path) -> Path:
    """The sidecar of one validation shard of a CaseOps export."""
    path = shard.with_name(re.sub("val(?!_bytes)", SIDECAR, shard.name, count=1))
    if path == shard or not path.is_file():
        raise GolfError(f"{shard}: CaseOps tokens without the sidecar that counts their bytes ({path.name}); fetch it")
    if read_header(path) != read_header(shard):
        raise GolfError(f"{path}: counts the bytes of another number of tokens than {shard.name} has; fetch both again")
    return path


def check_case(tokenizer: Tokenizer, section: DataSection, *, where: str) -> None:
    """GolfError if the recipe asks for CaseOps and the given tokenizer cannot write it."""
    if section.caseops and not tokenizer.case_operators:
        raise GolfError(
            f"data.caseops=true, but {where} lacks the case operators U+E001 to U+E004 as user-defined pieces; use a "
            "CaseOps tokenizer or set data.caseops=false"
        )


def check_vocabulary(tokenizer: Tokenizer, section: DataSection, *, where: str, given: bool) -> None:
    """GolfError if a given tokenizer has another vocabulary than the recipe asks for."""
    if given and tokenizer.vocab_size != section.vocab_size:
        raise GolfError(
            f"{where} has {tokenizer.vocab_size} pieces, the recipe says data.vocab_size = {section.vocab_size};"
            f" set data.vocab_size={tokenizer.vocab_size} or use another tokenizer"
        )


def beside(folder: Path) -> Tokenizer | None:
    """The tokenizer that lies with the shards, if there is exactly one that fits."""
    try:
        return Tokenizer.load(_model_beside(folder, 0))
    except GolfError:
        return None


def _model_beside(folder: Path, vocab_size: int) -> Path:
    inside = sorted(folder.glob("*.model"))
    if len(inside) == 1:
        return inside[0]
    beside = [p / "tokenizers" for p in (folder, folder.parent, folder.parent.parent)]
    size = re.search(r"sp(\d+)$", folder.resolve().name)
    wanted = size[1] if size else str(vocab_size)
    found = [p for place in beside for p in sorted(place.glob(f"*_{wanted}_*.model"))]
    if len(inside) > 1 or not found:
        raise GolfError(f"{folder}: {len(inside)} .model files with the shards; name the tokenizer with data.tokenizer")
    return found[0]


def _passport(
    folder: Path, tokenizer: Tokenizer, train: list[Path], val: list[Path], counts: dict[Path, int], cache: Path
) -> dict[str, Any]:
    def part(paths: list[Path]) -> dict[str, Any]:
        shards = [{"name": p.name, "tokens": counts[p], "sha256": remembered_sha256(p, cache)} for p in paths]
        return {"documents": None, "bytes": None, "tokens": sum(counts[p] for p in paths), "shards": shards}

    return {
        "format": 1,
        "kind": "shards",
        "source": [{"name": folder.resolve().name}],
        "tokenizer": {
            "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "reversible": tokenizer.reversible,
        },
        "split": "val shards",
        "train": part(train),
        "val": part(val),
        "val_documents_in_train": None,
    }  # fmt: skip
