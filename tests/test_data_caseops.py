"""CaseOps: the transform, tokenizers that carry it, prepared folders and the layout of published shards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paramgolf.data import caseops
from paramgolf.data.bpe import train_bpe
from paramgolf.data.dataset import Dataset, open_sizes, open_text, prepare
from paramgolf.data.shards import open_shard, write_shard
from paramgolf.data.tokenizer import Tokenizer
from paramgolf.errors import GolfError
from paramgolf.recipe.sections import DataSection
from tests.shared import shared_path

TEXT = (
    "The Quick brown fox JUMPS over the lazy dog. It is McDonald's iPhone, NASA said; THE END of the story. "
    "Every Good Boy Deserves Fruit, and the HTTPServer parses JSON in camelCase.\n"
)
MIXED = st.text(st.sampled_from("abzABZ '-.1é日\u2581\n" + caseops.OPERATORS), max_size=40)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([TEXT.encode() * 30], 420, case_operators=True)


@given(st.one_of(MIXED, st.text(max_size=60)))
def test_the_transform_is_reversible(text: str) -> None:
    encoded = caseops.encode(text)
    assert caseops.decode(encoded) == text
    outside = encoded.replace(caseops.ESCAPE, "").translate(dict.fromkeys(map(ord, caseops.OPERATORS)))
    assert not any("A" <= char <= "Z" for char in outside)


def test_the_rule_by_examples() -> None:
    t, a, n, e = caseops.OPERATORS
    assert caseops.encode("the The THE") == f"the {t}the {a}the"
    assert caseops.encode("A I'm aB ABc") == f"{t}a {t}i'm a{n}b {t}a{n}bc"
    assert caseops.encode("x86_64 É") == "x86_64 É"
    assert caseops.encode(f"A{t}") == f"{t}a{e}{t}"


@pytest.mark.parametrize(
    "text", ["\ue001", "\ue002-", "a\ue001b", "\ue003\ue003a", "\ue001\ue004\ue001", "x\ue004", "\ue004b\ue002c"]
)
def test_what_the_transform_cannot_have_written_is_refused(text: str) -> None:
    with pytest.raises(GolfError, match="CaseOps"):
        caseops.decode(text)


def test_a_capital_may_wait_behind_an_escaped_character() -> None:
    """As the published decoder reads it, which no encoder writes."""
    _, _, n, e = caseops.OPERATORS
    assert caseops.decode(f"{n}{e}éa") == "éA" and caseops.decode(f"a{n}{e}{e}b") == f"a{e}B"
    whole, cut = caseops.CaseDecoder(), caseops.CaseDecoder()
    whole.operator(n), whole.operator(e), cut.operator(n), cut.operator(e)
    assert whole.text("éa".encode()) == b"".join(cut.text(bytes([byte])) for byte in "éa".encode()) == "éA".encode()


@settings(max_examples=200)
@given(st.one_of(MIXED.map(str.encode), st.binary(max_size=40), st.text(max_size=40).map(str.encode)))
def test_our_tokenizer_carries_every_byte_string_and_counts_its_bytes(data: bytes) -> None:
    one = _tokenizer()
    ids = one.encode(data)
    assert one.decode(ids) == data
    step = one.decoder()
    assert b"".join(step(i) for i in ids.tolist()) == data
    sizes = one.sizes(data)
    assert len(sizes) == len(ids) + 1 and sizes[0] == 0 and int(sizes.sum()) == len(data)


_KEPT: list[Tokenizer] = []


def _tokenizer() -> Tokenizer:
    if not _KEPT:
        _KEPT.append(train_bpe([TEXT.encode() * 30], 420, case_operators=True))
    return _KEPT[0]


def test_capitals_share_the_tokens_of_small_letters(tokenizer: Tokenizer) -> None:
    assert tokenizer.reversible and tokenizer.case_operators == caseops.OPERATORS
    small, title, capitals = (tokenizer.encode(word).tolist() for word in ("quick", "Quick", "QUICK"))
    assert title == [tokenizer.pieces.index(caseops.TITLE), *small]
    assert capitals == [tokenizer.pieces.index(caseops.ALLCAPS), *small]
    assert not any("A" <= char <= "Z" for piece in tokenizer.pieces[264:] for char in piece)


def test_the_artifact_form_carries_the_operators(tokenizer: Tokenizer) -> None:
    packed = tokenizer.compact()
    assert packed[:1] == b"\2"
    again = Tokenizer.from_compact(packed)
    assert again.to_bytes() == tokenizer.to_bytes() and again.decode(again.encode(TEXT)) == TEXT.encode()


def test_a_model_without_merges_keeps_capitals() -> None:
    bare = train_bpe([], 264, case_operators=True)
    assert bare.decode(bare.encode("Ab CD")) == b"Ab CD"
    with pytest.raises(GolfError, match="264"):
        train_bpe([], 260, case_operators=True)


def test_long_documents_are_cut_where_the_tokens_do_not_change(tokenizer: Tokenizer) -> None:
    document = ("AbcDEF" * 7 + " Words AND more") * 40
    parts = [document.encode()[a:b] for a, b in tokenizer.cuts(document.encode(), 50)]
    assert len(parts) > 10
    assert np.array_equal(np.concatenate([tokenizer.encode(p) for p in parts]), tokenizer.encode(document))


def test_tokens_that_make_no_sense_decode_to_something(tokenizer: Tokenizer) -> None:
    t, a, n, e = (tokenizer.pieces.index(char) for char in caseops.OPERATORS)
    word = tokenizer.encode("fox ").tolist()
    assert tokenizer.decode([t, a, *word, n, *word]) == b"FOX Fox "
    assert tokenizer.decode([e, t, *word, e]) == caseops.TITLE.encode() + b"fox "


# -- folders ---------------------------------------------------------------------------------------------------------


def prepared(folder: Path, **changes: object) -> Dataset:
    source = folder / "text.jsonl"
    documents = [f"{TEXT} Number {i} of the Documents. " * (1 + i % 3) for i in range(40)]
    source.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    section = DataSection(**{"vocab_size": 400, "val_max_bytes": 3000, "caseops": True, **changes})  # type: ignore[arg-type]
    return prepare(section, source, cache=folder / "cache", workers=1)


def test_a_prepared_folder_has_a_sidecar_that_counts_the_true_bytes(tmp_path: Path) -> None:
    data = prepared(tmp_path)
    sizes = np.concatenate([open_shard(path) for path in data.val_sizes])
    tokens = data.val_tokens()
    assert data.tokenizer.case_operators and len(sizes) == len(tokens)
    assert int(sizes.sum()) == data.val_bytes == data.tokenizer.token_bytes.total(tokens)
    again, true_bytes, documents = open_text(data.root, data.tokenizer)
    assert np.array_equal(again, tokens) and true_bytes == sum(documents) == data.val_bytes
    plain = prepared(tmp_path, caseops=False)
    assert plain.root != data.root and plain.val_sizes == []


def test_a_given_tokenizer_must_have_the_operators(tmp_path: Path) -> None:
    model = tmp_path / "plain.model"
    model.write_bytes(train_bpe([TEXT.encode() * 30], 400).to_bytes())
    with pytest.raises(GolfError, match=r"data\.caseops=true, but .*plain\.model lacks the case operators"):
        prepared(tmp_path, tokenizer=str(model))


def published(folder: Path, tokenizer: Tokenizer) -> Path:
    """A folder in the published layout."""
    folder.mkdir()
    documents = [TEXT.encode(), b"Second DOCUMENT here.", b"third"]
    (folder / "caps.model").write_bytes(tokenizer.to_bytes())
    write_shard(folder / "fineweb_train_000000.bin", tokenizer.encode_documents(documents))
    write_shard(folder / "fineweb_val_000000.bin", tokenizer.encode_documents(documents[1:]))
    write_shard(folder / "fineweb_val_bytes_000000.bin", np.concatenate([tokenizer.sizes(d) for d in documents[1:]]))
    return folder


def test_the_published_layout_is_read_with_its_sidecar(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = published(tmp_path / "shards", tokenizer)
    data = prepare(DataSection(vocab_size=tokenizer.vocab_size), folder, cache=tmp_path / "cache")
    assert [p.name for p in data.val_shards] == ["fineweb_val_000000.bin"] and len(data.train_shards) == 1
    assert data.val_bytes == len(b"Second DOCUMENT here.third")


def test_published_shards_without_a_fitting_sidecar_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = published(tmp_path / "shards", tokenizer)
    section = DataSection(vocab_size=tokenizer.vocab_size)
    sidecar = folder / "fineweb_val_bytes_000000.bin"
    write_shard(sidecar, open_shard(sidecar)[:-1].copy())
    with pytest.raises(GolfError, match="sidecar"):
        prepare(section, folder, cache=tmp_path / "cache")
    sidecar.unlink()
    with pytest.raises(GolfError, match="CaseOps shards without the sidecar"):
        prepare(section, folder, cache=tmp_path / "cache")


def test_the_published_tokenizer(tmp_path: Path) -> None:
    """It normalises: its sidecar, not its table, says how many bytes a token stands for."""
    model = shared_path("tokenizers", "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model")
    one = Tokenizer.load(model)
    assert one.case_operators and not one.reversible
    text = "The Café MENU, dear McDonald: NASA's first €5 Test."
    assert one.decode(one.encode(text)) == text.encode()
    assert int(one.sizes(text.encode()).sum()) == len(text.encode())
    folder = published(tmp_path / "shards", one)
    shard = folder / "fineweb_val_000000.bin"
    for source in (folder, shard):
        tokens, size, documents = open_text(source, one)
        counted = open_sizes(source, one)
        assert counted is not None and size == int(counted.sum()) == 26 and documents == []
        assert len(counted) == len(tokens)
    (folder / "fineweb_val_bytes_000000.bin").unlink()
    with pytest.raises(GolfError, match="without the sidecar"):
        open_text(shard, one)
