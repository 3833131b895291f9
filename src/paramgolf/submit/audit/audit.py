"""`audit(path)`: everything that can be said about a submission by reading it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paramgolf.submit.audit.catalog import Finding, Severity, finding
from paramgolf.submit.audit.execute import check as run_model
from paramgolf.submit.audit.folder import Submission, read_submission
from paramgolf.submit.audit.registry import CHECKS

_ORDER = list(Severity)


@dataclass(frozen=True)
class Audit:
    """The findings of one submission, violations first."""

    name: str
    findings: list[Finding]

    @property
    def violations(self) -> int:
        return sum(f.severity is Severity.VIOLATION for f in self.findings)

    def as_dict(self) -> dict[str, Any]:
        counts = Counter(str(f.severity) for f in self.findings)
        return {
            "name": self.name,
            "counts": {str(s): counts[str(s)] for s in _ORDER},
            "findings": [f.as_dict() for f in self.findings],
        }


def audit(path: str | Path, *, execute: bool = False) -> Audit:
    """Audit the folder of a submission, or one script. Nothing of it is executed, unless `execute` asks for the check
    of its model in a confined process (see execute.py).

    Raises GolfError when `path` itself cannot be read; every defect of what it holds is a Finding.
    """
    path = Path(path)
    submission = read_submission(path)
    found: dict[tuple[str, str], list[Finding]] = {}
    for name in CHECKS:
        for item in _run(name, submission):
            found.setdefault((item.code, item.message), []).append(item)
    findings = [_merged(alike) for alike in found.values()]
    findings += list(run_model(submission)) if execute else []
    return Audit(path.resolve().name, sorted(findings, key=lambda f: _ORDER.index(f.severity)))


def _run(name: str, submission: Submission) -> list[Finding]:
    try:
        return list(CHECKS[name](submission))
    except RecursionError:
        message = f"the check '{name}' is not determined: an expression is nested too deeply"
        return [finding("file-skipped", message, submission.path.name)]


def _merged(alike: list[Finding]) -> Finding:
    """The same statement about several places becomes one finding with up to four places as evidence."""
    places = list(dict.fromkeys(f.evidence for f in alike))
    rest = f"; and {len(places) - 4} more" if len(places) > 4 else ""
    return replace(alike[0], evidence="; ".join(places[:4]) + rest)


def expand(paths: Iterable[Path]) -> list[Path]:
    """A folder that holds nothing but folders, each with a script, JSON or log in it, stands for those folders."""
    result: list[Path] = []
    for path in paths:
        inner = sorted(path.iterdir()) if path.is_dir() else []
        inner = [p for p in inner if not p.name.startswith(".")]
        is_set = bool(inner) and all(p.is_dir() for p in inner) and all(_looks_submitted(p) for p in inner)
        result += inner if is_set else [path]
    return result


def _looks_submitted(folder: Path) -> bool:
    return any(p.suffix == ".py" or p.suffix == ".log" or p.name == "submission.json" for p in folder.iterdir())


def audit_text(audits: list[Audit]) -> str:
    """The findings as a page of text."""
    blocks = []
    for result in audits:
        counts = result.as_dict()["counts"]
        lines = [f"{result.name}: " + ", ".join(f"{n} {s}{'' if n == 1 else 's'}" for s, n in counts.items())]
        for f in result.findings:
            lines.append(f"  {f.severity:<9}  {f.code}: {f.message}")
            lines.append(f"             {f.evidence}")
            lines.append(f"             rule: {f.ruling}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
