"""The shared reference material (parity numbers, real text, tokenizers), where a machine has it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def shared_path(*parts: str) -> Path:
    """A path under PARAMGOLF_SHARED, or skip the test with the reason."""
    root = os.environ.get("PARAMGOLF_SHARED")
    if not root:
        pytest.skip("PARAMGOLF_SHARED is not set: the shared reference material is absent")
    path = Path(root, *parts)
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    return path
