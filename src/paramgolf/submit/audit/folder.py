"""Reads a submission: its files, JSON, scripts and logs. Nothing is executed, no link is followed out of the folder."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from paramgolf.errors import GolfError
from paramgolf.submit.audit.catalog import Finding, finding
from paramgolf.submit.audit.log import Log, read_log
from paramgolf.submit.audit.script import Script, parse
from paramgolf.submit.audit.unpack import MAX_CODE

MAX_JSON = 1 << 20
MAX_FILES = 500
_LOG_TEXT = re.compile(rb"val_bpb|train_loss")
_MODEL_FILE = re.compile(r"\.(ptz|golf|pt|bin|xz|br|zst|safetensors)$|\.(lzma|int\d+)$")


@dataclass
class Submission:
    """A folder of a submission, or one script (`single`)."""

    path: Path
    single: bool
    files: dict[str, int] = field(default_factory=dict)  # relative name -> bytes
    scripts: list[Script] = field(default_factory=list)
    logs: list[Log] = field(default_factory=list)
    json_name: str = ""
    json: dict[str, Any] | None = None
    readme: str = ""
    reading: list[Finding] = field(default_factory=list)  # what went wrong while reading

    @cached_property
    def entry(self) -> Script | None:
        """The submitted script: train_gpt.py, else the largest train*.py, else the only one."""
        named = [s for s in self.scripts if s.name == "train_gpt.py"]
        train = sorted((s for s in self.scripts if s.name.startswith("train")), key=lambda s: -s.size)
        only = self.scripts if len(self.scripts) == 1 else []
        return next(iter(named or train or only), None)

    @cached_property
    def running(self) -> list[Script]:
        """The entry script and the files beside it that it imports or runs, before unpacking."""
        found: list[Script] = []
        waiting = [self.entry] if self.entry else []
        by_stem = {Path(s.name).stem: s for s in self.scripts}
        while waiting:
            script = waiting.pop()
            if script in found:
                continue
            found.append(script)
            for layer in script.with_layers():
                names = {m.split(".")[0] for m in layer.literals.modules.values()}
                names |= {Path(file).stem for _, file in layer.indirect}
                waiting += [by_stem[name] for name in sorted(names) if name in by_stem]
        return found

    @cached_property
    def code(self) -> list[Script]:
        """Every readable layer of the running scripts: what the code checks look into."""
        return [layer for script in self.running for layer in script.readable]

    @cached_property
    def scored_logs(self) -> list[Log]:
        """Logs with a final score, one of each content."""
        seen: dict[str, Log] = {}
        for log in sorted(self.logs, key=lambda log: log.seed_in_name is None):
            if log.final:
                seen.setdefault(log.sha256, log)
        return sorted(seen.values(), key=lambda log: log.name)


def read_submission(path: Path) -> Submission:
    """Read a folder or a script. Raises GolfError when the path itself cannot be read."""
    try:
        if path.is_dir():
            submission = Submission(path, False)
            _list(submission, os.path.realpath(path))
        else:
            if path.exists() and not path.is_file():
                raise GolfError(f"cannot read {path}: neither a file nor a folder; give a submission or a script")
            submission = Submission(path, True)
            with path.open("rb") as stream:
                stream.read(1)
            submission.files[path.name] = path.stat().st_size
    except OSError as error:
        raise GolfError(f"cannot read {path}: {error.strerror}; give the folder of a submission or a script") from error
    root = path if path.is_dir() else path.parent
    for name in sorted(submission.files):
        try:
            _read(submission, root / name, name)
        except OSError as error:
            submission.reading.append(finding("file-skipped", f"cannot be read: {error.strerror}", name))
    return submission


def _list(submission: Submission, real_root: str) -> None:
    os.listdir(submission.path)  # os.walk would hide that the folder cannot be read
    for folder, inner, names in os.walk(submission.path, followlinks=False):
        inner[:] = sorted(n for n in inner if not n.startswith(".") and n != "__pycache__")
        for name in sorted(names) + [n for n in inner if os.path.islink(os.path.join(folder, n))]:
            full = os.path.join(folder, name)
            relative = os.path.relpath(full, submission.path)
            if len(submission.files) >= MAX_FILES:
                submission.reading.append(finding("file-skipped", f"more than {MAX_FILES} files", relative))
                return
            if os.path.islink(full):
                real = os.path.realpath(full)
                if os.path.commonpath([real, real_root]) != real_root:
                    submission.reading.append(finding("file-symlink", "link out of the folder, not followed", relative))
                    continue
            if os.path.isfile(full):
                submission.files[relative] = os.path.getsize(full)
            elif not os.path.isdir(full):
                submission.reading.append(finding("file-skipped", "neither a file nor a folder", relative))


def _read(submission: Submission, path: Path, name: str) -> None:
    suffix, size = path.suffix.lower(), submission.files[name]
    lower = path.name.lower()
    if suffix == ".py" or submission.single:
        if size > MAX_CODE:
            submission.reading.append(finding("file-skipped", f"a script of {size:,} bytes is not read", name))
        else:
            submission.scripts.append(parse(name, path.read_bytes().decode("utf-8", "replace"), size))
    elif suffix == ".json" and lower.startswith("submission") and not submission.json_name:
        submission.json_name = name
        _read_json(submission, path, name)
    elif lower.startswith("readme") and "/" not in name:
        with path.open("rb") as stream:
            submission.readme = stream.read(MAX_JSON).decode("utf-8", "replace")
    elif suffix in (".log", ".txt", ".out") and lower != "requirements.txt":
        with path.open("rb") as stream:
            looks = suffix == ".log" or _LOG_TEXT.search(stream.read(1 << 20))
        if looks:
            log = read_log(path, name)
            submission.logs.append(log)
            if not log.complete:
                submission.reading.append(finding("file-skipped", "only the first 200 MB of the log are read", name))


def _read_json(submission: Submission, path: Path, name: str) -> None:
    if submission.files[name] > MAX_JSON:
        submission.reading.append(finding("file-skipped", "over 1 MB of JSON is not read", name))
        return
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        submission.reading.append(finding("json-broken", f"not JSON: {error}", name))
        return
    if isinstance(value, dict):
        submission.json = value
    else:
        submission.reading.append(finding("json-broken", "the JSON is not an object", name))


def model_files(submission: Submission) -> list[tuple[str, int]]:
    """Files of the folder that look like the compressed model, largest first."""
    found = [(n, s) for n, s in submission.files.items() if _MODEL_FILE.search(n.lower()) and "tokenizer" not in n]
    return sorted(found, key=lambda item: -item[1])
