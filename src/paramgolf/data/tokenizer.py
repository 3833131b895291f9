"""The tokenizer of a run: a SentencePiece model, encoded exactly where the model allows it.

Our own models (see `bpe.py`) carry every byte string unchanged. Two things keep SentencePiece itself from that:
it writes blanks as U+2581, so a real U+2581 would come back as a blank, and it replaces invalid UTF-8. Both go
through byte pieces here and never reach it.

A model whose user-defined pieces include the four case operators is a CaseOps tokenizer (see caseops.py): texts are
transformed before they are encoded and back when they are decoded. In our own models a literal operator character goes
through byte pieces as well, so that an operator token is always an operator.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from paramgolf.data import caseops, compact, sp_model, token_bytes
from paramgolf.data.sp_model import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED
from paramgolf.data.token_bytes import TokenBytes
from paramgolf.errors import GolfError
from paramgolf.files import sha256_bytes, user_path

Buffer = bytes | bytearray | memoryview

_LARGEST = 64 << 20  # bytes of a .model file; 65,536 pieces take a few MB
CHUNK_BYTES = 1 << 16  # a long document is encoded in parts of about this size, where that changes nothing
_BROKEN = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, as "surrogateescape" writes them


class Tokenizer:
    """Text to token ids and back. Ids pad 0, bos 1, eos 2, unk 3 in our models; other models keep their own."""

    def __init__(self, model: bytes) -> None:
        """`model`: bytes of a SentencePiece .model file. GolfError if it is none or does not fit in uint16 ids."""
        self._model = bytes(model)
        self._spec = sp_model.parse(self._model)
        self.vocab_size = len(self._spec.pieces)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self._model)
        except (RuntimeError, OSError, ValueError) as error:
            raise GolfError(f"SentencePiece refuses the tokenizer model: {error}") from error
        bos = self._spec.ids["bos"]
        if not 0 <= bos < self.vocab_size:
            raise GolfError("the tokenizer has no begin-of-document token (bos), which every document starts with")
        self.bos_id = bos
        symbols = {piece.text for piece in self._spec.pieces if piece.kind == USER_DEFINED}
        self.case_operators = caseops.OPERATORS if symbols.issuperset(caseops.OPERATORS) else ""
        self.reversible = self._is_reversible()
        self.token_bytes: TokenBytes = token_bytes.table(self._spec, self.reversible, self.case_operators)

    @classmethod
    def load(cls, source: str | Path | bytes) -> Tokenizer:
        """From a .model file or its bytes."""
        if isinstance(source, bytes):
            return cls(source)
        path = user_path(source)
        try:
            if path.exists() and not path.is_file():
                raise GolfError(f"{path} is no plain file; give the .model file of a tokenizer")
            with path.open("rb") as stream:
                data = stream.read(_LARGEST + 1)
        except OSError as error:
            raise GolfError(f"cannot read tokenizer {path}: {error.strerror or error}") from error
        if len(data) > _LARGEST:
            raise GolfError(f"{path}: above 64 MB, too large for a tokenizer; give its .model file")
        try:
            return cls(data)
        except GolfError as error:
            raise GolfError(f"{path}: {error}") from error

    @classmethod
    def from_bytes(cls, data: bytes) -> Tokenizer:
        return cls(data)

    @classmethod
    def from_compact(cls, data: bytes) -> Tokenizer:
        """From what `compact()` gave."""
        return cls(compact.unpack(data))

    def to_bytes(self) -> bytes:
        """The .model file."""
        return self._model

    def compact(self) -> bytes:
        """The smallest form of the same model file, for the artifact."""
        return compact.pack(self._model)

    @cached_property
    def sha256(self) -> str:
        return sha256_bytes(self._model)

    @property
    def pieces(self) -> list[str]:
        """Text of every token, blanks as U+2581."""
        return [piece.text for piece in self._spec.pieces]

    def _is_reversible(self) -> bool:
        spec = self._spec
        plain = spec.model_type == sp_model.BPE and not spec.charsmap and not spec.whitespace_suffix
        plain = plain and spec.escape_blanks and not spec.dummy_prefix and not spec.squeeze_blanks
        known = (NORMAL, BYTE, CONTROL, UNKNOWN)
        only_text = all(p.kind in known or p.text in self._operator_texts for p in spec.pieces)
        return bool(plain and spec.byte_fallback and only_text and (self._byte_ids >= 0).all())

    @property
    def _operator_texts(self) -> frozenset[str]:
        return frozenset(self.case_operators)

    @cached_property
    def _byte_ids(self) -> np.ndarray:
        """int32 (256,): id of each byte piece, -1 where there is none."""
        ids = np.full(256, -1, np.int32)
        for index, piece in enumerate(self._spec.pieces):
            if piece.kind == BYTE and re.fullmatch(r"<0x[0-9A-F]{2}>", piece.text):
                ids[int(piece.text[3:5], 16)] = index
        return ids

    @cached_property
    def _normal_pieces(self) -> set[str]:
        return {p.text for p in self._spec.pieces if p.kind in (NORMAL, USER_DEFINED)}

    @cached_property
    def _by_bytes(self) -> re.Pattern[str]:
        """What must go through byte pieces: U+2581, invalid bytes, literal case operators, and blanks where no piece
        stands for them."""
        blank = "" if SPACE in self._normal_pieces else " "
        return re.compile(f"([{SPACE}\udc80-\udcff{self.case_operators}{blank}]+)")

    @cached_property
    def _joined(self) -> frozenset[str]:
        """Pairs of neighbouring characters inside pieces: between any other two, text may be cut."""
        texts = (text.replace(SPACE, " ") for text in self._normal_pieces)
        return frozenset(text[i : i + 2] for text in texts for i in range(len(text) - 1))

    def encode(self, text: str | Buffer) -> np.ndarray:
        """Token ids of one text, without BOS; uint16 (n,).

        Exact for every bytes input when `reversible`; other tokenizers normalise as their model says, and invalid
        UTF-8 becomes U+FFFD there. Lone surrogates in a str stand for single bytes ("surrogateescape").
        """
        if not isinstance(text, str):
            text = str(text, "utf-8", "surrogateescape")
        if not self.reversible:
            return np.array(self._processor.encode(self._cleaned(text)), dtype=np.uint16)
        if not self._normal_pieces:
            return self._bytes_as_ids(text)
        parts = self._by_bytes.split(text)
        if len(parts) == 1:
            return self._encode_plain(text)
        done = [self._bytes_as_ids(part) if i % 2 else self._encode_plain(part) for i, part in enumerate(parts)]
        return np.concatenate(done)

    def _bytes_as_ids(self, text: str) -> np.ndarray:
        try:
            raw = text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError as error:
            raise GolfError(f"the text has a lone surrogate at character {error.start}; give bytes instead") from error
        return self._byte_ids[np.frombuffer(raw, np.uint8)].astype(np.uint16)

    def _cleaned(self, text: str) -> str:
        """What a tokenizer that is not reversible is given."""
        clean = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return caseops.encode(clean) if self.case_operators else clean

    def _encode_plain(self, text: str) -> np.ndarray:
        text = caseops.mark_capitals(text) if self.case_operators else text
        return np.array(self._processor.encode(text), dtype=np.uint16)

    def sizes(self, document: Buffer) -> np.ndarray:
        """Bytes of the original text that each token of `encode_chunks` stands for, BOS first (0); uint16 (n,).

        Of a CaseOps tokenizer that normalises: by the piece of text that each token covers, before normalisation, so
        that blanks at either end of the text belong to no token (#1729).
        """
        if self.reversible or not self.case_operators:
            tokens = np.concatenate(list(self.encode_chunks(document)))
            sizes = self.token_bytes.count(np.concatenate((tokens[:1], tokens[:-1])), tokens)
            return sizes.astype(np.uint16)
        pieces = self.surfaces(str(document, "utf-8", "surrogateescape"))
        return np.concatenate((np.zeros(1, np.uint16), caseops.surface_bytes(pieces)))

    def surfaces(self, text: str) -> list[str]:
        """The piece of the cleaned (and transformed) text that each token of a model that normalises covers."""
        clean = self._cleaned(text)
        spans = self._processor.encode(clean, return_type="offset_mapping")["offsets"]
        return [clean[start:end] for start, end in spans]

    def encode_chunks(self, document: Buffer) -> Iterator[np.ndarray]:
        """The tokens of one document, BOS first, in parts: the concatenation equals encoding it whole."""
        yield np.array([self.bos_id], dtype=np.uint16)
        for start, end in self.cuts(document):
            yield self.encode(document[start:end])

    def cuts(self, document: Buffer, size: int = CHUNK_BYTES) -> Iterator[tuple[int, int]]:
        """(start, end) of parts of about `size` bytes at places where cutting does not change the tokens."""
        total, start = len(document), 0
        while start < total:
            end = self._safe_cut(document, start + size, total) if self.reversible else total
            yield start, end
            start = end

    def _safe_cut(self, document: Buffer, at: int, total: int) -> int:
        """The first place after `at` between two characters that no piece joins, else `total`."""
        while at < total:
            window = bytes(document[at : at + 4096])
            text = window.decode("utf-8", "surrogateescape")
            for i in range(1, len(text)):
                pair = text[i - 1 : i + 1]
                if self.case_operators:
                    if pair.isascii() and pair.isalpha():  # a run of letters is transformed as a whole
                        continue
                    pair = "".join(c.lower() if c.isascii() else c for c in pair)
                if pair not in self._joined and not _BROKEN.search(pair):
                    return at + len(text[:i].encode("utf-8", "surrogateescape"))
            at += max(len(window) - 8, 1)  # a character may lie across the end of the window
        return total

    def encode_documents(self, documents: Iterable[Buffer]) -> np.ndarray:
        """All documents as one stream, BOS before each; uint16 (n,)."""
        parts = [part for document in documents for part in self.encode_chunks(document)]
        return np.concatenate(parts) if parts else np.zeros(0, np.uint16)

    @cached_property
    def piece_bytes(self) -> list[bytes]:
        """What each token decodes to by itself; empty for controls and case operators."""
        out = []
        for piece in self._spec.pieces:
            if piece.kind == BYTE:
                out.append(bytes([int(piece.text[3:5], 16)]))
            elif piece.kind in (CONTROL, UNUSED) or (piece.kind == USER_DEFINED and piece.text in self._operator_texts):
                out.append(b"")
            elif piece.kind == UNKNOWN:
                out.append(" \u2047 ".encode())
            else:
                out.append(piece.text.replace(SPACE, " ").encode())
        return out

    def decode(self, ids: np.ndarray | Iterable[int]) -> bytes:
        """The bytes the tokens stand for; controls give nothing. GolfError for an id outside the vocabulary."""
        one = self.decoder()
        text = b"".join([one(index) for index in ids])
        return text[1:] if self._spec.dummy_prefix and text.startswith(b" ") else text

    def decoder(self) -> Callable[[int], bytes]:
        """A function that takes one token id after the other and gives the bytes of each: `decode`, as it comes."""
        table, size = self.piece_bytes, self.vocab_size
        operators = {i: p.text for i, p in enumerate(self._spec.pieces) if p.text in self._operator_texts}
        case = caseops.CaseDecoder()

        def plain(index: int) -> bytes:
            if not 0 <= index < size:
                raise GolfError(f"token id {int(index)} is outside the vocabulary of {size}")
            return table[index]

        def cased(index: int) -> bytes:
            return case.operator(operators[index]) if index in operators else case.text(plain(index))

        return cased if operators else plain
