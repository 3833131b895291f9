"""Tokenising with several processes, in order and with flat memory.

The workers are plain child processes fed through pipes: no fork of a process that may hold a GPU or threads, and no
re-import of the caller's main module.
"""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO

import numpy as np

from paramgolf.data.sources import Document
from paramgolf.data.tokenizer import Tokenizer
from paramgolf.errors import GolfError
from paramgolf.processors import cpu_count

BATCH_BYTES = 1 << 20
PARALLEL_FROM = 1 << 24  # bytes; below this, starting processes costs more than it saves


def child_environment() -> dict[str, str]:
    """The environment in which a child process, in whatever folder, finds the modules that this one finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)}


def encode_stream(
    documents: Iterable[Document], tokenizer: Tokenizer, *, total_bytes: int, workers: int = 0
) -> Iterator[tuple[np.ndarray, int]]:
    """(tokens uint16 with BOS before each document, bytes of text they stand for), in order.

    workers 0 = one for each processor. The result does not depend on it.
    """
    workers = workers or cpu_count()
    batches = _batches(documents, tokenizer)
    if workers < 2 or total_bytes < PARALLEL_FROM:
        for batch, size in batches:
            yield _encode(tokenizer, batch), size
        return
    pool = [_Worker(tokenizer) for _ in range(workers)]
    idle = deque(pool)
    try:
        with ThreadPoolExecutor(workers) as threads:
            pending: deque[tuple[Future[np.ndarray], int, _Worker]] = deque()
            for batch, size in batches:
                if not idle:
                    future, done, worker = pending.popleft()
                    yield future.result(), done
                    idle.append(worker)
                worker = idle.popleft()
                pending.append((threads.submit(worker.encode, batch), size, worker))
            while pending:
                future, done, _ = pending.popleft()
                yield future.result(), done
    finally:
        for worker in pool:
            worker.close()


Batch = list[tuple[bool, bytes]]  # (starts a document, text)


def _batches(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Batch, int]]:
    batch: Batch = []
    size = 0
    for document in documents:
        for start, end in tokenizer.cuts(document.data):
            batch.append((start == 0, bytes(document.data[start:end])))
            size += end - start
            if size >= BATCH_BYTES:
                yield batch, size
                batch, size = [], 0
    if batch:
        yield batch, size


def _encode(tokenizer: Tokenizer, batch: Batch) -> np.ndarray:
    bos = np.array([tokenizer.bos_id], dtype=np.uint16)
    parts: list[np.ndarray] = []
    for first, text in batch:
        if first:
            parts.append(bos)
        parts.append(tokenizer.encode(text))
    return np.concatenate(parts)


class _Worker:
    def __init__(self, tokenizer: Tokenizer) -> None:
        command = [sys.executable, "-m", "paramgolf.data.encode_pool"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=child_environment(),
            process_group=0,  # Ctrl-C is for the parent, which closes the pipes
        )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to: IO[bytes] = self._process.stdin
        self._from: IO[bytes] = self._process.stdout
        _send(self._to, [(True, tokenizer.to_bytes())])

    def encode(self, batch: Batch) -> np.ndarray:
        try:
            _send(self._to, batch)
            size = struct.unpack("<Q", _exactly(self._from, 8))[0]
            return np.frombuffer(_exactly(self._from, size), dtype=np.uint16)
        except (OSError, EOFError) as error:
            raise GolfError("a tokenising process ended early (out of memory?); use fewer with --workers 1") from error

    def close(self) -> None:
        for stream in (self._to, self._from):
            with contextlib.suppress(OSError):  # it died with data still in the pipe; encode reported that
                stream.close()
        self._process.kill()
        self._process.wait()


def _send(stream: IO[bytes], batch: Batch) -> None:
    stream.write(struct.pack("<Q", len(batch)))
    for first, text in batch:
        stream.write(struct.pack("<?Q", first, len(text)))
        stream.write(text)
    stream.flush()


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError
    return data


def _receive(stream: IO[bytes]) -> Batch | None:
    head = stream.read(8)
    if len(head) < 8:
        return None
    batch: Batch = []
    for _ in range(struct.unpack("<Q", head)[0]):
        first, size = struct.unpack("<?Q", _exactly(stream, 9))
        batch.append((first, _exactly(stream, size)))
    return batch


def _serve() -> None:
    """Body of a worker: the model first, then batches until the pipe closes."""
    source, target = sys.stdin.buffer, sys.stdout.buffer
    model = _receive(source)
    if model is None:
        return
    tokenizer = Tokenizer.from_bytes(model[0][1])
    while (batch := _receive(source)) is not None:
        tokens = _encode(tokenizer, batch).tobytes()
        target.write(struct.pack("<Q", len(tokens)))
        target.write(tokens)
        target.flush()


if __name__ == "__main__":
    _serve()
