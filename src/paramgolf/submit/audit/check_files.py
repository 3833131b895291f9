"""Required files, JSON fields, packed code and what could not be read."""

from __future__ import annotations

from collections.abc import Iterator

from paramgolf.submit.audit.catalog import Finding, finding
from paramgolf.submit.audit.folder import Submission

_FIELDS = {"author": str, "github_id": str, "val_bpb": float}


def check(submission: Submission) -> Iterator[Finding]:
    yield from submission.reading
    if not submission.single:
        yield from _required(submission)
        yield from _fields(submission)
    yield from _scripts(submission)


def _required(submission: Submission) -> Iterator[Finding]:
    where = submission.path.name
    if not submission.readme:
        yield finding("readme-missing", "the folder has no README.md (or an empty one)", where)
    if not submission.json_name:
        yield finding("json-missing", "the folder has no submission.json", where)
    if not submission.logs:
        yield finding("log-missing", "the folder has no log with training or validation lines", where)
    if not submission.scripts:
        yield finding("script-missing", "the folder has no Python script", where)
    elif submission.entry is None:
        yield finding("script-name", "which script was submitted is not determined", where)
    elif submission.entry.name != "train_gpt.py":
        yield finding("script-name", f"taken as the submitted script: {submission.entry.name}", submission.entry.name)


def _fields(submission: Submission) -> Iterator[Finding]:
    if submission.json is None:
        return
    name, table = submission.json_name, submission.json
    for field, kind in _FIELDS.items():
        value = table.get(field)
        if value is None:
            other = " (there is mean_val_bpb)" if field == "val_bpb" and "mean_val_bpb" in table else ""
            yield finding("json-field-missing", f"'{field}' is missing{other}", name)
        elif kind is float:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
                yield finding("json-field-type", f"'{field}' is not a finite number", f"{name}: {str(value)[:60]!r}")
        elif not isinstance(value, str | int) or value == "":
            yield finding("json-field-type", f"'{field}' is not a name", f"{name}: {str(value)[:60]!r}")


def _scripts(submission: Submission) -> Iterator[Finding]:
    for script in submission.scripts:
        for layer in script.with_layers():
            if layer.error:
                is_entry = script in submission.running or submission.entry is None
                code = "script-syntax" if is_entry else "file-skipped"
                yield finding(code, f"does not parse: {layer.error}", layer.name)
            if layer.newer:
                yield finding(
                    "script-newer", "f-strings of Python 3.12 (their contents are not looked into)", layer.name
                )
            if layer.layers:
                sizes = ", ".join(f"{inner.size:,}" for inner in layer.layers)
                yield finding("code-packed", f"{layer.size:,} bytes hold {sizes} bytes of code", layer.name)
            for line in layer.bombs:
                yield finding("code-bomb", "unpacks to more than is read, or in too many layers", layer.at(line))
            for line in layer.opaque:
                yield finding("code-opaque", "exec/eval of a value not determined by reading", layer.at(line))
            for line, target in layer.indirect:
                yield finding("code-indirect", f"runs {target or 'a file that is not determined'}", layer.at(line))
