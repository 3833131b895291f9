"""Which evaluation methods the code contains, the line that shows each, and whether the logs say they ran."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from paramgolf.submit.audit.catalog import CATALOG, Finding, Severity, finding
from paramgolf.submit.audit.check_log import environment_defaults
from paramgolf.submit.audit.folder import Submission
from paramgolf.submit.audit.script import Function, Script, call_name


@dataclass(frozen=True)
class Method:
    """`names` are identifiers of the code, `switch` hyper-parameters of the log that turn it on."""

    code: str
    title: str
    names: str
    switch: str


METHODS = (
    Method("eval-sliding", "sliding windows", r"sliding|^eval_stride$|^stride_eval", r"^(eval_stride|sliding\w*)$"),
    Method("eval-ttt", "test-time training", r"(^|_)ttt(_|$)|test_time_train", r"^(\w+_)?ttt_enabled$"),
    Method("eval-ttt-prequant", "pre-quantisation test-time training", r"pre_?quant_?\w*ttt|ttt_pre_?quant",
           r"^pre_?quant_ttt_enabled$"),
    Method("eval-two-pass", "a second scoring pass", r"two_pass|second_pass|rescore|re_score", r"^two_pass\w*$"),
    Method("eval-ngram", "an n-gram cache or tilt",
           r"n_?gram_?(cache|tilt|mix\w*|table|count\w*|backoff|blend|hint\w*|expert|eval|lm|model|order)|(backoff|eval)_ngram",
           r"^(n_?gram_\w*enabled|n_?gram_tilt\w*)$"),
    Method("eval-slot", "SLOT", r"(^|_)slot_(steps?|lr|delta|enabled|eval|opt\w*|lbfgs|bias)|(eval|score)\w*_slot(_|$)",
           r"^slot_enabled$"),
    Method("eval-ppm", "PPM", r"(^|_)ppm(d|c)?(_|$)|^PPM", r"^ppm_enabled$"),
    Method("eval-logit-bias", "a logit bias fitted at evaluation", r"etlb|eval_time_logit_bias", r"^etlb_enabled$"),
    Method("eval-temperature", "a fitted temperature", 
           r"(find|fit|optimal|search|calibrate)_temp|temp_scaling|eval_temp(erature)?$", r"^temp_scaling$"),
)  # fmt: skip
_OFF = {"0", "false", "none", "0.0"}


def check(submission: Submission) -> Iterator[Finding]:
    for method in METHODS:
        hits = [
            (script, name, line)
            for script in submission.code
            for name, line in script.identifiers
            if re.search(method.names, name, re.I)
        ]
        if hits:
            yield _method(submission, method, *_telling(hits))
    for script in submission.code:
        for function in script.functions:
            yield from _order(script, function)


def _telling(hits: list[tuple[Script, str, int]]) -> tuple[Script, str, int]:
    """The function definition if there is one, else the first line."""
    scripts = {id(script): script for script, _, _ in hits}
    defined = {(key, f.name, f.lineno) for key, script in scripts.items() for f in script.functions}
    for script, name, line in sorted(hits, key=lambda hit: hit[2]):
        if (id(script), name, line) in defined:
            return script, name, line
    return min(hits, key=lambda hit: hit[2])


def _method(submission: Submission, method: Method, script: Script, name: str, line: int) -> Finding:
    settings = {
        value.lower()
        for log in submission.logs
        for key, (value, _) in log.hparams.items()
        if re.search(method.switch, key, re.I)
    }
    usual = {d.lower() for name, (_, d, _) in environment_defaults(submission.code).items()
             if re.search(method.switch, name, re.I)}  # fmt: skip
    severity = CATALOG[method.code].severity
    labelled = [(log, s) for log in submission.logs for s in log.scores if re.search(method.names, s.label, re.I)]
    if labelled:
        log, score = labelled[-1]
        state = f"it made a score ({log.name}:{score.line})"
    elif settings:
        on = not settings <= _OFF
        state = "on in the logs" if on else "off in the logs"
        severity = severity if on else Severity.NOTE
    elif usual:
        on = not usual <= _OFF
        state = f"{'on' if on else 'off'} by default; whether it ran is not determined"
        severity = severity if on else Severity.NOTE
    else:
        state = "whether it ran is not determined"
        severity = Severity.WARNING if severity is Severity.VIOLATION else severity
    return finding(method.code, f"{method.title} in the code ({name}); {state}", script.at(line, name), severity)


def _order(script: Script, function: Function) -> Iterator[Finding]:
    """An update above the first accumulation of a score, in a function that does both on validation tokens."""
    if not re.search(r"ttt|test_time", function.name, re.I):
        return
    updates, scores = [], []
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and call_name(node) == "backward":
            updates.append(node.lineno)
        target = node.target if isinstance(node, ast.AugAssign) else None
        if isinstance(target, ast.Name) and re.search(r"loss_sum|nll|byte_sum|byte_count|token_count", target.id):
            scores.append(target.lineno)
        if isinstance(node, ast.Call) and call_name(node).startswith(("_accumulate", "accumulate", "add_")):
            scores.append(node.lineno)
    if updates and scores and min(updates) < min(scores):
        message = f"{function.name}: backward stands above the first score (line {min(scores)}); order not determined"
        yield finding("eval-ttt-order", message, script.at(min(updates), "backward"))
