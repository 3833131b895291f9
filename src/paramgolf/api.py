"""The model in an artifact, for Python: `paramgolf.load("model.golf")`, then score, nll, sample, stream.

>>> model = paramgolf.load("model.golf")                                        # doctest: +SKIP
>>> model.score("To be, or not to be").val_bpb                                  # doctest: +SKIP
>>> model.sample("Once upon a time", max_tokens=50)                             # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from paramgolf.data.byte_oracle import check_stream
from paramgolf.data.dataset import open_text
from paramgolf.data.tokenizer import Tokenizer
from paramgolf.dist import pick_device
from paramgolf.errors import GolfError
from paramgolf.files import sha256_file
from paramgolf.model.gpt import GPT
from paramgolf.pack.packer import load_model
from paramgolf.recipe.sections import MOST_LANES, NgramSection
from paramgolf.score import sample, scorer
from paramgolf.score.own_scorers import check_all
from paramgolf.score.scorer import Score
from paramgolf.score.ttt import settings as adapt
from paramgolf.score.ttt.scorer import score_adapted
from paramgolf.score.windows import overlapping

Progress = Callable[[int, int], None]
CPU_BATCH_TOKENS = 16_384  # larger batches only cost memory on a CPU
CUDA_BATCH_TOKENS = 131_072


class LanguageModel:
    """A model with its tokenizer, as an artifact holds them. Use `paramgolf.load`."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, config: dict[str, Any], path: Path) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config  # the artifact's manifest
        self.path = path

    @cached_property
    def sha256(self) -> str:
        """Of the artifact file."""
        return sha256_file(self.path)

    @property
    def seq_len(self) -> int:
        """Window length the artifact is meant to be scored with."""
        return int(self._score_config("seq_len") or self._score_config("train_seq_len") or 1024)

    @property
    def lanes(self) -> int:
        """Lanes that the artifact's own score cuts a text into, at document starts (`score.lanes`)."""
        return min(max(1, self._score_config("lanes")), MOST_LANES)

    @property
    def ngram(self) -> NgramSection:
        """The n-gram cache of the artifact's own score; no levels if it has none."""
        return adapt.ngram_of(self.config)

    def _score_config(self, key: str) -> int:
        table = self.config.get("score")
        value = table.get(key, 0) if isinstance(table, dict) else 0
        return value if type(value) is int and 0 <= value <= 1 << 20 else 0

    def score(
        self,
        text: str | bytes | Path,
        *,
        stride: int = 0,
        seq_len: int = 0,
        limit_seconds: float = 0.0,
        progress: Progress | None = None,
    ) -> Score:
        """Bits per byte of a text, or of the documents in a file or folder if `text` is a Path.

        A str or bytes is one document. `stride` 0 is the standard score, less than `seq_len` a sliding one; `seq_len`
        0 is the artifact's. Raises GolfError if there is nothing to score or it takes longer than `limit_seconds`.
        """
        tokens, true_bytes = self._tokens(text)
        return self._score(tokens, true_bytes, stride, seq_len, limit_seconds, progress)

    def score_data(
        self,
        source: str | Path,
        *,
        stride: int | None = None,
        seq_len: int = 0,
        check_legality: bool = False,
        ttt: bool = False,
        settings: Iterable[str] = (),
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """The result keys of `golf score`: standard windows over the whole of `source` ("-" = standard input) and
        sliding ones if `stride` (None = the artifact's) is not 0; `byte_table`, the tokenizer's against the documents;
        with `check_legality` also `legality`, what `score.legality` finds on the first window and a bit.

        With `ttt` also a score with test-time training as the artifact says (by adapters for each document if it says
        nothing), and with the n-gram tilt if it has one; `settings` like "ttt.lr=0.01" or "tilt.orders=[16,8]" change
        that, and those of the tilt alone need no `ttt`."""
        stride = self._score_config("stride") if stride is None else stride
        stride = overlapping(stride, seq_len or self.seq_len)
        settings = list(settings)
        adapt.check_used(settings, ttt)
        section, tilt = adapt.settings_of(self.config, settings)
        section = adapt.chosen(section, ttt)
        learns = section.kind != "none" or bool(tilt.orders)
        tokens, true_bytes, sizes = open_text(source, self.tokenizer)
        table = check_stream(tokens, sizes, self.tokenizer, where=str(source)).as_dict() if sizes else None
        ngram = self.ngram
        standard = self._score(tokens, true_bytes, 0, seq_len, 0.0, progress, None if stride else ngram)
        results = standard.as_dict() | {"byte_table": table}
        if stride:
            results |= self._score(tokens, true_bytes, stride, seq_len, 0.0, progress, ngram).as_dict()
        if learns:
            results |= score_adapted(
                self.model, tokens, section, tilt, token_bytes=self.tokenizer.token_bytes, true_bytes=true_bytes,
                seq_len=seq_len or self.seq_len, stride=stride, batch_tokens=self._batch_tokens,
                lane_count=self.lanes, bos_id=self.tokenizer.bos_id, progress=progress,
            ).as_dict()  # fmt: skip
        if check_legality:
            found = check_all(
                self.model, tokens, seq_len=seq_len or self.seq_len, stride=stride, bos_id=self.tokenizer.bos_id,
                batch_tokens=self._batch_tokens, adapted=(section, tilt) if learns else None,
                ngram=ngram,
            )  # fmt: skip
            results["legality"] = {name: legality.as_dict() for name, legality in found.items()}
        return results

    def nll(self, text: str | bytes | np.ndarray, *, stride: int = 0, seq_len: int = 0) -> np.ndarray:
        """Nats of each token, float32, one for each of `tokenizer.encode(text)` (a document of its own); or of a
        stream of token ids, one for each after the first."""
        ids = text if isinstance(text, np.ndarray) else self.tokenizer.encode_documents([_as_bytes(text)])
        if len(ids) < 2:
            return np.zeros(0, np.float32)
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or not 0 <= ids.min() <= ids.max() < self.tokenizer.vocab_size:
            raise GolfError(f"tokens must be a row of ids, integers from 0 to {self.tokenizer.vocab_size - 1}")
        result = scorer.score(
            self.model, ids, token_bytes=scorer.OneByteEach(), seq_len=seq_len or self.seq_len, stride=stride,
            batch_tokens=self._batch_tokens, keep_nll=True,
        )  # fmt: skip
        return cast(np.ndarray, result.nll)

    def sample(self, prompt: str = "", **settings: Any) -> str:
        """The continuation of `prompt` as one string; settings as for `stream`."""
        return "".join(self.stream(prompt, **settings))

    def stream(self, prompt: str = "", **settings: Any) -> Iterator[str]:
        """The continuation of `prompt` as it is generated, in whole characters.

        Settings and their defaults: max_tokens, temperature, top_p, top_k, stop and seed of `score.sample.generate`.
        """
        context = self._score_config("train_seq_len") or self.seq_len
        return sample.generate(self.model, self.tokenizer, prompt, **({"context": context} | settings))

    def _tokens(self, text: str | bytes | Path) -> tuple[np.ndarray, int | None]:
        if isinstance(text, Path):
            tokens, true_bytes, _ = open_text(text, self.tokenizer)
            return tokens, true_bytes
        raw = _as_bytes(text)
        if not raw:
            raise GolfError("nothing to score: the text is empty")
        return self.tokenizer.encode_documents([raw]), len(raw)

    @property
    def _batch_tokens(self) -> int:
        return CUDA_BATCH_TOKENS if self.model.tok_emb.weight.is_cuda else CPU_BATCH_TOKENS

    def _score(
        self,
        tokens: np.ndarray,
        true_bytes: int | None,
        stride: int,
        seq_len: int,
        limit: float,
        progress: Progress | None,
        ngram: NgramSection | None = None,
    ) -> Score:
        return scorer.score(
            self.model, tokens, token_bytes=self.tokenizer.token_bytes, true_bytes=true_bytes,
            seq_len=seq_len or self.seq_len, stride=stride, batch_tokens=self._batch_tokens,
            lane_count=self.lanes, bos_id=self.tokenizer.bos_id, limit_seconds=limit, ngram=ngram, progress=progress,
        )  # fmt: skip


def _as_bytes(text: str | bytes) -> bytes:
    if isinstance(text, bytes):
        return text
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise GolfError(f"the text has a lone surrogate at character {error.start}; give bytes instead") from error


def load(path: str | Path, *, device: str = "auto") -> LanguageModel:
    """The model in an artifact, verified and ready to use on `device` (auto, cpu, cuda).

    Raises GolfError if the file is missing, damaged or no language model.
    """
    loaded = load_model(path, pick_device(device))
    return LanguageModel(loaded.model, Tokenizer.from_compact(loaded.tokenizer), loaded.manifest, Path(path))
