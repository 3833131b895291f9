"""What the audit can say: one row per finding code, with its usual severity and the public ruling it rests on.

Rulings name the official README of openai/parameter-golf or the issue / pull request where the question was decided
("Issue #1017"). Where nobody has ruled, the row says so.
"""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass
from typing import Any


class Severity(enum.StrEnum):
    VIOLATION = "violation"  # a written rule is broken
    WARNING = "warning"  # evidence is missing, contradictory or risky
    NOTE = "note"  # worth knowing, or not determined


@dataclass(frozen=True)
class Kind:
    """One row of the catalogue."""

    severity: Severity
    title: str
    ruling: str


@dataclass(frozen=True)
class Finding:
    """One statement about the audited thing. `evidence` is `file:line: text`, or a file name."""

    code: str
    severity: Severity
    message: str
    evidence: str
    ruling: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


V, W, N = Severity.VIOLATION, Severity.WARNING, Severity.NOTE
FILES = "README, Submission Process: README.md, submission.json, train log and train_gpt.py are required"
BYTES = "README FAQ: code bytes + compressed model bytes, at most 16,000,000 decimal bytes"
RUNS = "README, Submission Process 1: enough run logs for p < 0.01 on 0.005 nats"
LOG = "README, Submission Process 3: a train log, automatically produced by your script"
TIME = "README: at most 10 minutes of training on 8xH100 and 10 more of evaluation"
OFFLINE = "README FAQ: no external downloads, training data access or network calls during evaluation"
FOUR = "Issue #1017: causality, a normalised distribution, score before update, one pass"
CHEAT = "README FAQ: you cannot train on the validation set before you evaluate on it; Issue #1017"
METRIC = "README, Submission Process 2: prove that val_bpb is correctly calculated"
NONE = "no public ruling"

CATALOG: dict[str, Kind] = {
    # files
    "readme-missing": Kind(V, "no README.md", FILES),
    "json-missing": Kind(V, "no submission.json", FILES),
    "log-missing": Kind(V, "no train log", FILES),
    "script-missing": Kind(V, "no Python script", FILES),
    "script-name": Kind(N, "the script is not called train_gpt.py", FILES),
    "script-syntax": Kind(V, "the script does not parse", "README: broken scripts will not be accepted"),
    "script-newer": Kind(N, "the script needs Python 3.12 or later", NONE),
    "json-broken": Kind(V, "the JSON cannot be read", FILES),
    "json-field-missing": Kind(V, "a required JSON field is missing", FILES),
    "json-field-type": Kind(V, "a JSON field has the wrong type or is not finite", FILES),
    "file-symlink": Kind(V, "a symbolic link leaves the folder", "README: a PR only adds a new folder"),
    "file-skipped": Kind(W, "a file was not (wholly) read", NONE),
    # bytes
    "size-over-cap": Kind(V, "over 16,000,000 bytes", BYTES),
    "size-code-compressed": Kind(W, "fits only if the code is counted compressed", BYTES),
    "size-log-total": Kind(V, "the log itself reports a total over the cap", BYTES),
    "size-sum": Kind(W, "logged total is not model + code", BYTES),
    "size-json": Kind(W, "bytes in the JSON and in the logs differ", BYTES),
    "size-code-log": Kind(W, "logged code size is not the script's size", LOG),
    "size-helper-code": Kind(W, "imported helper code beside the counted script", BYTES),
    "size-unknown": Kind(N, "model bytes not determined", BYTES),
    # packed code
    "code-packed": Kind(N, "packed code", "accepted in the table (e.g. #1394); readable copy is good practice"),
    "code-bomb": Kind(V, "packed code exceeds the unpacking bound", NONE),
    "code-opaque": Kind(W, "code built at run time that cannot be read statically", NONE),
    "code-indirect": Kind(W, "the script runs another file", BYTES),
    "code-external": Kind(N, "an external program is started", NONE),
    # log against code
    "log-source-absent": Kind(N, "log does not carry the source: not determined", LOG),
    "log-source-differs": Kind(V, "the log was made by other source code", LOG),
    "log-params": Kind(W, "parameter counts differ", LOG),
    "log-hparams": Kind(W, "the log ran with other values than the script's defaults, not documented", LOG),
    "log-truncated": Kind(W, "no final score in the log", LOG),
    "log-nonfinite": Kind(W, "NaN or infinite loss in the log", LOG),
    "log-order": Kind(W, "steps or times go backwards in the log", LOG),
    "log-traceback": Kind(W, "the log holds a traceback", LOG),
    "log-copy": Kind(N, "two logs are the same file", RUNS),
    # seeds and statistics
    "seed-name": Kind(V, "file name and content of a log disagree on the seed", RUNS),
    "seed-copied": Kind(V, "the same log under two seeds", RUNS),
    "seed-few": Kind(W, "fewer than three seeds", RUNS),
    "seed-no-log": Kind(W, "a seed in the JSON has no log", RUNS),
    "seed-config": Kind(W, "the seeds did not run with the same settings", RUNS),
    "seed-score": Kind(V, "a seed's score in the JSON is not the one in its log", RUNS),
    "stat-score": Kind(V, "the claimed score is in no log", RUNS),
    "stat-best-seed": Kind(W, "the claimed score is the best seed's, not the mean", RUNS),
    "stat-other-metric": Kind(W, "the claimed score is not the final one of the logs", RUNS),
    "stat-std": Kind(W, "the claimed deviation does not follow from the logs", RUNS),
    "stat-p-value": Kind(N, "p-value not recomputed: the rival's runs are not in the folder", RUNS),
    # time
    "time-train": Kind(V, "training over 600 s", TIME),
    "time-train-edge": Kind(W, "training over 600 s by less than 1 %", TIME),
    "time-eval": Kind(V, "evaluation over 600 s", TIME),
    "time-cap": Kind(V, "wall-clock cap set above 600 s", TIME),
    "time-unknown": Kind(N, "training or evaluation time not determined", TIME),
    "time-hardware": Kind(W, "not run on eight processes", TIME),
    # code safety and data
    "net-call": Kind(V, "network call in the submitted script", OFFLINE),
    "net-import": Kind(W, "network library imported by the submitted script", OFFLINE),
    "net-helper": Kind(N, "network use in a helper file (data preparation)", OFFLINE),
    "load-pickle": Kind(W, "pickle loading executes code from the file", NONE),
    "val-calibration": Kind(V, "quantisation calibrated on validation data", CHEAT),
    "val-train-files": Kind(V, "training files include validation files", CHEAT),
    "val-train-loader": Kind(V, "training loader built on validation data", CHEAT),
    "val-adapt": Kind(W, "a function updates weights and is given validation data", CHEAT),
    # bytes of the metric
    "bytes-fallback-missing": Kind(V, "byte-fallback pieces not handled", METRIC + "; #1143, #1184, #1289"),
    "bytes-fallback-charge": Kind(V, "byte-fallback pieces not charged one byte", METRIC + "; #1143, #1184, #1289"),
    "bytes-characters": Kind(V, "characters counted instead of UTF-8 bytes", METRIC),
    "bytes-leading-space": Kind(V, "the space of a piece's marker is not handled", METRIC + "; Issue #897"),
    "bytes-boundary": Kind(V, "leading space charged without looking at the previous token", METRIC),
    "bytes-constant": Kind(V, "bits per byte from a constant", METRIC),
    "bytes-sidecar": Kind(N, "bytes come from a side file: not determined", METRIC + "; Issue #2127"),
    # scored tokens
    "score-tail": Kind(
        N, "the tail of the validation tokens is not scored", NONE + "; the official script does the same"
    ),
    "score-subset": Kind(W, "part of the validation set is scored", "README: score on the fixed validation split"),
    "score-count": Kind(W, "validation token counts differ between logs", METRIC),
    "score-old-export": Kind(N, "older validation export", "the table's first rows; not comparable to later ones"),
    "score-count-unknown": Kind(N, "validation token count not determined or not a known one", METRIC),
    # evaluation methods
    "eval-sliding": Kind(N, "sliding-window evaluation", "README FAQ: evaluation at any sequence length; legal"),
    "eval-ttt": Kind(N, "test-time training", "README FAQ: only on tokens already graded; " + FOUR),
    "eval-ttt-order": Kind(W, "an update stands before the first scoring in a test-time-training function", FOUR),
    "eval-ttt-prequant": Kind(V, "test-time training before quantisation and scoring", FOUR + "; pre-quant TTT"),
    "eval-two-pass": Kind(V, "second scoring pass", FOUR),
    "eval-ngram": Kind(W, "n-gram cache or tilt at evaluation", FOUR + "; #886, #1420, legal form #1514"),
    "eval-slot": Kind(V, "SLOT: a delta optimised at evaluation", "#1240: causality violation; " + FOUR),
    "eval-ppm": Kind(W, "PPM mixing at evaluation", FOUR),
    "eval-logit-bias": Kind(V, "logit bias fitted at evaluation (ETLB)", FOUR),
    "eval-temperature": Kind(W, "temperature fitted at evaluation: data not determined", FOUR),
    # run in a confined process, with --execute only
    "exec-causal": Kind(V, "when run, the script's model reads later tokens", FOUR),
    "exec-normalised": Kind(V, "when run, the script's model gives no normalised distribution", FOUR),
    "exec-passed": Kind(N, "when run, the script's model is causal and normalised", FOUR),
    "exec-unknown": Kind(N, "running the script's model: not determined", FOUR),
}


def finding(code: str, message: str, evidence: str, severity: Severity | None = None) -> Finding:
    """A Finding with the catalogue's severity (unless given) and ruling."""
    kind = CATALOG[code]
    return Finding(code, severity or kind.severity, message, evidence, kind.ruling)
