"""The metric: byte tables known to be wrong, constants instead of byte counts, and how many tokens are scored."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from paramgolf.submit.audit.catalog import Finding, finding
from paramgolf.submit.audit.folder import Submission
from paramgolf.submit.audit.script import Function, Script, call_name

# Validation targets of the published exports, as the logs print them.
KNOWN_COUNTS = {62_021_632: "sp1024", 45_508_608: "sp4096", 45_514_752: "sp4096", 40_540_160: "sp8192",
                47_851_520: "sp8192 CaseOps"}  # fmt: skip
OLD_COUNT = 63_779_840
_SUBSET = re.compile(r"^(val_max_tokens|max_val_tokens|val_doc_limit|ttt_doc_limit|val_limit|eval_doc_limit)$")
_LN2_AND_UNITS = {0, 1, 2, 8, -1}


def check(submission: Submission) -> Iterator[Finding]:
    for script in submission.code:
        for function in script.functions:
            yield from _table(script, function)
        yield from _boundary(script)
        yield from _constants(script)
        yield from _tail(script)
        sidecar = [
            (n, line) for n, line in script.identifiers if re.search(r"byte_sidecar|bytes_sidecar|val_bytes_files", n)
        ]
        if sidecar:
            name, line = min(sidecar, key=lambda item: item[1])
            yield finding("bytes-sidecar", "byte counts are read from a file beside the shards", script.at(line, name))
    yield from _counts(submission)


def _text_of(node: ast.AST) -> str:
    return ast.unparse(node)


def _table(script: Script, function: Function) -> Iterator[Finding]:
    """The function that fills a table of bytes per piece, recognised by `table[...] = len(...)`."""
    fills = [
        n
        for n in ast.walk(function)
        if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Subscript)
        and "byte" in _text_of(n.targets[0]) and isinstance(n.value, ast.Call) and call_name(n.value) == "len"
    ]  # fmt: skip
    calls = {call_name(n) for n in ast.walk(function) if isinstance(n, ast.Call)}
    if not fills or not calls & {"id_to_piece", "IdToPiece", "piece", "id_to_token"}:
        return
    first = fills[0]
    text = _text_of(function)
    if "encode" not in calls:
        yield finding("bytes-characters", "len() of the piece's text, not of its UTF-8 bytes", script.at(first.lineno))
    if not calls & {"is_byte", "IsByte"} and "0x" not in text:
        yield finding("bytes-fallback-missing", "<0x..> pieces get the length of their name", script.at(first.lineno))
    if "▁" not in text and "\\u2581" not in text:
        yield finding("bytes-leading-space", "the marker U+2581 is counted as three bytes", script.at(first.lineno))
    for branch in ast.walk(function):
        if isinstance(branch, ast.If) and re.search(r"\b(is_byte|IsByte)\(", _text_of(branch.test)):
            yield from _fallback(script, branch)


def _fallback(script: Script, branch: ast.If) -> Iterator[Finding]:
    for node in branch.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            value = node.value
            if "byte" in _text_of(node.targets[0]) and not (isinstance(value, ast.Constant) and value.value == 1):
                message = f"a byte-fallback piece is charged {_text_of(value)[:40]} instead of 1"
                yield finding("bytes-fallback-charge", message, script.at(node.lineno))


def _boundary(script: Script) -> Iterator[Finding]:
    used = [(n, line) for n, line in script.identifiers if re.search(r"leading_space", n)]
    if used and not any(re.search(r"boundary", n) for n, _ in script.identifiers):
        name, line = min(used, key=lambda item: item[1])
        message = "leading spaces are counted and no table of boundary tokens exists"
        yield finding("bytes-boundary", message, script.at(line, name))


def _constants(script: Script) -> Iterator[Finding]:
    for node in script.nodes:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        if not re.search(r"(^|_)bpb$", node.targets[0].id) or not isinstance(node.value, ast.BinOp):
            continue
        names = " ".join(n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(node.value)
                         if isinstance(n, ast.Name | ast.Attribute)).lower()  # fmt: skip
        odd = [n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant)
               and isinstance(n.value, int | float) and n.value not in _LN2_AND_UNITS
               and abs(n.value - 0.6931471805599453) > 1e-4 and abs(n.value - 1.4426950408889634) > 1e-4]  # fmt: skip
        if odd and "loss" in names and not re.search(r"byte|bpt|tok", names):
            message = f"{_text_of(node)[:90]}: {odd[0]} stands where the byte count belongs"
            yield finding("bytes-constant", message, script.at(node.lineno, node.targets[0].id))


def _tail(script: Script) -> Iterator[Finding]:
    for function in script.functions:
        if "val" not in function.name.lower():
            continue
        for node in ast.walk(function):
            if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and "//" in _text_of(node.left)):
                continue
            if re.search(r"seq_len|\bT\b|block", _text_of(node)) and "numel" in _text_of(node):
                message = f"{_text_of(node)[:70]}: the rest of the tokens is dropped"
                yield finding("score-tail", message, script.at(node.lineno, "//"))
                return
        for node in ast.walk(function):
            if (
                isinstance(node, ast.Subscript)
                and isinstance(node.slice, ast.Slice)
                and "val_tok" in _text_of(node.value)
            ):
                upper = node.slice.upper
                if isinstance(upper, ast.Constant) and isinstance(upper.value, int) and upper.value > 1:
                    yield finding("score-subset", f"{_text_of(node)[:60]}", script.at(node.lineno, "val_tok"))


def _counts(submission: Submission) -> Iterator[Finding]:
    known = [(log, *log.val_tokens) for log in submission.logs if log.val_tokens]
    if submission.logs and not known:
        yield finding("score-count-unknown", "no log says how many tokens are scored", submission.path.name)
    for log, count, line in known:
        if count != known[0][1]:
            message = f"{count:,} validation tokens, {known[0][1]:,} in {known[0][0].name}"
            yield finding("score-count", message, f"{log.name}:{line}")
    for log, count, line in known[:1]:
        if count == OLD_COUNT:
            yield finding("score-old-export", f"{count:,} validation tokens", f"{log.name}:{line}")
        elif count not in KNOWN_COUNTS:
            message = f"{count:,} validation tokens: not a published export's count, whether all is not determined"
            yield finding("score-count-unknown", message, f"{log.name}:{line}")
    for log in submission.logs:
        for name, (value, line) in log.hparams.items():
            if (
                _SUBSET.match(name)
                and value.isdecimal()
                and len(value) < 12
                and 0 < int(value) < 50_000 * (1000 if "token" in name else 1)
            ):
                yield finding("score-subset", f"{name} is {value}", f"{log.name}:{line}")
