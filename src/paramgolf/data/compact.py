"""The tokenizer as the artifact carries it. First byte: 0 = the model file under lzma, 1 = our own models, coded."""

from __future__ import annotations

import lzma

from paramgolf.errors import GolfError

_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 3, "lp": 0, "pb": 0}]
MAX_MODEL_BYTES = 1 << 26


def pack(model: bytes) -> bytes:
    """The smallest form of a model file that `unpack` turns back into the same bytes."""
    return b"\0" + lzma.compress(model, lzma.FORMAT_RAW, filters=_FILTERS)


def unpack(data: bytes) -> bytes:
    """The model file; GolfError for damaged input."""
    if data[:1] == b"\0":
        try:
            decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS)
            model = decoder.decompress(data[1:], MAX_MODEL_BYTES)
        except lzma.LZMAError as error:
            raise GolfError("the tokenizer in the artifact is damaged; make the artifact again") from error
        if model:
            return model
    raise GolfError("the tokenizer in the artifact is damaged; make the artifact again")
