"""A split of the training text to choose by: the validation text is for reporting, never for choosing.

Made from the prepared dataset, tokens and all, so that it costs no second tokenisation: documents of the last training
shard, picked by their hash, become the validation part of a dataset folder of its own. The other shards are links.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from paramgolf.data import split
from paramgolf.data.build import PASSPORT, TOKENIZER, VAL_TEXT
from paramgolf.data.dataset import Dataset, prepare
from paramgolf.data.shards import write_shard
from paramgolf.data.tokenizer import Tokenizer
from paramgolf.errors import GolfError
from paramgolf.files import atomic_write, sha256_bytes, sha256_file
from paramgolf.recipe.sections import DataSection

_FORMAT = 1


def tuning_data(section: DataSection, cache: Path, *, val_max_bytes: int = 0) -> Path:
    """The folder of the split for this data section (`--data` of a trial); made once, found again by its content.

    Args:
        val_max_bytes: at most so much text is held back; 0 = as the section says of validation text.
    """
    dataset = prepare(section, cache=cache)
    limit = val_max_bytes or section.val_max_bytes
    train = [shard["sha256"] for shard in dataset.passport["train"]["shards"]]
    key = sha256_bytes(json.dumps([_FORMAT, train, dataset.tokenizer.sha256, limit]).encode())
    folder = cache / f"tuning-{key[:20]}"
    if _whole(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=cache))
        try:
            passport = _write(work, dataset, limit) | {"key": key}
            atomic_write(work / PASSPORT, json.dumps(passport, indent=1).encode())
            work.chmod(0o755)
            _publish(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise GolfError(f"cannot write {folder}: {error.strerror or error}; free space") from None
    return folder


def _whole(folder: Path) -> bool:
    """Whether the split is there, with the shards that its links name."""
    return (folder / PASSPORT).is_file() and all(path.exists() for path in Dataset.open(folder).train_shards)


def _publish(work: Path, folder: Path) -> None:
    """Rename, unless another process was faster: its folder may be in use already."""
    try:
        os.rename(work, folder)
    except OSError:
        if not _whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(work, folder)


def _write(work: Path, dataset: Dataset, limit: int) -> dict[str, Any]:
    tokenizer, last = dataset.tokenizer, np.asarray(dataset.train_tokens()[-1])
    held, kept = hold_back(last, tokenizer, limit)
    atomic_write(work / TOKENIZER, tokenizer.to_bytes())
    write_shard(work / "val_000000.bin", held)
    write_shard(work / f"train_{len(dataset.train_shards):06d}.bin", kept)
    names = []
    for index, shard in enumerate(dataset.train_shards[:-1]):
        names.append(f"train_{index:06d}.bin")
        (work / names[-1]).symlink_to(shard.resolve())
    names.append(f"train_{len(dataset.train_shards):06d}.bin")
    before = dataset.passport
    shards = [dict(shard, name=name) for shard, name in zip(before["train"]["shards"], names, strict=True)]
    shards[-1] = _shard(work / names[-1], len(kept))
    tokens = before["train"]["tokens"] - len(held)
    val: dict[str, Any] = {"documents": None, "bytes": None, "tokens": len(held)}
    if tokenizer.reversible:
        documents = [tokenizer.decode(part) for part in np.split(held, np.flatnonzero(held == tokenizer.bos_id))[1:]]
        text = split.join(documents)
        atomic_write(work / VAL_TEXT, text)
        val |= {"documents": len(documents), "bytes": sum(map(len, documents)), "sha256": sha256_bytes(text)}
    return {
        **before,
        "kind": "text" if tokenizer.reversible else "shards",
        "split": "held back from the training text",
        "train": {"documents": None, "bytes": None, "tokens": tokens, "shards": shards},
        "val": val | {"shards": [_shard(work / "val_000000.bin", len(held))]},
        "removed_from_train": 0,
        "val_documents_in_train": None,  # documents of other shards are not looked at
    }


def _shard(path: Path, tokens: int) -> dict[str, Any]:
    return {"name": path.name, "tokens": tokens, "sha256": sha256_file(path)}


def hold_back(tokens: np.ndarray, tokenizer: Tokenizer, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """(held back, kept) of a shard, uint16 (n,): whole documents picked by the hash of their tokens, together at most
    `limit` bytes and a tenth of the shard. Where no document is that small, the end of the last one.

    Copies of a held document are held (and scored) as well, so that none is trained on.
    """
    starts = np.flatnonzero(tokens == tokenizer.bos_id)
    if not len(starts):
        raise GolfError("the training shards hold no document starts; choose the validation text with --on validation")
    ends = np.append(starts[1:], len(tokens))
    count = tokenizer.token_bytes.base_bytes.astype(np.int64) + tokenizer.token_bytes.leading_space
    sizes = np.add.reduceat(count[tokens], starts)
    room = split.val_limit(int(sizes.sum()), limit)
    keys = [split.digest(tokens[a:b].tobytes()) for a, b in zip(starts, ends, strict=True)]
    chosen = split.pick(keys, sizes.tolist(), room) if len(starts) > 1 else []
    held = np.zeros(len(tokens), bool)
    if chosen:
        copies = {keys[i] for i in chosen}
        for a, b, key in zip(starts, ends, keys, strict=True):
            held[a:b] = key in copies
        return tokens[held].astype(np.uint16), tokens[~held].astype(np.uint16)
    cut = int(np.searchsorted(np.cumsum(count[tokens[::-1]]), room))
    if not 0 < cut < len(tokens) // 2:
        raise GolfError("the training text is too short to hold a part back; choose with --on validation")
    tail = np.concatenate([[tokenizer.bos_id], tokens[-cut:]])
    return tail.astype(np.uint16), tokens[:-cut].astype(np.uint16)
