"""The artifact: everything comes back, every byte is accounted for, a damaged or hostile file is one clear error."""

from __future__ import annotations

import dataclasses
import json
import resource
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paramgolf.errors import GolfError
from paramgolf.files import sha256_file
from paramgolf.pack import manifest as manifests
from paramgolf.pack.container import (
    DIGEST_BYTES,
    Artifact,
    _digest,
    decode_artifact,
    describe_artifact,
    encode_artifact,
    read_artifact,
)
from paramgolf.pack.ledger import attribute, group_of
from paramgolf.pack.stored import StoredTensor, TensorSpec
from paramgolf.pack.wire import varint
from paramgolf.runner.summary import artifact_facts, inspect_text

MANIFEST = {"format": "paramgolf", "name": "tiny", "vocab_size": 64, "model": {"dim": 16, "qk_gain": 1.5, "parts": {}}}


def tensors() -> list[StoredTensor]:
    draw = np.random.default_rng(7)

    def codes(name: str, shape: tuple[int, ...], bits: int = 6, store: str = "int6") -> StoredTensor:
        limit = (1 << (bits - 1)) - 1
        values = np.clip(np.rint(draw.standard_normal(shape) * limit / 3), -limit, limit).astype(np.int8)
        spec = TensorSpec(name, shape, store, bits)
        return StoredTensor(spec, values, np.asarray(draw.random(spec.scale_shape), np.float16))

    def kept(name: str, shape: tuple[int, ...], dtype: str) -> StoredTensor:
        return StoredTensor(TensorSpec(name, shape, dtype), np.asarray(draw.standard_normal(shape)).astype(dtype))

    out = [kept("skip_weights", (1, 16), "float32"), codes("tok_emb.weight", (64, 16), 8, "int8")]
    for layer in range(3):
        out += [
            kept(f"blocks.{layer}.attn_scale", (16,), "float32"),
            codes(f"blocks.{layer}.attn.c_q.weight", (16, 16)),
            codes(f"blocks.{layer}.mlp.fc.weight", (32, 16))
            if layer
            else kept("blocks.0.mlp.fc.weight", (32, 16), "float16"),
        ]
    return [*out, kept("bigram.scale", (), "float16"), kept("seen", (2,), "int64")]


ARTIFACT = Artifact(MANIFEST, tensors(), b"tokenizer bytes", {"notes": b"n" * 40, "empty": b""})
ENCODED = encode_artifact(ARTIFACT, "zstd")
DATA = ENCODED.data


def sealed(data: bytes) -> bytes:
    """A damaged file whose checksum is right again, so that the damage reaches the parser."""
    return data[:-DIGEST_BYTES] + _digest(data[:-DIGEST_BYTES])


def with_manifest(change: dict[str, object] | bytes) -> bytes:
    """The test file with keys of its manifest replaced, or with other bytes for JSON."""
    encoded = encode_artifact(ARTIFACT, "zstd")
    start, size = 5, encoded.parts["manifest"]
    manifest = dict(decode_artifact(DATA).manifest)
    text = change if isinstance(change, bytes) else json.dumps({**manifest, **change}, separators=(",", ":")).encode()
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, manifests.DICTIONARY_V1)
    coded = packer.compress(text) + packer.flush()
    return sealed(DATA[:start] + varint(len(text)) + varint(len(coded)) + coded + DATA[start + size :])


def test_everything_comes_back(tmp_path: Path) -> None:
    (tmp_path / "m.golf").write_bytes(DATA)
    back = read_artifact(tmp_path / "m.golf")
    assert {key: back.manifest[key] for key in MANIFEST} == MANIFEST
    assert back.tokenizer == ARTIFACT.tokenizer and back.extra == ARTIFACT.extra
    originals = {t.name: t for t in tensors()}
    assert {t.name for t in back.tensors} == set(originals)
    for tensor in back.tensors:
        original = originals[tensor.name]
        assert tensor.spec == original.spec
        assert tensor.values.dtype == original.values.dtype and np.array_equal(tensor.values, original.values)
        assert np.array_equal(tensor.dequantised(), original.dequantised())


@pytest.mark.parametrize("codec", ["raw", "zlib", "zstd", "lzma", "brotli", "auto"])
def test_every_codec_and_equal_bytes_for_equal_input(codec: str) -> None:
    first, second = encode_artifact(ARTIFACT, codec), encode_artifact(ARTIFACT, codec)
    assert first.data == second.data
    back = {t.name: t.values for t in decode_artifact(first.data).tensors}
    assert all(np.array_equal(back[t.name], t.values) for t in tensors())


def test_order_of_the_tensors_within_a_kind_does_not_matter() -> None:
    shuffled = [t for t in tensors() if t.name.startswith("blocks.2")] + [
        t for t in tensors() if "blocks.2" not in t.name
    ]
    assert {
        t.name for t in decode_artifact(encode_artifact(dataclasses.replace(ARTIFACT, tensors=shuffled)).data).tensors
    } == {t.name for t in tensors()}


def test_ledger_sums_to_the_file_and_names_groups(tmp_path: Path) -> None:
    (tmp_path / "m.golf").write_bytes(DATA)
    ledger = attribute(ENCODED.parts, ARTIFACT.tensors)
    assert sum(ledger.groups.values()) == ledger.file_bytes == len(DATA)
    assert ledger.groups["tokenizer"] == len(b"tokenizer bytes") and ledger.groups["extra"] == 40
    assert {"embedding", "attention.q", "mlp.up", "control", "scales", "parts", "manifest", "container"} <= set(
        ledger.groups
    )
    assert min(ledger.groups.values()) >= 0
    assert ledger.groups["manifest"] + ledger.groups["container"] < 400
    facts = describe_artifact(tmp_path / "m.golf")
    assert facts["ledger"] == ledger.groups and facts["model"] == MANIFEST["model"]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("tok_emb.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("blocks.11.attn.proj.weight", "attention.o"),
        ("blocks.0.mlp.proj.weight", "mlp.down"),
        ("blocks.0.attn.q_gain", "control"),
        ("bigram.embed.weight", "parts"),
        ("blocks.3.mlp.fc.weight.lqer_a", "corrections"),
        ("tok_emb.weight.awq_64", "corrections"),
    ],
)
def test_groups(name: str, group: str) -> None:
    assert group_of(name) == group


def test_no_tensors_no_tokenizer() -> None:
    back = decode_artifact(encode_artifact(Artifact({}, [])).data)
    assert back.tensors == [] and back.tokenizer == b"" and back.extra == {}


def test_all_zero_and_empty_tensors() -> None:
    zero = [
        StoredTensor(TensorSpec("w", (64, 64), "q", 4), np.zeros((64, 64), np.int8), np.ones(64, np.float16)),
        StoredTensor(TensorSpec("e", (0, 8), "q", 4), np.zeros((0, 8), np.int8), np.ones(0, np.float16)),
        StoredTensor(TensorSpec("v", (0,), "float32"), np.zeros(0, np.float32)),
    ]
    back = {t.name: t for t in decode_artifact(encode_artifact(Artifact({}, zero)).data).tensors}
    assert back["w"].values.shape == (64, 64) and not back["w"].values.any() and back["e"].values.shape == (0, 8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_numbers_are_neither_written_nor_read(bad: float) -> None:
    tensor = StoredTensor(TensorSpec("gain", (2,), "float32"), np.array([1.0, bad], np.float32))
    with pytest.raises(GolfError, match="tensor gain: non-finite"):
        encode_artifact(Artifact({}, [tensor]))
    with pytest.raises(GolfError, match="plain finite JSON"):
        encode_artifact(Artifact({"qk_gain": bad}, []))
    for text in (b'{"a":NaN}', b'{"a":-Infinity}', b'{"a":1e999}'):
        with pytest.raises(GolfError, match="the number"):
            decode_artifact(with_manifest(text))


def test_a_tensor_of_infinity_in_a_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = StoredTensor(TensorSpec("gain", (2,), "float32"), np.array([1.0, np.inf], np.float32))
    with monkeypatch.context() as patch:
        patch.setattr(StoredTensor, "check_finite", lambda self: None)
        data = encode_artifact(Artifact({}, [tensor])).data
    with pytest.raises(GolfError, match="gain"):
        decode_artifact(data)


def test_manifest_values_must_be_plain_and_not_the_containers() -> None:
    with pytest.raises(GolfError, match="plain finite JSON"):
        encode_artifact(Artifact({"path": Path("x")}, []))
    with pytest.raises(GolfError, match="codec are the container's own"):
        encode_artifact(Artifact({"codec": "raw"}, []))


def test_newer_version_and_other_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(GolfError, match="version 2, this program reads version 1; update"):
        decode_artifact(sealed(DATA[:4] + b"\x02" + DATA[5:]))
    (tmp_path / "x").write_bytes(b"PK\x03\x04 something else entirely, long enough to be a file")
    with pytest.raises(GolfError, match=r"not a model\.golf file"):
        read_artifact(tmp_path / "x")
    with pytest.raises(GolfError, match="cannot read"):
        read_artifact(tmp_path / "missing")
    with pytest.raises(GolfError):
        read_artifact(tmp_path)


def test_every_truncation_is_refused() -> None:
    for length in range(len(DATA)):
        with pytest.raises(GolfError):
            decode_artifact(DATA[:length])


def test_every_flipped_byte_is_refused() -> None:
    for place in range(0, len(DATA), 3):
        with pytest.raises(GolfError):
            decode_artifact(DATA[:place] + bytes([DATA[place] ^ 0x10]) + DATA[place + 1 :])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_under_a_right_checksum_gives_one_error_or_a_sound_artifact(data: st.DataObject) -> None:
    body = bytearray(DATA[:-DIGEST_BYTES])
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        at = data.draw(st.integers(4, max(4, len(body) - 1)))
        if kind == "flip" and at < len(body):
            body[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del body[at : at + data.draw(st.integers(1, 30))]
        else:
            body[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    try:
        back = decode_artifact(bytes(body) + _digest(bytes(body)))
    except GolfError as error:
        assert "\n" not in str(error)
        return
    for tensor in back.tensors:
        assert tensor.values.shape == tensor.spec.shape and np.isfinite(tensor.dequantised()).all()


HUGE = 2**31
HOSTILE: dict[str, dict[str, object] | bytes] = {
    "huge tensor": {"tensors": [["w", [HUGE], "float32"]]},
    "huge product": {"tensors": [["w", [HUGE, HUGE, HUGE, HUGE], "float32"]]},
    "rows without columns": {
        "tensors": [["w", [HUGE >> 4, 0], "int6"], ["kept", [24], "float16"]],
        "stores": {"int6": [6, "float16", False]},
    },
    "huge layers": {"tensors": [["blocks.#.w", [1], "float32", 0, 2**40]]},
    "many tensors": {"tensors": [[f"blocks.#.w{i}", [], "float32", 0, 4000] for i in range(40)]},
    "negative side": {"tensors": [["w", [-1], "float32"]]},
    "float side": {"tensors": [["w", [1.0], "float32"]]},
    "true side": {"tensors": [["w", [True], "float32"]]},
    "axes": {"tensors": [["w", [1] * 9, "float32"]]},
    "same tensor twice": {"tensors": [["w", [1], "float32"], ["w", [1], "float32"]]},
    "same layer twice": {"tensors": [["blocks.#.w", [1], "float32", 0, 2], ["blocks.#.w", [1], "float16", 2, 3]]},
    "path as name": {"tensors": [["../../w", [1], "float32"]]},
    "object type": {"tensors": [["w", [1], "object"]]},
    "no table": {"tensors": None},
    "table of numbers": {"tensors": [1, 2]},
    "grid of 99 bits": {"stores": {"int6": [99, "float16", False], "int8": [8, "float16", False]}},
    "grid named float32": {"stores": {"float32": [6, "float16", False]}},
    "packed 8 bits": {"stores": {"int6": [6, "float16", False], "int8": [8, "float16", True]}},
    "unknown codec": {"codec": "evil"},
    "codec not a name": {"codec": ["raw"]},
    "extra twice": {"extra": ["a", "a"]},
    "extra numbers": {"extra": [1]},
    "extra missing": {"extra": None},
    "deep JSON": b"[" * 100_000,
    "deep JSON behind a string": b'["' + b"]" * 50_000 + b'",' + b"[" * 50_000,
    "long digits": b'{"a":' + b"9" * 100_000 + b"}",
    "key twice": b'{"codec":"raw","codec":"zstd"}',
    "not JSON": b"\xff\xfe",
    "a list": b"[]",
    "empty": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests_give_one_line_and_no_memory(name: str) -> None:
    data = with_manifest(HOSTILE[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(GolfError):
        decode_artifact(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_manifest_bomb_is_cut_off() -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, manifests.DICTIONARY_V1)
    coded = packer.compress(b" " * (1 << 26)) + packer.flush()
    for promised in (10, manifests.MAX_BYTES, 1 << 26):
        with pytest.raises(GolfError):
            decode_artifact(sealed(DATA[:5] + varint(promised) + varint(len(coded)) + coded + bytes(DIGEST_BYTES)))


@given(
    st.dictionaries(
        st.sampled_from(
            ["blocks.0.a", "blocks.1.a", "blocks.2.a", "blocks.10.a", "blocks.1.b.c", "x", "blocks.x", "y.z"]
        ),
        st.sampled_from([((4, 4), "q"), ((4, 8), "q"), ((4, 4), "float16"), ((), "float32")]),
    )
)
def test_tensor_table_round_trip(table: dict[str, tuple[tuple[int, ...], str]]) -> None:
    specs = [TensorSpec(n, shape, store, 6 if store == "q" else 0) for n, (shape, store) in table.items()]
    specs = [specs[i] for i in manifests.canonical_order(specs)]
    assert manifests.parse_rows(manifests.table_rows(specs), manifests.stores_of(specs)) == specs


def test_what_a_file_says_of_itself_never_replaces_what_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "model.golf"
    claims = {"model": {"dim": 16}, "sha256": "0" * 64, "bytes": 7, "path": "official/model.golf", "ledger": {"x": 1}}
    path.write_bytes(encode_artifact(Artifact(claims, tensors(), b"tokenizer bytes", {})).data)
    facts = artifact_facts(path)
    size = path.stat().st_size
    assert (facts["path"], facts["bytes"], facts["sha256"]) == (str(path), size, sha256_file(path))
    assert sum(facts["ledger"].values()) == size
    assert "official" not in inspect_text(facts)
    path.write_bytes(encode_artifact(Artifact({"model": 3}, tensors(), b"tokenizer bytes", {})).data)
    with pytest.raises(GolfError, match="says nothing of a model"):
        artifact_facts(path)
