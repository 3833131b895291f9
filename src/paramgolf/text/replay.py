"""`python -m paramgolf.text.replay ARTIFACT FILE`: the decoding half of a proof, one JSON object on stdout."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import time
from pathlib import Path

from paramgolf.data.sources import SEPARATOR
from paramgolf.errors import GolfError
from paramgolf.text.blocks import TextModel
from paramgolf.text.format import Content, Ending, StreamReader, read_frames, read_header
from paramgolf.text.stream import decompress


def replay(artifact: Path, file: Path) -> dict[str, object]:
    """SHA-256 of each document (of the whole stream if it is one of tokens) and the seconds that decoding took."""
    model, target = TextModel(artifact, device="cpu"), io.BytesIO()
    with file.open("rb") as stream:
        reader = StreamReader(stream, str(file))
        read_header(reader)
        frames = [frame.raw for frame in read_frames(reader, Ending())]
        stream.seek(0)
        began = time.monotonic()
        header, _ = decompress(stream, target, lambda: model, where=str(file))
    seconds, hashes, at = time.monotonic() - began, [], 0
    raw = target.getvalue()
    if header.content is Content.TOKENS:
        hashes = [hashlib.sha256(raw).hexdigest()]
    else:
        for size in frames:
            hashes += [hashlib.sha256(document).hexdigest() for document in raw[at : at + size].split(SEPARATOR)]
            at += size
    return {"sha256": hashes, "seconds": seconds}


if __name__ == "__main__":
    try:
        sys.stdout.write(json.dumps(replay(Path(sys.argv[1]), Path(sys.argv[2]))))
    except GolfError as error:
        sys.exit(str(error))
