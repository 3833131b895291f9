"""A score that is a file: documents coded with a model, decoded by another process, compared, and the file measured.

If the documents come back from a file of n bytes, the score is 8 n / bytes, and the model needed nothing but the text
before each token, gave probabilities that sum to one, and read the text once: otherwise it could not be decoded.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from paramgolf.data.dataset import open_sizes, open_text
from paramgolf.data.sources import SEPARATOR
from paramgolf.errors import CheckFailed, GolfError
from paramgolf.score.scorer import score
from paramgolf.score.windows import lanes
from paramgolf.text import format as form
from paramgolf.text.blocks import MAX_LANES, TOLERANCE, TextModel, encode_lanes, exact_arithmetic
from paramgolf.text.format import Content, Frame, Header, Kind

LANE_TOKENS = 4096
Say = Callable[[str], None]


def prove(
    artifact: Path, source: str, *, limit: int = 0, stride: int = 0, tolerance: float = TOLERANCE, say: Say
) -> dict[str, Any]:
    """The proof of `source` (as `golf score --data` takes it) or of its first `limit` bytes, as JSON-able facts.

    Raises CheckFailed if a document does not come back; GolfError if there is nothing to prove.
    """
    model = TextModel(artifact)
    tokens, documents, true_bytes = _open(source, model, limit)
    content = Content.TOKENS if documents is None else Content.DOCUMENTS
    count = max(1, min(len(tokens) // LANE_TOKENS, model.lane_limit(model.seq_len)))
    starts = lanes(tokens, count, model.tokenizer.bos_id)
    say(f"scoring {len(tokens):,} tokens in {len(starts)} lanes")
    with exact_arithmetic():
        scored = score(
            model.model, tokens, token_bytes=model.tokenizer.token_bytes,
            true_bytes=true_bytes, seq_len=model.seq_len, stride=stride,
            batch_tokens=model.batch_tokens, lane_count=count, bos_id=model.tokenizer.bos_id,
        )  # fmt: skip
    say("encoding")
    header, began = model.header(content, tolerance, stride), time.monotonic()
    data = _encode(model, header, tokens, starts, documents)
    encoding = time.monotonic() - began
    say(f"decoding {len(data):,} bytes in another process")
    back = _decode_elsewhere(artifact, data)
    expected = [_sha(d) for d in documents] if documents is not None else [_sha(tokens.astype("<u2").tobytes())]
    _compare(expected, back["sha256"])
    size = scored.scored_bytes
    proved = 8 * len(data) / size
    return {
        "proved_bpb": proved,
        "val_bpb_same_windows": scored.val_bpb,
        "overhead": proved / scored.val_bpb - 1,
        "file_bytes": len(data),
        "text_bytes": size,
        "bytes_from": scored.bytes_from,
        "content": content.name.lower(),
        "documents": len(expected) if documents is not None else None,
        "tokens": len(tokens),
        "lanes": len(starts),
        "seq_len": header.seq_len,
        "stride": header.stride,
        "tolerance": header.tolerance,
        "limit": limit,
        "model_sha256": model.sha256,
        "file_sha256": _sha(data),
        "score_bytes_per_second": size / max(scored.seconds, 1e-9),
        "encode_bytes_per_second": size / max(encoding, 1e-9),
        "decode_bytes_per_second": size / max(back["seconds"], 1e-9),
    }


def _open(source: str, model: TextModel, limit: int) -> tuple[np.ndarray, list[bytes] | None, int | None]:
    """(tokens, documents or None where there are only shards, their bytes if those can be known), cut to `limit` bytes
    if that is not 0."""
    if source == "-":
        raise GolfError("--data -: a proof reads its documents twice; give a file or folder")
    tokens, true_bytes, sizes = open_text(source, model.tokenizer)
    bos = model.tokenizer.bos_id
    if len(tokens) < 2 or tokens[0] != bos:
        raise GolfError(f"{source}: its tokens do not begin with a document start; such a stream cannot be proved")
    if not sizes:
        counted = open_sizes(source, model.tokenizer)
        if limit:
            each = model.tokenizer.token_bytes.count(tokens[:-1], tokens[1:]) if counted is None else counted[1:]
            within = int(np.searchsorted(np.cumsum(each, dtype=np.int64), limit, side="right"))
            tokens = tokens[: max(2, 1 + within)]
        return tokens, None, None if counted is None else int(counted[: len(tokens)].sum(dtype=np.int64))
    assert true_bytes is not None
    documents = _documents(source, sizes)
    if limit and limit < true_bytes:
        documents = _prefix(documents, limit)
        tokens = model.tokenizer.encode_documents(documents)
    return tokens, documents, sum(map(len, documents))


def _documents(source: str, sizes: list[int]) -> list[bytes]:
    """The raw documents that `open_text` tokenised."""
    from paramgolf.data import sources
    from paramgolf.data.build import PASSPORT, VAL_TEXT

    path = Path(source).expanduser()
    if path.is_dir() and (path / VAL_TEXT).is_file() and (path / PASSPORT).is_file():
        path = path / VAL_TEXT
    found, _ = sources.find(path)
    held = [s for s in found if sources.is_validation(s)]
    documents = [bytes(d.data) for s in (held if held and path.is_dir() else found) for d in s.documents()]
    if [len(d) for d in documents] != sizes:
        raise GolfError(f"{source} changed while it was read; try again")
    return documents


def _prefix(documents: list[bytes], limit: int) -> list[bytes]:
    """The first `limit` bytes, not cutting a character."""
    kept: list[bytes] = []
    for document in documents:
        part = document[:limit].decode("utf-8", "ignore").encode() if len(document) > limit else document
        limit -= len(document)
        kept += [part] if part else []
        if limit <= 0:
            break
    return kept


def _encode(
    model: TextModel, header: Header, tokens: np.ndarray, starts: tuple[int, ...], documents: list[bytes] | None
) -> bytes:
    """The proof file: frames of at most MAX_LANES lanes."""
    parts, digest, total, document = [header.pack()], hashlib.sha256(), 0, 0
    edges = [*starts[::MAX_LANES], len(tokens)]
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        piece = tokens[low:high]
        if documents is None:
            raw = piece.astype("<u2").tobytes()
        else:
            number = int(np.count_nonzero(piece == model.tokenizer.bos_id))
            raw = SEPARATOR.join(documents[document : document + number])
            document += number
        mine = tuple(s - low for s in starts[i * MAX_LANES : (i + 1) * MAX_LANES])
        payload, patched = encode_lanes(raw, header, model, piece, mine)
        parts.append(Frame(Kind.PATCHED if patched else Kind.MODEL, len(raw), zlib.crc32(raw), payload).pack())
        digest.update(raw)
        total += len(raw)
    return b"".join([*parts, form.pack_end(total, digest.digest())])


def _decode_elsewhere(artifact: Path, data: bytes) -> dict[str, Any]:
    """What `replay` says of the file in a process that has nothing else but the artifact."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "proof.gtx"
        file.write_bytes(data)
        command = [sys.executable, "-m", "paramgolf.text.replay", str(artifact.resolve()), file.name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise CheckFailed(f"not proved: the file could not be decoded: {lines[-1]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _compare(expected: list[str], got: list[str]) -> None:
    if len(expected) != len(got):
        raise CheckFailed(f"not proved: {len(expected)} documents went in, {len(got)} came back")
    wrong = [i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b]
    if wrong:
        raise CheckFailed(f"not proved: {len(wrong)} documents came back changed, the first is number {wrong[0]}")


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
