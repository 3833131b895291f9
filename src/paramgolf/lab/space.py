"""What a sweep varies: `optim.matrix_lr=0.01..0.04:log`, `model.mlp_hidden=1344,1488,1536`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from paramgolf.errors import GolfError
from paramgolf.recipe.load import parse_override, resolve, to_table
from paramgolf.recipe.sections import MOST

_RANGE = re.compile(r"^(?P<low>[^,]+?)\.\.(?P<high>[^:,]+)(?::(?P<how>log|step=.+))?$")


@dataclass(frozen=True)
class Axis:
    """One swept key: a range (`choices` empty) or a list of choices. `own`: the recipe's value."""

    key: str
    own: Any
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float = 0.0
    integer: bool = False

    def suggest(self, trial: Any) -> Any:
        """Ask an Optuna trial for a value."""
        if self.choices:
            return trial.suggest_categorical(self.key, list(self.choices))
        if self.integer:
            return trial.suggest_int(self.key, int(self.low), int(self.high), step=int(self.step) or 1, log=self.log)
        return trial.suggest_float(self.key, self.low, self.high, step=self.step or None, log=self.log)

    def points(self, count: int) -> list[Any]:
        """The values of a one-at-a-time search: all choices, or `count` evenly spaced ones; the recipe's own first."""
        values: list[Any] = list(self.choices)
        if not values:
            low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
            spaced = [low + (high - low) * i / max(1, count - 1) for i in range(count)]
            values = [math.exp(v) if self.log else v for v in spaced]
            if self.step:
                values = [self.low + round((v - self.low) / self.step) * self.step for v in values]
            values = [round(v) if self.integer else float(f"{v:.6g}") for v in values]
        return list(dict.fromkeys([self.own, *values]))

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: two sweeps with the same dictionaries search the same space."""
        if self.choices:
            return {"key": self.key, "choices": list(self.choices)}
        return {"key": self.key, "low": self.low, "high": self.high, "log": self.log, "step": self.step}


def read_words(recipe: str, words: list[str]) -> tuple[list[Axis], list[str]]:
    """(axes, overrides) of the words of a command line: several values or a range are swept, one value is set.

    Every end of every axis is checked against the recipe. Raises GolfError for what no recipe has.
    """
    swept, fixed = [word for word in words if _several(word)], [word for word in words if not _several(word)]
    table = to_table(resolve(recipe, fixed).recipe)
    axes = [_axis(word, table) for word in swept]
    if len({axis.key for axis in axes}) < len(axes):
        raise GolfError("--over: a key is named twice; give each key once")
    for axis in axes:
        for value in axis.choices or (axis.low, axis.high):
            resolve(recipe, [*fixed, override(axis.key, round(value) if axis.integer else value)])
    return axes, fixed


def _several(word: str) -> bool:
    value = word.partition("=")[2].strip()
    return value[:1] not in ('"', "'", "[", "{") and ("," in value or bool(_RANGE.match(value)))


def _axis(word: str, table: dict[str, Any]) -> Axis:
    key, _, text = word.partition("=")
    path = key.strip().split(".")
    own: Any = table
    for part in path:
        own = own.get(part) if isinstance(own, dict) else None
    found = _RANGE.match(text.strip())
    if not found:
        return Axis(key.strip(), own, tuple(_value(part) for part in text.split(",")))
    low, high = _value(found["low"]), _value(found["high"])
    how = found["how"] or ""
    step = _value(how.removeprefix("step=")) if how.startswith("step=") else 0.0
    if not all(map(_is_number, (low, high, step))) or not 0 < high - low < math.inf:
        raise GolfError(f"--over {word:.80}: a range is LOW..HIGH of two numbers, e.g. optim.matrix_lr=0.01..0.04:log")
    if how == "log" and low <= 0:
        raise GolfError(f"--over {word:.80}: a logarithmic range must start above 0")
    if how.startswith("step=") and not (high - low) / MOST < step <= high - low:
        raise GolfError(f"--over {word:.80}: a step must be at most HIGH - LOW, and not next to 0")
    whole = all(isinstance(n, int) for n in (low, high)) and step == int(step)
    # The type of a part's own settings is known to the part alone.
    if path[:2] != ["model", "parts"] and type(own) is int and not whole:
        raise GolfError(f"--over {word:.80}: {key.strip()} takes whole numbers; give whole ends and a whole step")
    integer = whole and not isinstance(own, float)
    return Axis(key.strip(), own, (), float(low), float(high), how == "log", float(step), integer)


def _is_number(value: Any) -> bool:
    """Whether it is a finite number; a whole one beyond every float is none."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _value(text: str) -> Any:
    return parse_override(f"x.y={text.strip()}")[1]


def override(key: str, value: Any) -> str:
    """The override that sets a key to a swept value, exactly."""
    if isinstance(value, bool):
        return f"{key}={str(value).lower()}"
    return f"{key}={value!r}" if isinstance(value, float) else f"{key}={value}"
