"""The artifact's manifest: compact canonical JSON, deflated against a frozen dictionary, read with every limit checked.

Full values are stored, never differences to today's defaults, so that an old file keeps its meaning; the dictionary
makes the usual ones nearly free. It belongs to container version 1: never change it, a new version gets a new one.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from paramgolf import strict_json
from paramgolf.errors import GolfError
from paramgolf.pack.stored import PLAIN_DTYPES, TensorSpec
from paramgolf.pack.wire import Reader, varint

MAX_BYTES = 1 << 18  # of the JSON text
MAX_TENSORS = 20_000
MAX_LAYERS = 4096
MAX_AXES = 4
MAX_DEPTH = 12  # nesting of the JSON text

_FLOATS = ("float16", "float32")
_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,200}")

DICTIONARY_V1 = (
    b'[["blocks.#.ln_scale",[384],"int8"],["bigram.scale",[],"float32"],["bigram.embed.weight",[4096,128],"int4"],'
    b'["bigram.proj.weight",[512,128],"float16"],["smear.gate",[512],"float32"],["lm_head.weight",[1024,512],"int8"],'
    b'"extra":["],"int8":{"bits":8,"clip":"quantile","clip_value":0.9999984,"floor":0.007874015748031496,"eps":1e-08,'
    b'"low_code":"full","round_scale_first":false,"scale_dtype":"float32","packed":true,"search","eps":1e-12,'
    b'"rope_ref_len":1024,"activation":"swiglu","relu","gelu","tie_embeddings":false,"init":"orthogonal",'
    b'"skips":"none",'
    b'"parts":{"bigram":{"smear":{},"zlib","zstd","lzma","brotli","raw","baseline","pr107","pr114","pr128","pr137",'
    b'"dtype":"bfloat16","auto","seq_len":2048,"stride":256,"seq_len":512,"seq_len":256,'
    b'{"format":"paramgolf","name":"pocket","vocab_size":1024,"model":{"dim":512,"num_layers":9,"num_heads":8,'
    b'"num_kv_heads":4,"mlp_hidden":1024,"activation":"relu2","rope_base":10000.0,"rope_ref_len":0,"qk_gain":1.5,'
    b'"logit_softcap":30.0,"tie_embeddings":true,"embed_init_std":0.005,"init":"default","skips":"unet",'
    b'"norm_eps":1.1920929e-07,"parts":{}},"score":{"seq_len":1024,"stride":64,"dtype":"float32"},'
    b'"tokenizer":"compact",'
    b'"grids":{"int6":{"bits":6,"clip":"sdclip","clip_value":10.0,"floor":0.0,"eps":0.0,"scale_dtype":"float16",'
    b'"round_scale_first":true,"low_code":"symmetric","packed":false},"rowmax"},"codec":"rans","extra":[],'
    b'"stores":{"int6":[6,"float16",false]},"tensors":[["skip_weights",[4,512],"float32"],'
    b'["tok_emb.weight",[1024,512],"int6"],["blocks.#.attn_scale",[512],"float16",0,8],["blocks.#.mlp_scale",[512],'
    b'"float16",0,8],["blocks.#.resid_mix",[2,512],"float16",0,8],["blocks.#.attn.q_gain",[8],"float16",0,8],'
    b'["blocks.#.attn.c_q.weight",[512,512],"int6",0,8],["blocks.#.attn.c_k.weight",[256,512],"int6",0,8],'
    b'["blocks.#.attn.c_v.weight",[256,512],"int6",0,8],["blocks.#.attn.proj.weight",[512,512],"int6",0,8],'
    b'["blocks.#.mlp.fc.weight",[1024,512],"int6",0,8],["blocks.#.mlp.proj.weight",[512,1024],"int6",0,8]]}'
)


def canonical_order(specs: Sequence[TensorSpec]) -> list[int]:
    """Indices that bring all layers of a tensor together, first appearance first."""
    rank: dict[str, int] = {}
    keys = []
    for index, spec in enumerate(specs):
        found = _BLOCK.match(spec.name)
        template = f"blocks.#.{found.group(2)}" if found else spec.name
        keys.append((rank.setdefault(template, len(rank)), int(found.group(1)) if found else -1, index))
    return [index for _, _, index in sorted(keys)]


def table_rows(specs: Sequence[TensorSpec]) -> list[list[Any]]:
    """Tensor table of specs in canonical order: [name, shape, store], alike layers as one row with first and last.

    Other plain types than float16 and float32 are marked "=int8", as "int8" is what people call a grid.
    """
    rows: list[list[Any]] = []
    for spec in specs:
        if not _NAME.fullmatch(spec.name):
            raise GolfError(f"tensor name {spec.name!r} cannot be stored; use letters, digits, dots, dashes")
        found = _BLOCK.match(spec.name)
        store = spec.store if spec.bits or spec.store in _FLOATS else f"={spec.store}"
        if not found:
            rows.append([spec.name, list(spec.shape), store])
            continue
        row, layer = [f"blocks.#.{found.group(2)}", list(spec.shape), store], int(found.group(1))
        if rows and rows[-1][:3] == row and rows[-1][4] == layer - 1:
            rows[-1][4] = layer
        else:
            rows.append([*row, layer, layer])
    return rows


def parse_rows(rows: object, stores: object) -> list[TensorSpec]:
    """The specs of a file's tensor table. Raises GolfError for anything not written by `table_rows`."""
    grids = _parse_stores(stores)
    specs: list[TensorSpec] = []
    seen: set[str] = set()
    for row in _sequence(rows, "tensor table"):
        fields = _sequence(row, "tensor row")
        _check(len(fields) in (3, 5), "tensor row")
        name, shape, store = fields[0], _shape(fields[1]), fields[2]
        _check(isinstance(name, str) and isinstance(store, str), "tensor row")
        names = [name]
        if len(fields) == 5:
            first, last = _number(fields[3], MAX_LAYERS), _number(fields[4], MAX_LAYERS)
            _check(first <= last and name.startswith("blocks.#.") and name.count("#") == 1, "layers of a tensor")
            names = [name.replace("#", str(layer)) for layer in range(first, last + 1)]
        _check(len(specs) + len(names) <= MAX_TENSORS, "number of tensors")
        for full in names:
            _check(_NAME.fullmatch(full) is not None and full not in seen, "tensor name")
            seen.add(full)
            specs.append(_spec(full, shape, store, grids))
    return specs


def stores_of(specs: Sequence[TensorSpec]) -> dict[str, list[Any]]:
    """What a decoder must know of each grid in use: name -> [bits, scale type, packed]. Packed is by matrix only."""
    grids: dict[str, list[Any]] = {}
    for spec in specs:
        if spec.bits:
            entry = grids.setdefault(spec.store, [spec.bits, spec.scale_dtype, False])
            entry[2] = entry[2] or spec.packed
    return grids


def _spec(name: str, shape: tuple[int, ...], store: str, grids: Mapping[str, tuple[int, str, bool]]) -> TensorSpec:
    if store in grids:
        bits, scale_dtype, packed = grids[store]
        return TensorSpec(name, shape, store, bits, scale_dtype, packed and len(shape) >= 2)
    plain = store if store in _FLOATS else store.removeprefix("=")
    _check(plain in PLAIN_DTYPES and (plain in _FLOATS) == (plain == store), "type of a tensor")
    return TensorSpec(name, shape, plain)


def _parse_stores(stores: object) -> dict[str, tuple[int, str, bool]]:
    _check(isinstance(stores, dict), "grids")
    assert isinstance(stores, dict)
    grids = {}
    for name, entry in stores.items():
        fields = _sequence(entry, "grid")
        _check(len(fields) == 3 and fields[1] in ("float16", "float32") and isinstance(fields[2], bool), "grid")
        bits = _number(fields[0], 8)
        _check(bits >= 2 and (bits == 6 or not fields[2]) and name not in _FLOATS and name[:1] != "=", "grid")
        grids[name] = bits, fields[1], fields[2]
    return grids


def _shape(value: object) -> tuple[int, ...]:
    sides = _sequence(value, "shape")
    _check(len(sides) <= MAX_AXES, "shape")
    return tuple(_number(side, 1 << 31) for side in sides)


def _sequence(value: object, what: str) -> list[Any]:
    _check(isinstance(value, list) and len(value) <= MAX_TENSORS, what)
    assert isinstance(value, list)
    return value


def _number(value: object, limit: int) -> int:
    _check(type(value) is int and 0 <= value <= limit, "number")
    assert isinstance(value, int)
    return value


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise GolfError(f"not a valid artifact: bad {what} in its manifest; get the file again")


def encode_manifest(manifest: Mapping[str, Any]) -> bytes:
    """Length-prefixed bytes. Raises GolfError when a value is not plain JSON (non-finite numbers included)."""
    try:
        text = json.dumps(manifest, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise GolfError(f"the artifact's manifest must be plain finite JSON values: {error}") from error
    if len(text) > MAX_BYTES:
        raise GolfError(f"the artifact's manifest is {len(text)} bytes; at most {MAX_BYTES}: put large data into extra")
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, DICTIONARY_V1)
    coded = packer.compress(text) + packer.flush()
    return varint(len(text)) + varint(len(coded)) + coded


def decode_manifest(reader: Reader) -> dict[str, Any]:
    """The manifest at the reader's place; GolfError on damage, depth, duplicate keys or non-finite numbers."""
    size = reader.varint(MAX_BYTES)
    coded = reader.take(reader.varint(len(reader)))
    inflater = zlib.decompressobj(-15, DICTIONARY_V1)
    try:
        text = inflater.decompress(coded, size + 1)
    except zlib.error as error:
        raise reader.fault("a damaged manifest") from error
    if len(text) != size or not inflater.eof or inflater.unused_data:
        raise reader.fault("a manifest of the wrong length")
    try:
        _check_depth(text)
        manifest = strict_json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise reader.fault(f"a manifest that is not plain JSON ({error})") from error
    _check(isinstance(manifest, dict), "top level")
    return manifest


def _check_depth(text: bytes) -> None:
    depth = 0
    for byte in _STRING.sub(b"", text):
        depth += (byte in b"[{") - (byte in b"]}")
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key twice")
    return table
