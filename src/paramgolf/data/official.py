"""Folders of ready-made token shards: the official export of openai/parameter-golf and anything in its format."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paramgolf.data.cache import remembered_sha256
from paramgolf.data.shards import check_ids, open_shard, read_header
from paramgolf.data.tokenizer import Tokenizer
from paramgolf.errors import GolfError
from paramgolf.recipe.sections import DataSection

_CHECKED_TOKENS = 200_000_000  # training ids checked up front; the loader checks every batch anyway


@dataclass(frozen=True)
class Shards:
    tokenizer: Tokenizer
    train: list[Path]
    val: list[Path]
    passport: dict[str, Any]


def has_shards(folder: Path) -> bool:
    return any(folder.glob("*.bin"))


def shard_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """(training, validation) shards of a folder in name order; validation shards have `val` in their name."""
    paths = sorted(folder.glob("*.bin"))
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
    model = Path(section.tokenizer).expanduser() if section.tokenizer else _model_beside(folder, section.vocab_size)
    tokenizer = Tokenizer.load(model)
    check_vocabulary(tokenizer, section, where=str(model), given=True)
    stated = re.search(r"sp(\d+)$", folder.resolve().name)
    if stated and int(stated[1]) != tokenizer.vocab_size:
        raise GolfError(f"{folder}: shards of vocabulary {stated[1]}, but {model} has {tokenizer.vocab_size}")
    counts = {path: read_header(path) for path in [*train, *val]}
    left = _CHECKED_TOKENS
    for path in [*val, *train]:
        if path in val or left > 0:
            check_ids(open_shard(path), tokenizer.vocab_size, str(path))
            left -= counts[path] if path in train else 0
    return Shards(tokenizer, train, val, _passport(folder, tokenizer, train, val, counts, cache))


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
