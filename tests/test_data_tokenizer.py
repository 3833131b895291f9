"""Tokenizers: exact for every byte string, honest about bytes, small in the artifact."""

from __future__ import annotations

import contextlib
import itertools
import resource
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paramgolf.data import builtin, compact
from paramgolf.data.bpe import train_bpe
from paramgolf.data.range_coder import Encoder, Number
from paramgolf.data.sp_model import build, own_pieces, parse
from paramgolf.data.tokenizer import Tokenizer
from paramgolf.errors import GolfError
from tests.shared import shared_path

AWKWARD = [
    b"",
    b" ",
    b"\0",
    b"\n\r\t\x0b\x1e\x1f\x7f",
    b"  two  blanks  ",
    "\u2581".encode(),
    "a\u2581b \u2581\u2581 c".encode(),
    "\u2585\ufffd\ufeff\u200b".encode(),
    b"<s></s><unk><pad><0x41>",
    "𝔘ñïçødé 漢字 🙂‍🙃".encode(),
    "e\u0301 \u00e9 \ufb01 \u212b".encode(),
    b"\xff\xfe\x80abc\xc3",
    b"\xed\xa0\x80\xf4\x90\x80\x80",
    bytes(range(256)),
]


@lru_cache
def english(vocab_size: int = 700) -> Tokenizer:
    documents = [bytes(d.data) for d in builtin.documents() if d.name.startswith("pydoc/")]
    return train_bpe(documents, vocab_size)


@lru_cache
def tokenizers() -> list[Tokenizer]:
    """Trained on text, on text without blanks, and on nothing."""
    return [english(), train_bpe([b"abcabcabcabcxyzxyz" * 20], 280), train_bpe([], 260)]


@lru_cache
def packed() -> bytes:
    return english().compact()


def check_exact(tokenizer: Tokenizer, data: bytes) -> None:
    ids = tokenizer.encode(data)
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids) == data
    stream = np.concatenate([np.array([tokenizer.bos_id], np.uint16), ids])
    assert tokenizer.token_bytes.total(stream) == len(data)
    assert (ids >= 4).all()  # no control or unknown token


@pytest.mark.parametrize("data", AWKWARD)
def test_awkward_input_comes_back(data: bytes) -> None:
    for tokenizer in tokenizers():
        assert tokenizer.reversible
        check_exact(tokenizer, data)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_come_back(data: bytes) -> None:
    for tokenizer in tokenizers():
        check_exact(tokenizer, data)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab \n\u2581\u2585\u00a0\u3000\0the.é") | st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text: str) -> None:
    for tokenizer in tokenizers():
        check_exact(tokenizer, text.encode())
        assert (tokenizer.encode(text) == tokenizer.encode(text.encode())).all()


def test_special_ids_and_frequent_words() -> None:
    tokenizer = english()
    assert tokenizer.pieces[:4] == ["<pad>", "<s>", "</s>", "<unk>"]
    assert tokenizer.bos_id == 1
    assert tokenizer.vocab_size == 700
    assert len(tokenizer.encode(" the object")) <= 3
    assert len(tokenizer.encode("        return")) < 6  # runs of blanks are pieces
    assert len(tokenizer.encode("2024")) == 4  # digits are split


def test_digits_can_be_merged() -> None:
    text = [b"in 2024 and 2024 and 2024 and 2024 " * 20]
    assert len(train_bpe(text, 320).encode("2024")) == 4
    assert len(train_bpe(text, 320, split_digits=False).encode("2024")) < 4


def test_training_depends_on_the_text_only() -> None:
    text = [b"a rose is a rose is a rose " * 30]
    assert train_bpe(text, 300).to_bytes() == train_bpe(text, 300).to_bytes()


def test_tokens_are_those_of_sentencepiece() -> None:
    tokenizer = english()
    for document in builtin.documents():
        text = bytes(document.data).decode()
        if document.name.startswith("json/") and "\u2581" not in text:
            assert (tokenizer.encode(text) == np.array(tokenizer._processor.encode(text))).all()


def test_cutting_a_document_changes_nothing() -> None:
    tokenizer = english()
    document = b"".join(bytes(d.data) for d in builtin.documents() if d.name.startswith("pydoc/t"))
    spans = list(tokenizer.cuts(document, 1000))
    assert len(spans) > 10
    assert b"".join(document[a:b] for a, b in spans) == document
    parts = np.concatenate([tokenizer.encode(document[a:b]) for a, b in spans])
    assert (parts == tokenizer.encode(document)).all()
    assert (np.concatenate(list(tokenizer.encode_chunks(memoryview(document))))[1:] == parts).all()


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("ab \n\u2581é"), max_size=60), st.integers(1, 8))
def test_cuts_of_any_text_change_nothing(text: str, size: int) -> None:
    tokenizer, data = english(), text.encode()
    parts = [tokenizer.encode(data[a:b]) for a, b in tokenizer.cuts(data, size)]
    assert (np.concatenate([*parts, np.zeros(0, np.uint16)]) == tokenizer.encode(data)).all()


def test_documents_start_with_bos() -> None:
    tokenizer = english()
    stream = tokenizer.encode_documents([b"one", b"two"])
    expected = [1, *tokenizer.encode("one"), 1, *tokenizer.encode("two")]
    assert stream.tolist() == expected


@pytest.mark.parametrize("bad", [b"", b"hello", b"\x0a\x05\x0a\x03abc", b"\xff" * 40, b"\x0a\xff\xff\xff\xff\x0f"])
def test_what_is_no_model_is_refused(bad: bytes) -> None:
    with pytest.raises(GolfError, match=r"SentencePiece|bos"):
        Tokenizer.from_bytes(bad)


def test_a_file_that_cannot_be_a_model_is_not_read_to_its_end(tmp_path: Path) -> None:
    for path in (Path("/dev/zero"), tmp_path):
        with pytest.raises(GolfError, match=f"{path} is no plain file"):
            Tokenizer.load(path)
    with (tmp_path / "large.model").open("wb") as stream:
        stream.truncate((64 << 20) + 1)
    with pytest.raises(GolfError, match="above 64 MB"):
        Tokenizer.load(tmp_path / "large.model")


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(GolfError, match="outside the vocabulary of 700"):
        english().decode([700])


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(GolfError, match="260"):
        train_bpe([b"text"], 259)


# -- the compact form ---------------------------------------------------------------------------------------------


def test_compact_form_is_the_same_model_and_small() -> None:
    for tokenizer in tokenizers():
        packed = tokenizer.compact()
        assert Tokenizer.from_compact(packed).to_bytes() == tokenizer.to_bytes()
        assert packed[0] == 1
    merges = english().vocab_size - 260
    assert len(english().compact()) < 1.7 * merges


def test_canonical_order_is_coded_smaller_and_keeps_the_pieces() -> None:
    pieces = [p.text for p in parse(english().to_bytes()).pieces[260:]]
    merges, chars = [p for p in pieces if len(p) > 1], [p for p in pieces if len(p) == 1]
    by_length = sorted(merges, key=lambda text: (len(text), text))
    again = compact.canonical(by_length, chars)
    assert sorted(again) == sorted(merges)
    shuffled = build(own_pieces(by_length, chars))
    assert compact.unpack(compact.pack(shuffled)) == shuffled


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_compact_form_of_any_merges(data: st.DataObject) -> None:
    chars = sorted(data.draw(st.sets(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)))
    pieces, known = list(chars), set(chars)
    for _ in range(data.draw(st.integers(0, 30))):
        text = data.draw(st.sampled_from(pieces)) + data.draw(st.sampled_from(pieces))
        if len(text) <= 16 and text not in known:
            known.add(text)
            pieces.append(text)
    model = build(own_pieces(pieces[len(chars) :], chars))
    packed = compact.pack(model)
    assert packed[0] == 1
    assert compact.unpack(packed) == model


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 1))
def test_hostile_compact_bytes_give_one_clear_error(data: bytes, kind: int) -> None:
    try:
        compact.unpack(bytes([kind]) + data)
    except GolfError as error:
        assert "damaged" in str(error)


def test_a_large_vocabulary_in_canonical_order_is_coded() -> None:
    chars = [chr(0x4E00 + i) for i in range(2)]
    merges = ["".join(word) for size in range(2, 14) for word in itertools.product(chars, repeat=size)]
    assert len(merges) == 16_380
    model = build(own_pieces(compact.canonical(merges, chars), chars))
    packed_model = compact.pack(model)
    assert packed_model[0] == 1 and compact.unpack(packed_model) == model


def test_an_order_that_would_take_long_to_decode_is_refused_and_packed_plainly() -> None:
    """One merge a bucket: the steps are the square of the vocabulary."""
    count, chars = 2900, ["a"]
    coder, number = Encoder(), Number()
    number.write(coder, count)
    number.write(coder, 1)
    Number().write(coder, ord("a"))
    state = compact._Coder(chars, count)
    for _ in range(count):
        state._encode_bucket(coder, [(0, 0)])
        state.add([(0, 0)])
    with pytest.raises(GolfError, match="damaged"):
        compact.unpack(b"\1" + coder.finish())
    letters = [chr(0x4E00 + i) for i in range(count)]
    model = build(own_pieces([letter + letters[0] for letter in reversed(letters)], letters))
    packed_model = compact.pack(model)
    assert packed_model[0] == 0 and compact.unpack(packed_model) == model


def test_more_pieces_than_a_shard_can_hold_are_refused_as_they_are_read() -> None:
    model = b"\x0a\x00" * (1 << 25)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(GolfError, match="more than 65536 pieces"):
        Tokenizer(model)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # KiB


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_damaged_compact_form_is_an_error_or_another_model(data: st.DataObject) -> None:
    damaged = bytearray(packed())
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(GolfError):
        Tokenizer.from_compact(bytes(damaged[: data.draw(st.integers(1, len(damaged)))]))


# -- tokenizers made by others --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1024, 4096, 8192])
def test_official_tokenizers_work_unchanged(size: int) -> None:
    import sentencepiece

    path = shared_path("tokenizers", f"fineweb_{size}_bpe.model")
    tokenizer = Tokenizer.load(path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.reversible) == (size, 1, False)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in ("Hello,  world\n\n a \ufb01ne day", "", " \u2581 lead", "tab\tx" * 500):
        assert tokenizer.encode(text).tolist() == plain.encode(text)
    assert Tokenizer.from_compact(tokenizer.compact()).to_bytes() == path.read_bytes()
    assert tokenizer.decode(tokenizer.encode("Hello, world")) == b"Hello, world"


def test_byte_table_is_the_official_one() -> None:
    tokenizer = Tokenizer.load(shared_path("tokenizers", "fineweb_1024_bpe.model"))
    with np.load(shared_path("parity", "D_eval_baseline.npz")) as z:
        assert (tokenizer.token_bytes.base_bytes == z["lut_base_bytes"]).all()
        assert (tokenizer.token_bytes.leading_space == z["lut_has_leading_space"]).all()
        assert (tokenizer.token_bytes.boundary == z["lut_is_boundary"]).all()


# -- odd texts ------------------------------------------------------------------------------------------------------


def test_a_long_text_without_blanks_is_cut_too() -> None:
    draws = np.random.default_rng(3).geometric(0.02, 200_000)
    text = "".join(chr(0x4E00 + min(draw, 300)) for draw in draws.tolist())
    tokenizer = train_bpe([text.encode()], 900)
    assert tokenizer.vocab_size == 900
    data = text.encode()
    spans = list(tokenizer.cuts(data, 10_000))
    assert len(spans) > 50
    parts = np.concatenate([tokenizer.encode(data[a:b]) for a, b in spans])
    assert (parts == tokenizer.encode(data)).all()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=6),
    st.integers(260, 330),
    st.booleans(),
)
def test_any_text_trains_a_tokenizer(texts: list[str], vocab_size: int, split_digits: bool) -> None:
    documents = [(text * 9).encode() for text in texts]
    tokenizer = train_bpe(documents, vocab_size, split_digits=split_digits)
    assert 260 <= tokenizer.vocab_size <= vocab_size
    for document in [*documents, b" \xff\x00"]:
        check_exact(tokenizer, document)
    assert Tokenizer.from_compact(tokenizer.compact()).to_bytes() == tokenizer.to_bytes()
