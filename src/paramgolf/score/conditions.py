"""What a check of a scorer speaks of: the two interfaces, the four conditions, and a finding for each."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

import numpy as np

CONDITIONS = {
    "causal": "a score does not depend on later tokens, or on other streams where streams are scored apart",
    "normalised": "probabilities that sum to one exist before the target is known, and the target is charged with them",
    "score_first": "nothing that was learnt from a token is used before that token is scored",
    "once": "every token is scored exactly once",
}


@runtime_checkable
class StepScorer(Protocol):
    """Shows a distribution before each token."""

    vocab_size: int

    def reset(self, stream: np.ndarray) -> None: ...

    def log_probs(self) -> np.ndarray | None: ...

    def give(self, token: int) -> None: ...


@runtime_checkable
class TokenScorer(Protocol):
    """Says what each token was charged."""

    vocab_size: int

    def score(self, stream: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]: ...


class Verdict(StrEnum):
    PASS = "pass"
    VIOLATION = "violation"
    UNKNOWN = "not determined"


@dataclass(frozen=True)
class Finding:
    """What is known about one condition. `numbers`: position, change in nats, counts (JSON-able)."""

    verdict: Verdict
    evidence: str
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Legality:
    """The result: a finding for each of `CONDITIONS`; how many tokens were used and how many texts were tried."""

    findings: dict[str, Finding]
    tokens: int
    texts: int

    @property
    def verdict(self) -> Verdict:
        """violation if there is one, pass if all conditions pass."""
        verdicts = {finding.verdict for finding in self.findings.values()}
        return next((v for v in (Verdict.VIOLATION, Verdict.UNKNOWN) if v in verdicts), Verdict.PASS)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        conditions = {
            name: {"verdict": str(f.verdict), "evidence": f.evidence, **f.numbers} for name, f in self.findings.items()
        }
        return {"verdict": str(self.verdict), "tokens": self.tokens, "texts": self.texts, "conditions": conditions}

    def text(self) -> str:
        """The same for a reader, a line for each condition."""
        return "\n".join(f"{name:<12} {f.verdict:<15} {f.evidence}" for name, f in self.findings.items())
