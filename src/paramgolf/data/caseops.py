"""CaseOps (#1729): a reversible transform that writes capital letters as operators before lower-case letters.

Over maximal runs of ASCII letters: all lower case stays; all upper case of two letters or more becomes ALLCAPS and the
lower-case run; otherwise each capital becomes its lower-case letter after TITLE (the first letter of the run) or
CAPNEXT (a later one). A literal operator character in the text is written after ESCAPE. Everything else stays.

So "the", "The" and "THE" share their tokens. An operator stands for no byte of the original text.
"""

from __future__ import annotations

import re

import numpy as np

from paramgolf.errors import GolfError

TITLE, ALLCAPS, CAPNEXT, ESCAPE = OPERATORS = "\ue001\ue002\ue003\ue004"

_RUN = re.compile(r"[A-Za-z]*[A-Z][A-Za-z]*")
_CAPITAL = re.compile(r"[A-Z]")
_OPERATOR = re.compile(f"([{OPERATORS}])")
_REST = re.compile(rb"[\x80-\xbf]+")  # bytes of a UTF-8 character after its first
_LETTERS = re.compile(rb"[A-Za-z]+")


def encode(text: str) -> str:
    """The transformed text; `decode` gives `text` back, whatever it is."""
    return _RUN.sub(_mark, _OPERATOR.sub(ESCAPE + r"\1", text))


def mark_capitals(text: str) -> str:
    """`encode` of a text without literal operators."""
    return _RUN.sub(_mark, text)


def _mark(run: re.Match[str]) -> str:
    word = run.group()
    if len(word) > 1 and word.isupper():
        return ALLCAPS + word.lower()
    head = TITLE + word[0].lower() if word[0].isupper() else word[0]
    return head + _CAPITAL.sub(lambda capital: CAPNEXT + capital.group().lower(), word[1:])


def decode(text: str) -> str:
    """The original of a transformed text. GolfError for operators where `encode` cannot have put them, except that
    capitals among the letters and CAPNEXT instead of TITLE pass."""
    decoder, out = CaseDecoder(strict=True), bytearray()
    for part in _OPERATOR.split(text):
        if part and part in OPERATORS:
            out += decoder.operator(part)
        else:
            out += decoder.text(part.encode("utf-8", "surrogateescape"))
    decoder.end()
    return out.decode("utf-8", "surrogateescape")


class CaseDecoder:
    """The inverse transform, piece by piece: operators by `operator`, what lies between them by `text`, as bytes.

    Without `strict` it accepts whatever a model may sample: an operator that no letter follows has no effect.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self._strict = strict
        self._pending = ""  # TITLE or ALLCAPS before its run
        self._next = False  # CAPNEXT before its letter
        self._escaped = False
        self._in_run = self._all = False

    def operator(self, operator: str) -> bytes:
        """Read an operator; bytes only where it is an escaped literal."""
        if self._escaped:
            self._after_escape(letter=False)
            return operator.encode()
        if operator == ESCAPE:
            self._escaped = True
        elif operator == CAPNEXT:
            self._require(not self._next)
            self._next = True
        else:
            self._require(not self._pending and not self._next and not self._in_run)
            self._pending, self._next, self._in_run, self._all = operator, False, False, False
        return b""

    def text(self, raw: bytes) -> bytes:
        """Read text in UTF-8, cut anywhere; the same with its capitals."""
        if not raw:
            return raw
        if self._escaped:  # of a character that needs none
            self._after_escape(letter=_LETTERS.fullmatch(raw[:1]) is not None)
            return raw[:1] + self.text(raw[1:])
        if self._pending or self._next or self._all:
            raw = self._raised(raw)
        self._in_run = _LETTERS.fullmatch(raw[-1:]) is not None
        self._all = self._all and self._in_run
        return raw

    def _after_escape(self, *, letter: bool) -> None:
        """A literal was read. CAPNEXT goes on waiting."""
        self._escaped, self._in_run = False, letter
        if not letter:
            self._require(not self._pending)
            self._pending, self._all = "", False

    def _raised(self, raw: bytes) -> bytes:
        if rest := _REST.match(raw):  # of an escaped character
            return rest.group() + self.text(raw[rest.end() :])
        found = _LETTERS.match(raw)
        if found is None:
            self._require(not self._pending and not self._next)
            self._pending, self._next, self._all = "", False, False
            return raw
        self._require(not (self._pending and self._in_run))
        self._all = self._all or self._pending == ALLCAPS
        end = found.end() if self._all else 1
        self._pending, self._next = "", False
        self._all = self._all and found.end() == len(raw)
        return raw[:end].upper() + raw[end:]

    def end(self) -> None:
        """The text is over. GolfError (if strict) when an operator still waits for its letter."""
        self._require(not (self._pending or self._next or self._escaped))

    def _require(self, sound: bool) -> None:
        if self._strict and not sound:
            raise GolfError("not a CaseOps text: an operator stands where no letter follows or inside a word")


def surface_bytes(pieces: list[str]) -> np.ndarray:
    """Bytes of the original text of each surface, uint16: operators count none, an escaped literal its three."""
    sizes, escaped = np.zeros(len(pieces), np.uint16), False
    for index, piece in enumerate(pieces):
        for part in _OPERATOR.split(piece):
            if part in OPERATORS and part and not escaped:
                escaped = part == ESCAPE
            elif part:
                sizes[index] += len(part.encode())
                escaped = False
    return sizes
