"""JSON as its standard has it: Python's own parser takes NaN and Infinity, and 1e999 for infinity."""

from __future__ import annotations

import json
from typing import Any


def loads(text: str | bytes, **options: Any) -> Any:
    """`json.loads(text, **options)`; a number that is not finite is a ValueError too."""
    return json.loads(text, parse_constant=_no_constant, parse_float=_finite, **options)


def _no_constant(name: str) -> None:
    raise ValueError(f"the number {name}")


def _finite(text: str) -> float:
    value = float(text)
    if value - value != 0:
        raise ValueError(f"the number {text[:20]}")
    return value
