"""Training a byte-pair tokenizer: SentencePiece BPE, rebuilt as a canonical model that changes nothing in the text."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import sentencepiece

from paramgolf.data import caseops
from paramgolf.data.compact import canonical
from paramgolf.data.sp_model import NORMAL, SPACE, build, own_pieces, parse
from paramgolf.data.tokenizer import Tokenizer
from paramgolf.errors import GolfError

BYTE_PIECES = 260  # 4 controls and 256 bytes
_SENTENCE = 4000  # characters given to the trainer at once; it counts words, so the cut only must fall on a blank
_CUT = re.compile(r"(?<=[^ ]) ")
_RESERVED = "\0\t\u2581\u2585\ufffd"  # characters SentencePiece's trainer skips or keeps for itself
_NO_CHARACTER = "\t"  # the trainer never puts it into a piece


def _sentences(text: str) -> Iterator[str]:
    """Parts that end before a blank; hard cuts where there is none for long (the trainer takes no huge words)."""
    start = 0
    while start < len(text):
        found = _CUT.search(text, start + _SENTENCE, start + 2 * _SENTENCE)
        end = found.start() if found else start + 2 * _SENTENCE
        yield text[start:end]
        start = end


def _alphabet(texts: list[str], limit: int, reserved: str) -> str:
    """The characters that get a piece of their own: frequent enough to pay for a place in the vocabulary."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    least = max(4, sum(counts.values()) // 200_000)
    kept = [(-n, char) for char, n in counts.items() if n >= least and char not in reserved]
    return "".join(char for _, char in sorted(kept)[:limit])


def train_bpe(
    documents: Iterable[bytes], vocab_size: int, *, split_digits: bool = True, case_operators: bool = False
) -> Tokenizer:
    """A reversible tokenizer of at most `vocab_size` pieces learned from `documents` (UTF-8, held in memory).

    A text too short for so many merges gives fewer pieces; `vocab_size` <= 260 or hardly any text gives bytes alone.
    With `case_operators` it is a CaseOps tokenizer (see caseops.py), learned from the transformed text. The result
    depends on the text and the arguments only.
    """
    symbols = caseops.OPERATORS if case_operators else ""
    least = BYTE_PIECES + len(symbols)
    if vocab_size < least:
        what = "the 4 controls, 4 case operators" if symbols else "the 4 controls"
        raise GolfError(f"data.vocab_size = {vocab_size}: {what} and 256 bytes alone take {least} pieces")
    texts = [str(document, "utf-8", "replace") for document in documents]
    if symbols:
        texts = [caseops.encode(text) for text in texts]
    room = vocab_size - least
    merges, chars = _learn(texts, room, split_digits, symbols) if room and any(texts) else ([], [])
    return Tokenizer(build(own_pieces(merges, chars, symbols)))


def _learn(texts: list[str], room: int, split_digits: bool, symbols: str = "") -> tuple[list[str], list[str]]:
    """(merged pieces in priority order, single characters in code-point order), together at most `room`."""
    alphabet = _alphabet(texts, max(room // 2, 1), _RESERVED + symbols)
    if len(alphabet) < 2:
        return [], []
    others = re.compile(f"[^{re.escape(alphabet)}{symbols}]")
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(part for text in texts for part in _sentences(others.sub(_NO_CHARACTER, text))),
            model_writer=out,
            model_type="bpe",
            vocab_size=BYTE_PIECES + len(symbols) + room,
            user_defined_symbols=list(symbols),
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=split_digits,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            max_sentence_length=1 << 30,
            minloglevel=3,
        )
    except RuntimeError as error:
        if "ocabulary" in str(error) or "sentences" in str(error):  # too little text to learn anything from
            return [], []
        raise GolfError(f"training the tokenizer failed: {error}") from error
    found = [piece.text for piece in parse(out.getvalue()).pieces if piece.kind == NORMAL]
    chars = sorted({text for text in found if len(text) == 1} | {SPACE})
    merges = [text for text in found if len(text) > 1][: max(room - len(chars), 0)]
    return canonical(merges, chars), chars
