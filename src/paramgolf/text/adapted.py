"""A token stream to bytes and back with a model that learns on the way: encoder and decoder make the same updates.

Every batch of documents is one coded stream, a document a lane. Both sides go chunk by chunk: the encoder codes a chunk
with the logits of its whole window, the decoder reads it token by token with a KV cache; then both run the very same
pass over the same tokens and learn from it. The first token of a document is given, the begin-of-document token; its
end is coded, as the next one's. The settings and the number of targets of every document come first.

Only in stream order, and on one machine with one thread: updates that differ in the last digits would drift apart.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import numpy as np
import torch

from paramgolf import strict_json
from paramgolf.errors import GolfError
from paramgolf.model.cache import KVCache
from paramgolf.model.gpt import GPT
from paramgolf.pack.wire import Reader, varint
from paramgolf.recipe.sections import TttSection
from paramgolf.score import coder
from paramgolf.score.stream import SAMPLE_TOKENS
from paramgolf.score.ttt.adapt import Adaptation, adapting
from paramgolf.score.ttt.adapters import Adapters
from paramgolf.score.ttt.documents import Document, documents_of
from paramgolf.score.ttt.group import Chunk, Group
from paramgolf.score.ttt.settings import settings_of

Progress = Callable[[int, int], None]
MAX_SETTINGS = 1 << 14
# Whatever a file claims.
MOST = {"rank": 1024, "batch_docs": 4096, "context": 1 << 20, "grad_steps": 64, "phases": 64, "sgd_epochs": 64}
LEAST_ROOM, ROOM_SHARE = 1 << 26, 16  # numbers in the adapters: always allowed, and for each weight of the model
MAX_CHUNKS = 1 << 24  # tokens in a chunk of all documents side by side


def check_codable(section: TttSection) -> None:
    """GolfError for what a decoder could not follow."""
    if section.kind not in ("lora", "phased"):
        raise GolfError(f"ttt.kind={section.kind} cannot be proved; use lora or phased")
    if section.order != "stream":
        raise GolfError(f"ttt.order={section.order} cannot be proved: a decoder reads from left to right; use stream")
    for key, most in MOST.items():
        if getattr(section, key) > most:
            raise GolfError(f"a proof takes ttt.{key} up to {most}; lower it")


def check_room(model: GPT, section: TttSection, documents: int) -> None:
    """GolfError where the adapters, or a chunk of each of so many documents, would take more memory than any recipe's
    do."""
    slots = min(section.batch_docs, documents)
    adapted = sum(i + o for i, o in Adapters(model, section, 0).sizes.values())
    most = max(LEAST_ROOM, ROOM_SHARE * sum(p.numel() for p in model.parameters()))
    if slots * section.rank * adapted > most:
        raise GolfError(
            f"adapters of ttt.rank={section.rank} for {slots} documents are {slots * section.rank * adapted:,} numbers "
            f"and a proof with this model takes {most:,}; lower ttt.rank or ttt.batch_docs"
        )
    chunk = max(section.chunk, *(size for _, size in section.short_chunks), 1)
    if slots * chunk > MAX_CHUNKS:
        raise GolfError(
            f"chunks of {chunk} tokens of {slots} documents are more than the {MAX_CHUNKS:,} tokens a proof takes at "
            "once; lower ttt.chunk, ttt.short_chunks or ttt.batch_docs"
        )


def encode_adapted(
    model: GPT, tokens: np.ndarray, section: TttSection, *, seq_len: int, tolerance: float, bos_id: int = 1,
    progress: Progress | None = None,
) -> tuple[bytes, float]:  # fmt: skip
    """(the stream `tokens` as bytes, the bits of its score). It begins with `bos_id`."""
    check_codable(section)
    documents = documents_of(tokens, bos_id)
    check_room(model, section, len(documents))
    said = json.dumps(_plain(section), separators=(",", ":"), sort_keys=True).encode()
    out = [varint(len(said)), said, varint(len(documents)), *(varint(d.targets) for d in documents)]
    adaptation = Adaptation(model, section, tokens, documents, seq_len)
    settings: coder.Settings | None = None
    bits, done = 0.0, 0
    with adapting(model, max(seq_len, adaptation.context)):
        for number, batch in enumerate(adaptation.batches):
            kept = _Kept(tokens)
            adaptation.begin(number).run(kept.observe)
            odds = [np.concatenate(kept.log_odds[d.number]) for d in batch.documents]
            truth = [tokens[d.start + 1 : d.start + d.length] for d in batch.documents]
            if settings is None:
                sample = np.concatenate(odds)[:SAMPLE_TOKENS], np.concatenate(truth)[:SAMPLE_TOKENS]
                settings = coder.fit(tolerance, *sample, model.vocab_size)
            encoder = coder.Encoder(settings, len(odds))
            for lane, pair in enumerate(zip(odds, truth, strict=True)):
                encoder.add(lane, *pair)
            data = encoder.finish()
            out += [varint(len(data)), data]
            bits += kept.nats / math.log(2)
            adaptation.finish(number)
            done += len(batch.documents)
            if progress is not None:
                progress(done, len(documents))
    return b"".join(out), bits


class _Kept:
    """What the coder needs of every document of a batch, and the batch's loss."""

    def __init__(self, tokens: np.ndarray) -> None:
        self._tokens = tokens
        self.log_odds: dict[int, list[np.ndarray]] = {}
        self.nats = 0.0

    def observe(self, chunk: Chunk, logits: torch.Tensor) -> None:
        for document, row, span in zip(chunk.documents, logits, chunk.spans(), strict=True):
            truth = torch.from_numpy(self._tokens[span].astype(np.int64)).to(row.device)
            part = row[: len(truth)]
            self.log_odds.setdefault(document.number, []).append(coder.path_log_odds(part, truth))
            self.nats += float(torch.nn.functional.cross_entropy(part, truth, reduction="sum"))


def _plain(section: TttSection) -> dict[str, object]:
    values = dataclasses.asdict(section)
    return {f.name: values[f.name] for f in dataclasses.fields(section) if values[f.name] != f.default}


def decode_adapted(
    model: GPT, payload: bytes, *, seq_len: int, bos_id: int = 1, limit: int, progress: Progress | None = None
) -> np.ndarray:
    """The stream of `encode_adapted`, int64, of at most `limit` tokens. GolfError for a damaged payload, CheckFailed if
    the tokens do not match their checksums."""
    reader = Reader(payload, "a frame")
    section = _settings(reader)
    targets = [reader.varint(limit) for _ in range(reader.varint(limit))]
    if not targets or min(targets) < 1 or sum(targets) >= limit:
        raise reader.fault("documents of impossible sizes")
    check_room(model, section, len(targets))
    starts = np.cumsum([0, *targets])
    documents = [Document(i, int(at), n + 1) for i, (at, n) in enumerate(zip(starts, targets, strict=False))]
    stream = np.zeros(int(starts[-1]) + 1, np.int64)
    stream[starts[:-1]] = bos_id
    adaptation = Adaptation(model, section, stream[:0], documents, seq_len)
    adaptation.stream = torch.from_numpy(stream).to(adaptation.stream.device)  # a copy would touch all that is promised
    done = 0
    with adapting(model, max(seq_len, adaptation.context)):
        for number, batch in enumerate(adaptation.batches):
            decoder = coder.Decoder(reader.take(reader.varint(len(reader))))
            sizes = [d.targets for d in batch.documents]
            if decoder.lengths.tolist() != sizes or decoder.settings.vocab_size != model.vocab_size:
                raise reader.fault("a coded stream that is not of these documents")
            group = adaptation.begin(number)
            for index in range(group.chunks):
                _read_chunk(model, decoder, adaptation, group, index)
                group.advance(group.chunk(index))
            decoder.finish()
            adaptation.finish(number)
            done += len(batch.documents)
            if progress is not None:
                progress(done, len(documents))
    reader.end()
    return adaptation.stream.cpu().numpy()


def _settings(reader: Reader) -> TttSection:
    try:
        said = strict_json.loads(reader.take(reader.varint(MAX_SETTINGS)))
    except (ValueError, RecursionError) as error:
        raise reader.fault("settings that are not JSON") from error
    section, _ = settings_of({"ttt": said})
    check_codable(section)
    return section


def _read_chunk(model: GPT, decoder: coder.Decoder, adaptation: Adaptation, group: Group, number: int) -> None:
    """Decode chunk `number` of all documents that have it into the adaptation's stream."""
    stream, slots = adaptation.stream, group.slots(number)
    rows = torch.tensor(slots, dtype=torch.int64, device=stream.device)
    base, end = group.cut.begin(number), group.cut.begin(number + 1)
    first = max(0, end - group.context)
    begin = torch.tensor([group.documents[i].start for i in slots], device=stream.device)
    ids = stream[begin[:, None] + torch.arange(first, base + 1, device=stream.device)]
    cache, last = KVCache(group.context), max(group.documents[i].targets for i in slots)
    with group.adapters.attached(rows):
        for target in range(base + 1, min(end, last) + 1):
            hidden = model.hidden(ids, cache)[:, -1:]
            logits = torch.zeros(len(group.documents), model.vocab_size, device=stream.device)
            logits[rows] = group.adapters.logits(hidden, rows)[:, 0]
            found = torch.from_numpy(decoder.step(logits)).to(stream.device)[rows]
            on = found >= 0
            stream[begin[on] + target] = found[on]
            ids = found.clamp_min(0)[:, None]
