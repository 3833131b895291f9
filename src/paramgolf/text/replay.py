"""`python -m paramgolf.text.replay ARTIFACT FILE DIGESTS`: the decoding half of a proof, one JSON object on stdout.

Writes the SHA-256 of each document (of the whole stream if it is one of tokens) to DIGESTS, 32 bytes each.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import BinaryIO, cast

from paramgolf.data.sources import SEPARATOR
from paramgolf.errors import GolfError
from paramgolf.text.blocks import TextModel
from paramgolf.text.format import Content, StreamReader, read_header
from paramgolf.text.stream import decompress, default_workers, return_large_blocks


class DocumentHashes:
    """A file to write decoded content to, which keeps of each document its hash."""

    def __init__(self, content: Content, target: BinaryIO) -> None:
        self._split, self._target = content is Content.DOCUMENTS, target
        self._document, self.whole = hashlib.sha256(), hashlib.sha256()
        self._held = b""  # what may be the first half of a separator

    def write(self, data: bytes) -> int:
        self.whole.update(data)
        if not self._split:
            return len(data)
        *ended, rest = (self._held + data).split(SEPARATOR)
        for part in ended:
            self._document.update(part)
            self._end()
        half = rest.endswith(SEPARATOR[:1])
        self._held = SEPARATOR[:1] if half else b""
        self._document.update(rest[:-1] if half else rest)
        return len(data)

    def _end(self) -> None:
        self._target.write(self._document.digest())
        self._document = hashlib.sha256()

    def finish(self) -> str:
        """The SHA-256 of everything, hexadecimal."""
        if not self._split:
            self._target.write(self.whole.digest())
        else:
            self._document.update(self._held)
            self._end()
        return self.whole.hexdigest()


def replay(artifact: Path, file: Path, digests: Path) -> dict[str, object]:
    """Decode, hash; how long decoding took."""
    model = TextModel(artifact, device="cpu")
    with file.open("rb") as stream, digests.open("wb") as target:
        header = read_header(StreamReader(stream, str(file)))
        stream.seek(0)
        hashes, began = DocumentHashes(header.content, target), time.monotonic()
        decompress(stream, cast(BinaryIO, hashes), lambda: model, where=str(file), workers=default_workers())
        return {"sha256": hashes.finish(), "seconds": time.monotonic() - began}


if __name__ == "__main__":
    return_large_blocks()
    try:
        sys.stdout.write(json.dumps(replay(*map(Path, sys.argv[1:4]))))
    except GolfError as error:
        sys.exit(str(error))
