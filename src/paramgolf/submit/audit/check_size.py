"""Bytes: the decimal cap, from files where there are files and from the log otherwise."""

from __future__ import annotations

from collections.abc import Iterator

from paramgolf.submit.audit.catalog import Finding, finding
from paramgolf.submit.audit.folder import Submission, model_files
from paramgolf.submit.audit.log import Count, Log

CAP = 16_000_000
MIB16 = 16 << 20


def check(submission: Submission) -> Iterator[Finding]:
    if submission.single:
        size = sum(submission.files.values())
        if size > CAP:
            yield finding("size-over-cap", f"the script alone has {size:,} bytes", submission.path.name)
        return
    yield from _helpers(submission)
    yield from _totals(submission)
    for log in submission.logs:
        yield from _one_log(submission, log)
    yield from _json(submission)


def _helpers(submission: Submission) -> Iterator[Finding]:
    helpers = [s for s in submission.running[1:] if not any(s.name == target for _, target in _indirect(submission))]
    if helpers:
        names = ", ".join(f"{s.name} ({s.size:,} bytes)" for s in helpers)
        yield finding("size-helper-code", f"imported by the script and not in its size: {names}", helpers[0].name)


def _indirect(submission: Submission) -> list[tuple[int, str]]:
    return [item for script in submission.running for item in script.indirect]


def _totals(submission: Submission) -> Iterator[Finding]:
    code = sum(script.size for script in submission.running)
    named = [(name, size) for name, size in model_files(submission) if not name.endswith(".pt")]
    if named:
        yield from _verdict(named[0][1], code, None, f"{named[0][0]}: {named[0][1]:,} bytes on disk")
        return
    known = [(log, log.model) for log in submission.logs if log.model]
    if not known:
        yield finding("size-unknown", "no model file and no log line with its compressed bytes", submission.path.name)
    for log, model in known:
        if model and code:
            squeezed = [c for c in log.codes if "compressed" in c.label and "uncompressed" not in c.label]
            evidence = f"{log.name}:{model.line}: model {model.bytes:,} bytes; code on disk {code:,} bytes"
            yield from _verdict(model.bytes, code, squeezed[-1] if squeezed else None, evidence)


def _verdict(model: int, code: int, squeezed: Count | None, evidence: str) -> Iterator[Finding]:
    total = model + code
    if total <= CAP:
        return
    over = f"{total:,} bytes, {total - CAP:,} over 16,000,000"
    if squeezed is not None and model + squeezed.bytes <= CAP:
        message = f"{over}; {model + squeezed.bytes:,} if the code is counted as {squeezed.bytes:,} compressed bytes"
        yield finding("size-code-compressed", message, evidence)
    else:
        hint = " (under 16 MiB, but the cap is decimal)" if total <= MIB16 else ""
        yield finding("size-over-cap", over + hint, evidence)


def _one_log(submission: Submission, log: Log) -> Iterator[Finding]:
    packed = [t for t in log.totals if t.label]
    later = [t for t in log.totals if t.line > (log.model.line if log.model else 0)]
    total = next(reversed(packed or later), None)
    if total and total.bytes > CAP and log.model:
        message = f"the log's own total is {total.bytes:,} bytes, {total.bytes - CAP:,} over"
        yield finding("size-log-total", message, f"{log.name}:{total.line}")
    plain = [c for c in log.codes if not c.label or "uncompressed" in c.label]
    if total and log.model and log.codes:
        sums = {log.model.bytes + c.bytes for c in log.codes}
        if total.bytes not in sums:
            parts = " or ".join(f"{s:,}" for s in sorted(sums))
            yield finding("size-sum", f"total {total.bytes:,}, but model + code is {parts}", f"{log.name}:{total.line}")
    entry = submission.entry
    if plain and entry:
        sizes = {layer.size for script in submission.running for layer in script.with_layers()} | {
            sum(script.size for script in submission.running)
        }
        if plain[-1].bytes not in sizes:
            message = f"the log counts {plain[-1].bytes:,} bytes of code, {entry.name} has {entry.size:,}"
            yield finding("size-code-log", message, f"{log.name}:{plain[-1].line}")


def _json(submission: Submission) -> Iterator[Finding]:
    claimed = (submission.json or {}).get("bytes_total")
    totals = [t.bytes for log in submission.logs for t in log.totals]
    if isinstance(claimed, int) and totals and claimed not in totals:
        packed = [t.bytes for log in submission.logs for t in log.totals if t.label] or totals
        mean = round(sum(packed) / len(packed))
        if abs(claimed - mean) > 1:
            message = f"bytes_total is {claimed:,}; the logs say {min(packed):,} to {max(packed):,}"
            yield finding("size-json", message, submission.json_name)
