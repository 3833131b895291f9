"""paramgolf: text and budgets in; the best language model that fits out, as one file with a score anyone can check.

`paramgolf.run(recipe)` does the main job, `paramgolf.load("model.golf")` reads what it wrote. Both are imported at
first use, so that importing the package, and `golf --help`, stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_PUBLIC = {
    "run": "paramgolf.runner.run",
    "load": "paramgolf.api",
    "LanguageModel": "paramgolf.api",
    "load_recipe": "paramgolf.recipe.load",
    "GolfError": "paramgolf.errors",
}
__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'paramgolf' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)
