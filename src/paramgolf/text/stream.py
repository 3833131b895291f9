"""Files to compressed files and back, block by block: memory does not grow with the file.

Blocks of the model go to worker processes of one thread each when there are several; the rest is done here.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import BinaryIO

import torch

from paramgolf.errors import GolfError
from paramgolf.processors import cpu_count
from paramgolf.text import format as form
from paramgolf.text.blocks import TOLERANCE, TextModel, decode_frame, encode_block, is_text
from paramgolf.text.format import Content, Ending, Frame, Header, StreamReader

BLOCK = 1 << 19
_M_MMAP_THRESHOLD = -3  # malloc.h
WORTH_A_PROCESS = 1 << 15  # bytes of text: less is coded before a process has begun
Progress = Callable[[int], None]
Job = bytes | Frame
_worker: TextModel | None = None


def _start_worker(path: Path, sha256: str) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word; the parent speaks
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _worker = TextModel(path, device="cpu")
    if _worker.sha256 != sha256:
        raise GolfError(f"{path} changed while it was in use")


def _end_with_parent() -> None:
    """A killed parent would leave its workers waiting for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_worker(job: Job, header: Header) -> Job:
    assert _worker is not None
    if isinstance(job, Frame):
        return_large_blocks()
    return _work(job, header, _worker)


def return_large_blocks() -> None:
    """Have glibc give this process's blocks of 128 KiB and more back as they are freed. By itself it soon keeps them,
    and thousands of steps with small memory between them leave holes: a decoder of 0.4 GB grows to 2 GB."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 17)


def _work(job: Job, header: Header, model: TextModel | None) -> Job:
    if isinstance(job, Frame):
        return decode_frame(job, header, model)
    assert model is not None
    return encode_block(job, header, model)


def _heavy(job: Job) -> bool:
    if isinstance(job, Frame):
        return job.by_model and job.raw >= WORTH_A_PROCESS
    return len(job) >= WORTH_A_PROCESS and is_text(job)


class Crew:
    """Runs jobs in order with a look-ahead, in processes once two heavy ones follow each other."""

    def __init__(self, header: Header, model: Callable[[], TextModel], workers: int) -> None:
        self._header, self._model, self._workers = header, model, workers
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def run(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, Job]]:
        """(job, result) in order."""
        waiting: deque[tuple[Job, concurrent.futures.Future[Job] | None]] = deque()
        try:
            for job in jobs:
                waiting.append((job, self._submit(job, waiting)))
                if len(waiting) > self._workers + 1:
                    yield self._result(*waiting.popleft())
            while waiting:
                yield self._result(*waiting.popleft())
        except BrokenProcessPool as error:
            raise GolfError("a worker process ended early, for want of memory perhaps; use --workers 1") from error
        except BaseException:
            self._drop()
            raise
        finally:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)

    def _drop(self) -> None:
        """End the processes: nobody waits for what they are at."""
        for process in list(self._pool._processes.values()) if self._pool is not None else ():
            process.terminate()

    def _submit(
        self, job: Job, waiting: deque[tuple[Job, concurrent.futures.Future[Job] | None]]
    ) -> concurrent.futures.Future[Job] | None:
        if self._workers < 2 or not _heavy(job):
            return None
        if self._pool is None:
            first = next((i for i, (before, _) in enumerate(waiting) if _heavy(before)), None)
            model = self._model()
            if first is None or model.model.tok_emb.weight.is_cuda:
                return None
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self._workers, multiprocessing.get_context("spawn"), _start_worker, (model.path, model.sha256)
            )
            waiting[first] = waiting[first][0], self._pool.submit(_in_worker, waiting[first][0], self._header)
        return self._pool.submit(_in_worker, job, self._header)

    def _result(self, job: Job, future: concurrent.futures.Future[Job] | None) -> tuple[Job, Job]:
        if future is not None:
            return job, future.result()
        needed = not isinstance(job, Frame) or job.by_model
        return job, _work(job, self._header, self._model() if needed else None)


def default_workers() -> int:
    return min(8, cpu_count())


def compress(
    source: BinaryIO,
    target: BinaryIO,
    model: TextModel,
    *,
    tolerance: float = TOLERANCE,
    stride: int = 0,
    workers: int = 1,
    progress: Progress | None = None,
) -> tuple[int, int]:
    """The rest of `source` to `target`; (bytes read, bytes written). `progress` counts the bytes read."""
    header = model.header(Content.FILE, tolerance, stride)
    digest, total = hashlib.sha256(), 0
    written = target.write(header.pack())
    for raw, frame in Crew(header, lambda: model, workers).run(_blocks(source)):
        assert isinstance(raw, bytes) and isinstance(frame, Frame)
        digest.update(raw)
        total += len(raw)
        written += target.write(frame.pack())
        if progress is not None:
            progress(total)
    written += target.write(form.pack_end(total, digest.digest()))
    return total, written


def _blocks(source: BinaryIO) -> Iterator[bytes]:
    while True:
        parts, missing = [], BLOCK
        while missing and (part := source.read(missing)):  # a pipe gives less than it is asked for
            parts.append(part)
            missing -= len(part)
        if missing == BLOCK:
            return
        yield b"".join(parts)


def decompress(
    source: BinaryIO,
    target: BinaryIO,
    find_model: Callable[[], TextModel],
    *,
    where: str,
    workers: int = 1,
    progress: Progress | None = None,
) -> tuple[Header, int]:
    """The content of `source` to `target`; (header, bytes written). `find_model` is called when the model is needed.

    Raises GolfError for whatever is wrong with the file; some of the content may be in `target` then.
    """
    reader, ending = StreamReader(source, where), Ending()
    header = form.read_header(reader)
    found: list[TextModel] = []

    def model() -> TextModel:
        if not found:
            candidate = find_model()
            candidate.check(header, where)
            found.append(candidate)
        return found[0]

    digest, total = hashlib.sha256(), 0
    with one_thread():
        for _, raw in Crew(header, model, workers).run(form.read_frames(reader, ending)):
            assert isinstance(raw, bytes)
            digest.update(raw)
            total += target.write(raw)
            if progress is not None:
                progress(total)
    if digest.digest()[: form.ID_BYTES] != ending.digest:
        raise reader.fault("content that does not match its SHA-256")
    return header, total


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Inside: the small products of one token at a time run on one thread; more only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
