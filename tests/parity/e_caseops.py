"""E_caseops: the transform and its inverse, tokens and byte counts of a CaseOps tokenizer, the shards of its export."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from paramgolf.data import caseops
from paramgolf.data.shards import ShardWriter, open_shard
from paramgolf.data.tokenizer import Tokenizer
from paramgolf.errors import GolfError
from paramgolf.files import sha256_file
from tests.parity.harness import Check, exact


def strings(z: Any, name: str) -> Any:
    return json.loads(str(z[f"{name}_json"]))


def differing(name: str, ours: list[Any], reference: list[Any]) -> Check:
    wrong = sum(a != b for a, b in zip(ours, reference, strict=True))
    return Check(name, float(wrong), 0.0)


def decoded(text: str) -> tuple[str, bool]:
    """(the decoded text, whether it is refused)."""
    try:
        return caseops.decode(text), False
    except GolfError:
        return "", True


def check(path: Path, z: Any) -> list[Check]:
    texts, encoded, malformed = (strings(z, name) for name in ("text", "encoded", "malformed"))
    expected = list(zip(strings(z, "malformed_decoded"), z["malformed_is_error"].tolist(), strict=True))
    checks = [
        differing("encoded", [caseops.encode(text) for text in texts], encoded),
        differing("decoded", [caseops.decode(text) for text in encoded], texts),
        differing("malformed", [decoded(text) for text in malformed], expected),
    ]
    tokenizer = Tokenizer.from_bytes(z["sp_model"].tobytes())
    ids = [tokenizer.encode(text).tolist() for text in texts]
    sizes = [tokenizer.sizes(text.encode())[1:] for text in texts]
    checks += [
        exact("vocabulary", tokenizer.vocab_size, z["sp_vocab_size"]),
        differing("pieces", tokenizer.pieces, strings(z, "sp_pieces")),
        differing("ids", ids, strings(z, "ids")),
        differing("surfaces", [tokenizer.surfaces(text) for text in texts], strings(z, "surfaces")),
        differing("byte counts", [size.tolist() for size in sizes], strings(z, "byte_counts")),
        exact("sidecar total", [int(size.sum()) for size in sizes], z["sidecar_total"]),
        exact("UTF-8 total", [len(text.encode()) for text in texts], z["utf8_total"]),
    ]
    return checks + check_export(z, tokenizer)


def whole(shards: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.uint16), *shards])


def check_export(z: Any, tokenizer: Tokenizer) -> list[Check]:
    """The first documents are validation, with a sidecar; every file of the export byte by byte."""
    documents = [text.encode() for text in strings(z, "prepare/docs")]
    held, size = int(z["prepare/val_docs"]), int(z["prepare/shard_tokens"])
    streams = {
        "fineweb_val": [tokenizer.encode_documents([d]) for d in documents[:held]],
        "fineweb_val_bytes": [tokenizer.sizes(d) for d in documents[:held]],
        "fineweb_train": [tokenizer.encode_documents([d]) for d in documents[held:]],
    }
    checks = []
    with tempfile.TemporaryDirectory() as folder:
        for prefix, parts in streams.items():
            with ShardWriter(Path(folder), prefix, size) as writer:
                for part in parts:
                    writer.write(part)
            ours = {file.stem: open_shard(file) for file in writer.paths}
            names = sorted(k.removeprefix("prepare/") for k in z.files if k.startswith(f"prepare/{prefix}_0"))
            theirs = [z[f"prepare/{name}"] for name in names]
            checks.append(exact(prefix, whole(ours.values()), whole(theirs)))
            if theirs and len(theirs[-1]) > size:
                continue  # the script cuts at most one shard off after a document: another split of the same tokens
            checks.append(exact(f"{prefix} shards", list(ours), names))
            for file in writer.paths:
                same = sha256_file(file) == str(z[f"prepare/sha256/{file.stem}"])
                checks.append(Check(f"{file.stem} file", float(not same), 0.0))
    return checks
