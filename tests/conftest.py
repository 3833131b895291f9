"""One data cache for all tests of all workers, so that the built-in corpus is tokenised once."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ.setdefault("PARAMGOLF_CACHE", str(tmp_path_factory.getbasetemp().parent / "cache"))
