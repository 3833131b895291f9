"""Token files in the official format: 256 little-endian int32 words (magic, version, count, zeros), uint16 tokens."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import numpy as np

from paramgolf.errors import GolfError
from paramgolf.files import atomic_path

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4
SHARD_TOKENS = 100_000_000  # tokens in a full shard of the official export; ours are cut at the same size

_AGAIN = "fetch or prepare it again"


def header(count: int) -> bytes:
    """The 1,024 header bytes of a shard of `count` tokens."""
    words = np.zeros(256, dtype="<i4")
    words[:3] = MAGIC, VERSION, count
    return words.tobytes()


def is_shard(path: Path) -> bool:
    """Whether a file begins as a shard does; False for one that cannot be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(4) == header(0)[:4]
    except OSError:
        return False


def read_header(path: str | Path) -> int:
    """The token count a shard states, after checking magic, version and the exact file size (GolfError otherwise)."""
    path = Path(path)
    try:
        with path.open("rb") as stream:
            raw = stream.read(HEADER_BYTES)
            size = stream.seek(0, 2)
    except OSError as error:
        raise GolfError(f"cannot read shard {path}: {error.strerror or error}") from error
    if len(raw) < HEADER_BYTES:
        raise GolfError(f"{path}: truncated: {size} bytes, a shard header alone has {HEADER_BYTES}; {_AGAIN}")
    words = np.frombuffer(raw, dtype="<i4")
    if words[0] != MAGIC or words[1] != VERSION:
        raise GolfError(
            f"{path}: not a token shard (magic {words[0]}, version {words[1]}; expected {MAGIC}, {VERSION}); {_AGAIN}"
        )
    count = int(words[2])
    expected = HEADER_BYTES + 2 * count
    if count < 0 or size != expected:
        state = "truncated" if size < expected else "longer than its header says"
        raise GolfError(f"{path}: {state}: {size} bytes, {expected} expected for {count} tokens; {_AGAIN}")
    return count


def open_shard(path: str | Path, vocab_size: int | None = None) -> np.memmap:
    """The tokens of a shard as a read-only memory map; uint16 (n,). With `vocab_size`, every id is checked."""
    count = read_header(path)
    if count == 0:
        raise GolfError(f"{path}: the shard holds no tokens")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))
    if vocab_size is not None:
        check_ids(tokens, vocab_size, str(path))
    return tokens


def check_ids(tokens: np.ndarray, vocab_size: int, where: str, chunk: int = 1 << 24) -> None:
    """GolfError if any token is not below `vocab_size`."""
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        if int(part.max(initial=0)) >= vocab_size:
            at = start + int(np.argmax(part >= vocab_size))
            raise GolfError(
                f"{where}: token id {int(tokens[at])} at position {at} is outside the vocabulary of {vocab_size};"
                " use the tokenizer the shards were made with"
            )


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Write one shard whole or not at all. `tokens`: integers below 65536, (n,)."""
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) > 0xFFFF):
        raise GolfError(f"{path}: token ids must be between 0 and 65535")
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        stream.write(header(len(tokens)))
        stream.write(np.ascontiguousarray(tokens, dtype="<u2").data)


def write_shards(folder: Path, prefix: str, parts: Iterable[np.ndarray]) -> list[Path]:
    """The stream of `parts` (uint16) as the shards `<prefix>_000000.bin`, ..."""
    with ShardWriter(folder, prefix) as writer:
        for part in parts:
            writer.write(part)
    return writer.paths


class ShardWriter:
    """Writes a stream of tokens as numbered shards `<prefix>_000000.bin`, ... with flat memory. Use with `with`."""

    def __init__(self, folder: Path, prefix: str, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder, self.prefix, self.shard_tokens = folder, prefix, shard_tokens
        self.paths: list[Path] = []
        self.tokens = 0
        self._room = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def write(self, tokens: np.ndarray) -> None:
        """Append uint16 tokens."""
        tokens = np.ascontiguousarray(tokens, dtype="<u2")
        try:
            while len(tokens):
                if self._room == 0:
                    self._open()
                part, tokens = tokens[: self._room], tokens[self._room :]
                self._stream.write(part.data)
                self._room -= len(part)
                self.tokens += len(part)
        except OSError as error:
            raise GolfError(f"cannot write shards in {self.folder}: {error.strerror or error}; free space") from error

    def _open(self) -> None:
        self._close()
        path = self.folder / f"{self.prefix}_{len(self.paths):06d}.bin"
        self.paths.append(path)
        self._stream = path.open("w+b")
        self._stream.write(header(0))
        self._room = self.shard_tokens

    def _close(self) -> None:
        if not self.paths or self._stream.closed:
            return
        with self._stream as stream:
            stream.flush()
            count = (stream.seek(0, 2) - HEADER_BYTES) // 2
            stream.seek(0)
            stream.write(header(count))
        self._room = 0
