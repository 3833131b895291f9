"""What is in a data set: documents, tokens, bytes, the byte table against the text, copies in validation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from paramgolf.data import official, split
from paramgolf.data.build import PASSPORT, read_inputs
from paramgolf.data.byte_oracle import ByteOracle, check_dataset, check_shards, table_lines
from paramgolf.data.dataset import Dataset
from paramgolf.data.shards import open_shard
from paramgolf.data.sources import Source, find
from paramgolf.data.tokenizer import Tokenizer
from paramgolf.errors import GolfError
from paramgolf.files import user_path
from paramgolf.recipe.sections import DataSection


def inspect(
    source: str | Path, *, tokenizer: str | Path = "", documents: str | Path = "", field: str = "text", cache: Path
) -> dict[str, Any]:
    """A JSON-able description of a prepared folder, a folder of shards, or text ("" = the built-in corpus).

    Text is only tokenised when `tokenizer` names a model. `documents`: the original text of the validation shards in
    their order, where it is not in the folder; what it holds beyond them is not read. GolfError for what is unreadable.
    """
    folder = user_path(source)
    if str(source) and folder.is_dir() and ((folder / PASSPORT).is_file() or official.has_shards(folder)):
        return _inspect_shards(folder, str(tokenizer), find(documents, field)[0] if str(documents) else [])
    if str(documents):
        raise GolfError(f"--documents: {source or 'the built-in text'} is the documents themselves; leave it out")
    return _inspect_text(str(source), str(tokenizer), field, cache)


def _inspect_shards(folder: Path, model: str, documents: list[Source]) -> dict[str, Any]:
    tokenizer = Tokenizer.load(model) if model else None
    dataset: Dataset | None = None
    if (folder / PASSPORT).is_file():
        dataset = Dataset.open(folder)
        tokenizer = tokenizer or dataset.tokenizer
        train, val, kind = dataset.train_shards, dataset.val_shards, "prepared"
    else:
        train, val = official.shard_files(folder)
        tokenizer = tokenizer or official.beside(folder)
        kind = "shards"
    bos = tokenizer.bos_id if tokenizer else 1
    size = tokenizer.vocab_size if tokenizer else None
    train_part, train_hashes = _side(train, tokenizer, bos, size)
    val_part, val_hashes = _side(val, tokenizer, bos, size)
    result: dict[str, Any] = {"path": str(folder), "kind": kind, **_tokenizer_facts(tokenizer)}
    if documents and tokenizer is None:
        raise GolfError(f"{folder}: no tokenizer beside the shards; name it with --tokenizer")
    if documents and tokenizer is not None:
        val_part["byte_table"] = check_shards(val, documents, tokenizer).as_dict()
    elif dataset is not None and (check := check_dataset(dataset, tokenizer)):
        val_part["byte_table"] = check.as_dict()
    return {**result, "train": train_part, "val": val_part, "duplicates": _copies(train_hashes, val_hashes)}


def _tokenizer_facts(tokenizer: Tokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        return {"tokenizer": None}
    facts = {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "reversible": tokenizer.reversible}
    return {"tokenizer": facts}


def _side(
    shards: list[Path], tokenizer: Tokenizer | None, bos: int, vocab_size: int | None
) -> tuple[dict[str, Any], np.ndarray]:
    """(counts of one side, 64-bit hash of the tokens of every document)."""
    tokens = table_bytes = 0
    last = np.zeros(0, np.uint16)
    for path in shards:
        part = open_shard(path, vocab_size)
        tokens += len(part)
        if tokenizer is not None:
            table_bytes += tokenizer.token_bytes.total(np.concatenate([last, part]))
        last = np.array(part[-1:])
    hashes = np.fromiter((split.digest(document.tobytes()) for document in _token_documents(shards, bos)), np.uint64)
    counts: dict[str, Any] = {"documents": len(hashes), "tokens": tokens, "shards": len(shards)}
    if tokenizer is not None:
        counts["bytes"] = table_bytes
        counts["bytes_per_token"] = round(table_bytes / max(tokens, 1), 4)
    return counts, hashes


def _token_documents(shards: Iterable[Path], bos: int) -> Iterator[np.ndarray]:
    """The tokens of each document without BOS; a document may run over the end of a shard."""
    rest: list[np.ndarray] = []
    for path in shards:
        tokens = open_shard(path)
        starts = np.flatnonzero(tokens == bos)
        at = 0
        for start in starts:
            rest.append(np.array(tokens[at:start]))
            if sum(map(len, rest)):
                yield np.concatenate(rest)
            rest, at = [], int(start) + 1
        rest.append(np.array(tokens[at:]))
    if sum(map(len, rest)):
        yield np.concatenate(rest)


def _copies(train: np.ndarray, val: np.ndarray) -> dict[str, int]:
    return {
        "val_documents_in_train": int(np.isin(val, train).sum()),
        "repeated_train_documents": len(train) - len(np.unique(train)),
        "repeated_val_documents": len(val) - len(np.unique(val)),
    }


def _inspect_text(name: str, model: str, field: str, cache: Path) -> dict[str, Any]:
    tokenizer = Tokenizer.load(model) if model else None
    inputs = read_inputs(DataSection(text_field=field), name, cache)
    try:
        train, train_hashes = _text_side(inputs.train(), tokenizer)
        result: dict[str, Any] = {
            "path": name or inputs.label[0]["name"],
            "kind": "text",
            **_tokenizer_facts(tokenizer),
            "skipped_files": inputs.skipped,
            "train" if inputs.val else "text": train,
        }
        val_hashes = np.zeros(0, np.uint64)
        if inputs.val:
            result["val"], val_hashes = _text_side(inputs.val(), tokenizer)
        result["duplicates"] = _copies(train_hashes, val_hashes)
    finally:
        if inputs.temporary:
            inputs.temporary.unlink(missing_ok=True)
    return result


def _text_side(documents: Iterable[Any], tokenizer: Tokenizer | None) -> tuple[dict[str, Any], np.ndarray]:
    hashes: list[int] = []
    size = tokens = 0
    oracle = ByteOracle(tokenizer) if tokenizer is not None else None
    for document in documents:
        hashes.append(split.digest(document.data))
        size += len(document.data)
        if tokenizer is not None and oracle is not None:
            stream = tokenizer.encode_documents([document.data])
            tokens += len(stream)
            oracle.add(stream, document.data)
    facts: dict[str, Any] = {"documents": len(hashes), "bytes": size}
    if oracle is not None:
        facts |= {"tokens": tokens, "bytes_per_token": round(size / max(tokens, 1), 4)}
        facts["byte_table"] = oracle.result().as_dict()
    return facts, np.array(hashes, np.uint64)


def text_of(result: dict[str, Any]) -> str:
    """The same for a reader."""
    facts = result["tokenizer"]
    lines = [f"{result['path']} ({result['kind']})"]
    if facts:
        exact = "exactly reversible" if facts["reversible"] else "lossy: it normalises the text"
        lines.append(f"tokenizer   {facts['vocab_size']:,} pieces, {exact}")
    for side in ("train", "val", "text"):
        if side in result:
            part = result[side]
            counts = [f"{part[key]:,} {key}" for key in ("documents", "tokens", "bytes") if key in part]
            if "bytes_per_token" in part:
                counts.append(f"{part['bytes_per_token']:.4f} bytes/token")
            lines.append(f"{side:<11} {', '.join(counts)}")
            if check := part.get("byte_table"):
                lines += [f"{'':<11} {line}" for line in table_lines(check)]
    copies = result["duplicates"]
    lines.append(
        f"copies      {copies['val_documents_in_train']} validation documents are also in training;"
        f" repeated: {copies['repeated_train_documents']} in training, {copies['repeated_val_documents']} in validation"
    )
    skipped = result.get("skipped_files") or []
    if skipped:
        lines.append(f"left out    {len(skipped)} files: {', '.join(skipped[:8])}{' ...' if len(skipped) > 8 else ''}")
    return "\n".join(lines)
