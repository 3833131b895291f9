"""Weight codecs by name. Adding one is one file with a class like `codecs.base.Codec` and one line here."""

from __future__ import annotations

from paramgolf.registry import Registry

CODECS = Registry(
    "codec",
    {
        "raw": "paramgolf.pack.codecs.bytecoders:RawCodec",
        "zlib": "paramgolf.pack.codecs.bytecoders:ZlibCodec",
        "zstd": "paramgolf.pack.codecs.bytecoders:ZstdCodec",
        "lzma": "paramgolf.pack.codecs.bytecoders:LzmaCodec",
        "brotli": "paramgolf.pack.codecs.bytecoders:BrotliCodec",
        "rans": "paramgolf.pack.codecs.rans:RansCodec",
        "shuffled": "paramgolf.pack.codecs.archive:ShuffledCodec",
        "grouped": "paramgolf.pack.codecs.archive:GroupedCodec",
    },
)
