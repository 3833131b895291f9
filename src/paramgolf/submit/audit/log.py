"""Facts of a training log, read line by line (the log may have 200 MB and any content)."""

from __future__ import annotations

import ast
import hashlib
import math
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

MAX_BYTES = 200_000_000
MAX_LINE = 65_536
_MAX_PARSES = 10
_MAX_SECTION = 2 << 20  # bytes kept while looking for the source code in the log
_KEPT = 2000  # facts of one kind that are remembered; the last ones count
_FLOAT = r"[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf)"
_STAMP = re.compile(r"^\d{10}\.\d+ ")
_SCORE = re.compile(
    rf"^(?P<label>[^{{}}]*?)\s*val_loss[:=]\s*(?P<loss>{_FLOAT})\s+val_bpb[:=]\s*(?P<bpb>{_FLOAT})(?P<rest>.*)", re.I
)
_STEP = re.compile(r"^(?:step:)?(\d+)/\d+ ")
_TRAIN_MS = re.compile(r"train_time:\s*(\d+(?:\.\d+)?)ms")
_EVAL_MS = re.compile(r"eval_time:\s*(\d+(?:\.\d+)?)ms")
_TOTAL_EVAL = re.compile(r"^total_eval_time:\s*(\d+(?:\.\d+)?)s")
_MODEL = re.compile(r"^Serialized model(?P<label> [^:]+)?: (?P<bytes>\d+) bytes")
_CODE = re.compile(r"^Code size(?P<label> \([^)]*\))?: (?P<bytes>\d+) bytes")
_TOTAL = re.compile(r"^Total submission size(?P<label> [^:]+)?: (?P<bytes>\d+) bytes")
_PARAMS = re.compile(r"^(?:model_params|params):\s*(\d+)\b")
_TOKENS = re.compile(r"^(?:val_tokens:\s*|val_loader:.*\btokens:)(\d+)")
_PAIR = re.compile(r"(\w+):([-+\w.]+)")
_HPARAM = re.compile(r"^  (\w+): (.*)$")
_NONFINITE = re.compile(r"loss:\s?(?:nan|inf)")
_PASSING = re.compile(r"^(?:step:)?\d+/\d+|^step[: ]", re.I)


@dataclass(frozen=True)
class Score:
    """A final score line: nats per token, bits per byte, milliseconds or None."""

    label: str
    loss: float
    bpb: float
    eval_ms: float | None
    line: int


@dataclass(frozen=True)
class Count:
    """A byte count in the log, e.g. ("int8+zlib", 15815847, line 800); label "" is the unquantised one."""

    label: str
    bytes: int
    line: int


@dataclass
class Log:
    """What a log says. Lines count from 1; times are in milliseconds."""

    name: str
    sha256: str = ""
    complete: bool = True
    scores: list[Score] = field(default_factory=list)
    models: list[Count] = field(default_factory=list)
    codes: list[Count] = field(default_factory=list)
    totals: list[Count] = field(default_factory=list)
    hparams: dict[str, tuple[str, int]] = field(default_factory=dict)
    params: tuple[int, int] | None = None  # count, line
    val_tokens: tuple[int, int] | None = None
    train_ms: tuple[float, int] | None = None
    total_eval_ms: tuple[float, int] | None = None
    nonfinite: int = 0
    backwards: int = 0
    traceback: int = 0
    source: str | None = None
    source_line: int = 0

    @property
    def seed_in_name(self) -> int | None:
        hit = re.search(r"seed[_-]?(\d+)|log_(\d+)\.", Path(self.name).name)
        return int(hit[1] or hit[2]) if hit else None

    @property
    def seed(self) -> int | None:
        value = self.hparams.get("seed", ("", 0))[0]
        return int(value) if value.isdecimal() and len(value) < 20 else None

    @property
    def final(self) -> Score | None:
        """The last score that is not marked as a diagnostic."""
        real = [s for s in self.scores if not re.search(r"diagnostic|pre-quant|prequant|post.ema", s.label, re.I)]
        return real[-1] if real else None

    @property
    def eval_ms(self) -> tuple[float, int] | None:
        if self.total_eval_ms:
            return self.total_eval_ms
        timed = [(s.eval_ms, s.line) for s in self.scores if s.eval_ms is not None]
        return max(timed) if timed else None

    @property
    def model(self) -> Count | None:
        packed = [m for m in self.models if m.label]
        return packed[-1] if packed else None


class _Reader:
    """The state while lines go by."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.in_hparams = False
        self.step = -1
        self.section: list[str] = []
        self.section_start = 1
        self.section_bytes = 0
        self.parses_left = _MAX_PARSES

    def line(self, number: int, text: str) -> None:
        if self.parses_left:
            self._section(number, text)
        text = _STAMP.sub("", text)
        if self.in_hparams:
            hit = _HPARAM.match(text)
            if hit and len(self.log.hparams) < _KEPT:
                self.log.hparams.setdefault(hit[1], (hit[2].strip(), number))
                return
            self.in_hparams = False
        if text.startswith("Hyperparameters:"):
            self.in_hparams = True
        elif len(text) < 400 and not text.startswith((" ", "\t")):
            self._facts(number, text)

    def _section(self, number: int, text: str) -> None:
        if text.startswith("=" * 50):
            self.end_section()
            self.section, self.section_start, self.section_bytes = [], number + 1, 0
        elif self.section_bytes < _MAX_SECTION:
            self.section.append(text)
            self.section_bytes += len(text) + 1

    def end_section(self) -> None:
        text = "\n".join(self.section)
        if self.parses_left and len(text) > 400 and "import " in text and self.section_bytes < _MAX_SECTION:
            self.parses_left -= 1  # a log of several runs: the source of the last one counts
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    ast.parse(text)
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                return
            self.log.source, self.log.source_line = text, self.section_start

    def _facts(self, number: int, text: str) -> None:
        log = self.log
        if "val_loss" in text:
            self._score(number, text)
        if "train_time" in text:
            self._progress(number, text)
        elif text.startswith(("Serialized", "Code size", "Total sub")):
            for pattern, into in ((_MODEL, log.models), (_CODE, log.codes), (_TOTAL, log.totals)):
                if hit := pattern.match(text):
                    del into[:-_KEPT]
                    into.append(Count((hit["label"] or "").strip(), int(hit["bytes"]), number))
        elif hit := _TOTAL_EVAL.match(text):
            log.total_eval_ms = (1000 * float(hit[1]), number)
        elif text.startswith("Traceback (most recent"):
            log.traceback = log.traceback or number
        else:
            self._settings(number, text)
        if _NONFINITE.search(text) and not log.nonfinite:
            log.nonfinite = number

    def _settings(self, number: int, text: str) -> None:
        log = self.log
        if hit := _PARAMS.match(text):
            log.params = (int(hit[1]), number)
        if hit := _TOKENS.match(text):
            log.val_tokens = (int(hit[1]), number)
        if ":" in text and number < 20_000 and all(_PAIR.fullmatch(word) for word in text.split()):
            for name, value in _PAIR.findall(text):
                log.hparams.setdefault(name, (value, number))

    def _score(self, number: int, text: str) -> None:
        hit = _SCORE.match(text)
        if hit is None or _PASSING.match(text):
            return
        timed = _EVAL_MS.search(hit["rest"])
        score = Score(hit["label"].strip(" :"), float(hit["loss"]), float(hit["bpb"]),
                      float(timed[1]) if timed else None, number)  # fmt: skip
        if not math.isfinite(score.bpb):
            self.log.nonfinite = self.log.nonfinite or number
        del self.log.scores[:-_KEPT]
        self.log.scores.append(score)

    def _progress(self, number: int, text: str) -> None:
        log = self.log
        if hit := _TRAIN_MS.search(text):
            now = float(hit[1])
            if log.train_ms and now + 1 < log.train_ms[0] and not log.backwards:
                log.backwards = number
            log.train_ms = max(log.train_ms or (0.0, 0), (now, number))
        if hit := _STEP.match(text):
            if int(hit[1]) < self.step and not log.backwards:
                log.backwards = number
            self.step = int(hit[1])


def read_log(path: Path, name: str) -> Log:
    """Read at most `MAX_BYTES` of a log; longer lines than `MAX_LINE` are cut. Raises OSError."""
    log = Log(name)
    reader = _Reader(log)
    digest = hashlib.sha256()
    read = number = 0
    fresh = True
    with path.open("rb") as stream:
        while raw := stream.readline(MAX_LINE):
            read += len(raw)
            if read > MAX_BYTES:
                log.complete = False
                break
            digest.update(raw)
            if fresh:
                number += 1
                reader.line(number, raw.decode("utf-8", "replace").rstrip("\r\n"))
            fresh = raw.endswith(b"\n")
    reader.end_section()
    log.sha256 = digest.hexdigest()
    return log
