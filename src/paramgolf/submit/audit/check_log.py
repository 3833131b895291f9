"""Log against code: carried source, parameter counts, hyper-parameters, and whether the log is whole."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator

from paramgolf.submit.audit.catalog import Finding, finding
from paramgolf.submit.audit.folder import Submission
from paramgolf.submit.audit.log import Log
from paramgolf.submit.audit.script import Script, call_name, parse, shown

# The logs print the effective embed_lr and head_lr (the tied rate, or 0), not the values that were set.
_SKIP = {"seed", "run_id", "world_size", "rank", "local_rank", "embed_lr", "head_lr"}


def check(submission: Submission) -> Iterator[Finding]:
    if submission.single:
        return
    defaults = environment_defaults(submission.code)
    for log in submission.logs:
        yield from _whole(log)
        yield from _source(submission, log)
        yield from _hparams(submission, log, defaults)
    yield from _params(submission)


def _whole(log: Log) -> Iterator[Finding]:
    if log.final is None:
        yield finding("log-truncated", "no final score line", log.name)
    if log.nonfinite:
        yield finding("log-nonfinite", "a loss or score is not finite", f"{log.name}:{log.nonfinite}")
    if log.backwards:
        yield finding("log-order", "a step or a time is smaller than one before it", f"{log.name}:{log.backwards}")
    if log.traceback:
        yield finding("log-traceback", "a Python traceback", f"{log.name}:{log.traceback}")


def _source(submission: Submission, log: Log) -> Iterator[Finding]:
    if log.source is None:
        message = "whether the script made this log is not determined (it carries no source)"
        yield finding("log-source-absent", message, log.name)
        return
    scripts = [layer for script in submission.scripts for layer in script.with_layers()]
    if not scripts or any(_same_text(log.source, script.text) for script in scripts):
        return
    carried = parse(log.name, log.source, len(log.source))
    if any(script.tree and carried.tree and _same_tree(carried.tree, script.tree) for script in scripts):
        return
    nearest = min(scripts, key=lambda script: _distance(log.source or "", script.text))
    ours, theirs = Counter(_lines(nearest.text)), Counter(_lines(log.source))
    extra, lost = list((theirs - ours).elements()), list((ours - theirs).elements())
    first = f"; e.g. in the log {shown(extra[0], 70)!r}" if extra else ""
    message = f"{len(extra)} line(s) only in the log, {len(lost)} only in {nearest.name}{first}"
    yield finding("log-source-differs", message, f"{log.name}:{log.source_line}")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def _same_text(a: str, b: str) -> bool:
    return _lines(a) == _lines(b)


def _same_tree(a: ast.Module, b: ast.Module) -> bool:
    return len(a.body) == len(b.body) and ast.dump(a) == ast.dump(b)


def _distance(a: str, b: str) -> int:
    one, two = Counter(_lines(a)), Counter(_lines(b))
    return (one - two).total() + (two - one).total()


def environment_defaults(scripts: list[Script]) -> dict[str, tuple[str, str, str]]:
    """Hyper-parameter name -> (environment variable, default, evidence), where both are literals."""
    found: dict[str, tuple[str, str, str]] = {}
    for script in scripts:
        for node in script.nodes:
            pairs: list[tuple[ast.expr, ast.expr]] = []
            if isinstance(node, ast.Assign):
                target = node.targets[0]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=False))
                else:
                    pairs = [(target, node.value)]
            elif isinstance(node, ast.AnnAssign) and node.value:
                pairs = [(node.target, node.value)]
            for target, value in pairs:
                read = _environment_read(value)
                if read and isinstance(target, ast.Name):
                    found.setdefault(target.id, (*read, script.at(target.lineno, read[0])))
    return found


def _environment_read(value: ast.expr) -> tuple[str, str] | None:
    """("NUM_LAYERS", "9") for `int(os.environ.get("NUM_LAYERS", 9))`, possibly inside bool() or float()."""
    for node in ast.walk(value):
        if not isinstance(node, ast.Call) or call_name(node) not in ("get", "getenv") or len(node.args) != 2:
            continue
        name, default = node.args
        if not (isinstance(name, ast.Constant) and isinstance(default, ast.Constant)):
            continue
        if isinstance(name.value, str) and name.value.isupper():
            return name.value, str(default.value)
    return None


def _hparams(submission: Submission, log: Log, defaults: dict[str, tuple[str, str, str]]) -> Iterator[Finding]:
    documented = submission.readme + str(submission.json or "")
    differ = []
    for name, (value, line) in log.hparams.items():
        if name in defaults and name not in _SKIP and not re.search(r"path|dir|file|_id$", name):
            variable, default, evidence = defaults[name]
            if _unlike(value, default) and not re.search(rf"\b{variable}\s*[=:]", documented):
                differ.append((line, f"{name} {value} (default {default})", evidence))
    if differ:
        told = ", ".join(text for _, text, _ in differ[:5]) + (", ..." if len(differ) > 5 else "")
        message = f"{len(differ)} value(s) neither the script's default nor set in the README: {told}"
        yield finding("log-hparams", message, f"{log.name}:{differ[0][0]}; {differ[0][2]}")


def _unlike(logged: str, default: str) -> bool:
    """True when both are numbers or truth values and differ; other texts are not compared."""
    one, two = _figure(logged), _figure(default)
    return one is not None and two is not None and abs(one - two) > 1e-6 * max(abs(one), abs(two))


def _figure(text: str) -> float | None:
    words = {"true": 1.0, "false": 0.0}
    try:
        return words.get(text.lower()) if text.lower() in words else float(text)
    except ValueError:
        return None


def _params(submission: Submission) -> Iterator[Finding]:
    known = [(log, *log.params) for log in submission.scored_logs if log.params]
    for log, count, line in known[1:]:
        if count != known[0][1]:
            message = f"{count:,} parameters here, {known[0][1]:,} in {known[0][0].name}"
            yield finding("log-params", message, f"{log.name}:{line}")
    claimed = (submission.json or {}).get("model_params")
    if known and isinstance(claimed, int) and claimed not in {count for _, count, _ in known}:
        message = f"model_params is {claimed:,} in the JSON, {known[0][1]:,} in the log"
        yield finding("log-params", message, f"{known[0][0].name}:{known[0][2]}")
