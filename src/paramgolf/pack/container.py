"""`model.golf`: one file with weights, tokenizer and configuration. numpy only; nothing in it is executed or unpickled.

Version 1, all integers varints unless said otherwise:

    "GOLF"  version (1 byte)
    manifest: length of the JSON text, length of its coding, deflated JSON (see manifest.py)
    length of each section: codes, scales, kept, tokenizer, then one for each name in manifest["extra"]
    the sections
    16 bytes: BLAKE2b of everything before

codes = the integer weights by manifest["codec"]; scales and kept (unquantised tensors) by side.py; tokenizer = its
compact form. No time, path or host name: equal input gives equal bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from paramgolf.errors import GolfError
from paramgolf.pack import bytecoding
from paramgolf.pack import manifest as manifests
from paramgolf.pack.codecs.base import CodeSpec, CodeTensor
from paramgolf.pack.coding import encode_codes
from paramgolf.pack.ledger import attribute
from paramgolf.pack.registry import CODECS
from paramgolf.pack.side import decode_arrays, encode_arrays
from paramgolf.pack.stored import StoredTensor, TensorSpec
from paramgolf.pack.wire import Reader, varint

MAGIC = b"GOLF"
VERSION = 1
DIGEST_BYTES = 16
BYTE_CODECS = frozenset({"raw", "zlib", "zstd", "lzma", "brotli"})
SECTIONS = ("codes", "scales", "kept", "tokenizer")
MAX_FILE = 1 << 31
# Memory a file may ask for: enough for any real model (all-zero weights included), small for a small hostile file.
FREE_ELEMENTS = 1 << 24
ELEMENTS_PER_BYTE = 4096


@dataclass(frozen=True)
class Artifact:
    """What a `model.golf` holds. `manifest` is plain JSON data of the caller (model, vocab_size, score ...)."""

    manifest: Mapping[str, Any]
    tensors: Sequence[StoredTensor]
    tokenizer: bytes = b""
    extra: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """The bytes of a file before they are written, with the coder chosen and the length of every part."""

    data: bytes
    codec: str
    parts: dict[str, int]


def encode_artifact(artifact: Artifact, codec: str = "auto", level: int = -1) -> Encoded:
    """The whole file as bytes. Raises GolfError on non-finite tensors or a manifest that is not plain JSON."""
    tensors = list(artifact.tensors)
    tensors = [tensors[i] for i in manifests.canonical_order([t.spec for t in tensors])]
    for tensor in tensors:
        tensor.check_finite()
    specs = [t.spec for t in tensors]
    quantised = [t for t in tensors if t.spec.bits]
    # A recipe that names a byte coder gets a file that needs no other library.
    adaptive = codec not in BYTE_CODECS
    coders = tuple(bytecoding.NAMES) if adaptive else (*bytecoding.STANDARD, *bytecoding.LIBRARIES.get(codec, ()))
    code_tensors = [CodeTensor(_code_spec(t.spec, t.scale), t.values) for t in quantised]
    name, codes = encode_codes(code_tensors, codec, level) if quantised else ("raw", b"")
    own: dict[str, Any] = {
        "codec": name,
        "extra": sorted(artifact.extra),
        "stores": manifests.stores_of(specs),
        "tensors": manifests.table_rows(specs),
    }
    clash = sorted(set(own) & set(artifact.manifest))
    if clash:
        raise GolfError(f"the manifest's keys {', '.join(clash)} are the container's own; choose others")
    if manifests.parse_rows(own["tensors"], own["stores"]) != specs:
        raise GolfError("tensors on one grid differ in bits, scale type or packing; give each kind its own grid")
    sections = {
        "codes": codes,
        "scales": encode_arrays([t.scale for t in quantised if t.scale is not None], coders, adaptive),
        "kept": encode_arrays([t.values for t in tensors if not t.spec.bits], coders, adaptive),
        "tokenizer": artifact.tokenizer,
        **{f"extra {key}": artifact.extra[key] for key in own["extra"]},
    }
    manifest = manifests.encode_manifest({**artifact.manifest, **own})
    head = MAGIC + bytes([VERSION]) + manifest + b"".join(varint(len(body)) for body in sections.values())
    data = head + b"".join(sections.values())
    data += _digest(data)
    lengths = {key: len(body) for key, body in sections.items()}
    container = len(data) - len(manifest) - sum(lengths.values())
    return Encoded(data, name, {**lengths, "manifest": len(manifest), "container": container})


def read_artifact(path: str | Path) -> Artifact:
    """The file's contents, every length and the checksum verified. GolfError for anything but a whole artifact."""
    try:
        size = Path(path).stat().st_size
        if size > MAX_FILE:
            raise GolfError(f"{path}: {size} bytes is no artifact; at most {MAX_FILE}")
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a zero in it
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise GolfError(f"cannot read {path}: {reason}; check the path") from error
    return decode_artifact(data, str(path))


def describe_artifact(path: str | Path) -> dict[str, Any]:
    """The manifest's facts and the byte ledger of a file, as plain data: what `golf inspect` shows."""
    artifact = read_artifact(path)
    data = Path(path).read_bytes()
    reader = _open(data, str(path))
    before = len(reader)
    manifests.decode_manifest(reader)
    manifest_bytes = before - len(reader)
    names = [*SECTIONS, *(f"extra {name}" for name in artifact.extra)]
    lengths = {name: reader.varint(len(data)) for name in names}
    parts = {**lengths, "manifest": manifest_bytes, "container": len(data) - manifest_bytes - sum(lengths.values())}
    ledger = attribute(parts, artifact.tensors)
    facts = {key: value for key, value in artifact.manifest.items() if key not in ("stores", "extra")}
    return {**facts, "ledger": ledger.groups, "weights": ledger.weights, "payload_bytes": ledger.payload_bytes}


def decode_artifact(data: bytes, where: str = "the artifact") -> Artifact:
    """Like `read_artifact`, of bytes already in memory; `where` names them in errors.

    The manifest comes back with the container's own keys (codec, extra, stores, tensors) in it.
    """
    reader = _open(data, where)
    manifest = manifests.decode_manifest(reader)
    specs = manifests.parse_rows(manifest.get("tensors"), manifest.get("stores"))
    elements = sum(max(spec.size, math.prod(spec.scale_shape)) for spec in specs)  # rows without columns have scales
    if elements > FREE_ELEMENTS + ELEMENTS_PER_BYTE * len(data):
        raise GolfError(f"{where}: promises {elements} weights in {len(data)} bytes; not a real artifact")
    extras = _extra_names(manifest, reader)
    lengths = [reader.varint(len(data)) for _ in range(len(SECTIONS) + len(extras))]
    if sum(lengths) != len(reader):
        raise reader.fault(f"sections of {sum(lengths)} bytes where there are {len(reader)}")
    bodies = [reader.take(length) for length in lengths]
    tensors = _decode_tensors(specs, manifest.get("codec"), bodies, where)
    return Artifact(manifest, tensors, bodies[3], dict(zip(extras, bodies[len(SECTIONS) :], strict=True)))


def decode_known(
    data: bytes, specs: Sequence[TensorSpec], codec: str, where: str = "the artifact"
) -> list[StoredTensor]:
    """The tensors of a file whose table and codec the caller knows, as who has just written it does."""
    reader = _open(data, where)
    reader.varint(manifests.MAX_BYTES)
    reader.take(reader.varint(len(reader)))
    lengths = [reader.varint(len(data)) for _ in SECTIONS]
    bodies = [reader.take(length) for length in lengths]
    return _decode_tensors([specs[i] for i in manifests.canonical_order(specs)], codec, bodies, where)


def _open(data: bytes, where: str) -> Reader:
    """A reader after magic and version, with the checksum verified and cut off."""
    if data[: len(MAGIC)] != MAGIC:
        raise GolfError(f"{where}: not a model.golf file; give the artifact that `golf run` wrote")
    if len(data) <= len(MAGIC) + 1 + DIGEST_BYTES:
        raise GolfError(f"{where}: cut short at {len(data)} bytes; get the file again")
    version = data[len(MAGIC)]
    if version != VERSION:
        raise GolfError(f"{where}: artifact version {version}, this program reads version {VERSION}; update paramgolf")
    if _digest(data[:-DIGEST_BYTES]) != data[-DIGEST_BYTES:]:
        raise GolfError(f"{where}: the checksum does not match, the file is truncated or damaged; get it again")
    reader = Reader(memoryview(data)[:-DIGEST_BYTES], where)
    reader.take(len(MAGIC) + 1)
    return reader


def _extra_names(manifest: Mapping[str, Any], reader: Reader) -> list[str]:
    names = manifest.get("extra")
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or names != sorted(set(names)):
        raise reader.fault("a bad list of extra sections")
    return names


def _decode_tensors(specs: list[TensorSpec], codec: object, bodies: list[bytes], where: str) -> list[StoredTensor]:
    if not isinstance(codec, str) or codec not in CODECS:
        raise GolfError(f"{where}: coded with '{str(codec)[:40]}', which this program does not have; update paramgolf")
    quantised = [s for s in specs if s.bits]
    kept = [s for s in specs if not s.bits]
    scales = decode_arrays(bodies[1], [(s.scale_dtype, s.scale_shape) for s in quantised], f"{where} (scales)")
    values = decode_arrays(bodies[2], [(s.store, s.shape) for s in kept], f"{where} (kept tensors)")
    code_specs = [_code_spec(s, scale) for s, scale in zip(quantised, scales, strict=True)]
    try:
        codes = CODECS[codec]().decode(bodies[0], code_specs)
    except (ValueError, IndexError, OverflowError, MemoryError, ArithmeticError) as error:
        raise GolfError(f"{where}: damaged {codec} weights ({error}); get the file again") from error
    found = {s.name: StoredTensor(s, c, scale) for s, c, scale in zip(quantised, codes, scales, strict=True)}
    found |= {s.name: StoredTensor(s, v) for s, v in zip(kept, values, strict=True)}
    for tensor in found.values():
        tensor.check_finite()
    return [found[s.name] for s in specs]


def _code_spec(spec: TensorSpec, scale: np.ndarray | None) -> CodeSpec:
    return CodeSpec(spec.name, spec.shape, spec.bits, spec.packed, scale)


def _digest(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
