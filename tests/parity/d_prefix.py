"""Bytes of the validation prefix, document by document, by the table and by decoding.

Only the first tokens are stored; the table comes from the official tokenizer where it is at hand (PARAMGOLF_SHARED),
else from a D_eval file beside this one, in which case nothing can be decoded.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from paramgolf.data.token_bytes import TokenBytes
from paramgolf.data.tokenizer import Tokenizer
from tests.parity.harness import Check, exact

OFFICIAL = Path("tokenizers", "fineweb_1024_bpe.model")


def check(path: Path, z: Any) -> list[Check]:
    tokens = z["first_tokens"].astype(np.int64)
    tokenizer = official_tokenizer()
    tables = stored_tables(path.parent)
    checks: list[Check] = []
    if tokenizer is not None:
        for name, table in tables.items():
            for field in ("base_bytes", "leading_space", "boundary"):
                checks.append(
                    exact(f"table {field} of {name}", getattr(tokenizer.token_bytes, field), getattr(table, field))
                )
        tables["tokenizer"] = tokenizer.token_bytes
    if not tables:
        return [Check("no byte table: neither PARAMGOLF_SHARED nor a D_eval file", float("inf"), 0.0)]
    table = list(tables.values())[-1]
    bytes_of = np.zeros(len(tokens), np.int64)  # of token i as a target; the first token is never one
    bytes_of[1:] = table.count(tokens[:-1], tokens[1:])
    whole = np.flatnonzero(z["doc_end"] <= len(tokens))
    spans = [slice(int(z["doc_start"][i]), int(z["doc_end"][i])) for i in whole]
    counted = [int(bytes_of[span].sum()) for span in spans]
    text = [span.start + (tokens[span.start] == 1) for span in spans]  # after the begin-of-document token
    checks += [
        exact("documents' table bytes", counted, z["doc_lut_bytes"][whole]),
        exact("first token's bytes", table.base_bytes[tokens[0]], z["first_token_base_bytes"]),
        exact("leading spaces", table.leading_space[tokens[text]], z["doc_first_piece_has_leading_space"][whole]),
        exact("documents begin with BOS", tokens[[s.start for s in spans[1:]]], np.ones(len(spans) - 1)),
    ]
    if tokenizer is not None:
        decoded = [len(tokenizer.decode(tokens[span])) for span in spans]
        checks.append(exact("documents' decoded bytes", decoded, z["doc_decoded_bytes"][whole]))
    return checks


def official_tokenizer() -> Tokenizer | None:
    root = os.environ.get("PARAMGOLF_SHARED")
    path = Path(root, OFFICIAL) if root else None
    return Tokenizer.load(path) if path is not None and path.is_file() else None


def stored_tables(folder: Path) -> dict[str, TokenBytes]:
    tables = {}
    for path in sorted(folder.glob("D_eval_*.npz")):
        with np.load(path, allow_pickle=False) as z:
            tables[path.stem] = TokenBytes(z["lut_base_bytes"], z["lut_has_leading_space"], z["lut_is_boundary"])
    return tables
