"""Each component of the frontier switched on (or off) on pocket: `python -m bench.ablation --json FILE`.

The components are data, bench/ablation.toml. All runs get the same seconds of training and the same bytes, are paired
by seed with the recipe as it is, and are judged on a part of the training text (the tuning split, never the validation
set). What a step takes is measured first, beside the recipe's own (bench/pace.py); a run gets the steps that fill the
seconds at that pace, so that it may share the machine with others and be repeated to the bit. Runs are appended to FILE
as they end, seed by seed over all components; a stopped bench goes on where it was. `--set KEY=VALUE` changes all runs:
those are a setting of their own, with a column of their own. `--table` runs nothing and prints the tables, `--page
docs/techniques.md` puts them into that page.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bench.pace import changes_the_step, step_ratio, step_seconds
from bench.runs import golf_run, on_cores
from bench.webtext import train_text, tuning_split
from paramgolf.data.cache import cache_root
from paramgolf.errors import GolfError
from paramgolf.files import atomic_write
from paramgolf.lab import stats
from paramgolf.pack.forecast import plan_bytes
from paramgolf.recipe.load import load_recipe
from paramgolf.runner.environment import environment

SERIES = Path(__file__).with_name("ablation.toml")
MODEL, CACHED, FLOAT, GAP = "val_bpb", "val_bpb_ngram", "val_bpb_float", "gap"
KEYS = (
    MODEL, CACHED, FLOAT, "val_bpb_tilt", "val_bpb_ttt", "ttt_seconds", "total_bytes", "params", "steps", "step_ms",
    "train_tokens", "seconds",
)  # fmt: skip
CONFIDENCE = 0.95
NOT_YET = "not measured yet"
BEGIN, END = "<!-- bench.ablation -->", "<!-- end of bench.ablation -->"
Run = dict[str, Any]
Golf = Callable[[list[str]], dict[str, Any]]  # the record of a run with these overrides; RuntimeError if it failed


@dataclass(frozen=True)
class Component:
    """`set`: overrides of the recipe. `score`: what is compared with the recipe as it is; "gap" = what quantisation
    costs, `val_bpb - val_bpb_float`. Another score of the file is compared with `val_bpb` of the same run."""

    name: str
    what: str
    set: tuple[str, ...]
    score: str = MODEL

    @property
    def within(self) -> bool:
        """Whether a run is compared with itself."""
        return self.score not in (MODEL, GAP)


@dataclass(frozen=True)
class Series:
    """bench/ablation.toml."""

    recipe: str
    common: tuple[str, ...]
    groups: dict[str, list[Component]]

    @property
    def components(self) -> list[Component]:
        return [component for group in self.groups.values() for component in group]


def load_series(path: Path = SERIES) -> Series:
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    groups = {
        group["name"]: [Component(**(row | {"set": tuple(row["set"])})) for row in group["component"]]
        for group in table["group"]
    }
    return Series(table["recipe"], tuple(table["common"]), groups)


class Results:
    """The runs of a file, each done once."""

    def __init__(self, path: Path) -> None:
        self.path, self._writing = path, threading.Lock()
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"runs": []}

    @property
    def runs(self) -> list[Run]:
        return self.data["runs"]

    def find(self, overrides: tuple[str, ...], setting: list[str], seed: int) -> Run | None:
        """The run of these overrides, or None."""
        wanted = {"set": list(overrides), "setting": setting, "seed": seed}
        return next((run for run in self.runs if all(run[key] == value for key, value in wanted.items())), None)

    def settings(self) -> list[list[str]]:
        """What all runs of a comparison have in common, in the order in which they were measured."""
        return [json.loads(words) for words in dict.fromkeys(json.dumps(run["setting"]) for run in self.runs)]

    def _paces(self, setting: list[str]) -> dict[str, Any]:
        return self.data.setdefault("paces", {}).setdefault(json.dumps(setting), {"ratios": {}})

    def ratio(self, overrides: tuple[str, ...], setting: list[str]) -> float:
        """What a step with these overrides takes, over one of the recipe as it is."""
        return self._paces(setting)["ratios"][json.dumps(overrides)] if changes_the_step(overrides) else 1.0

    def step_ms(self, setting: list[str]) -> float:
        """Of the recipe as it is."""
        return 1e3 * self._paces(setting)["seconds"]

    def steps(self, overrides: tuple[str, ...], setting: list[str]) -> int:
        """How many fill the seconds of the setting."""
        seconds = float(setting[0].partition("=")[2])
        return max(1, round(1e3 * seconds / (self.step_ms(setting) * self.ratio(overrides, setting))))

    def measure_paces(self, series: Series, setting: list[str]) -> None:
        """Time the steps of components for which that was not done."""
        paces, common, seconds = self._paces(setting), [*series.common, *setting], []
        base = load_recipe(series.recipe, common)
        for overrides in dict.fromkeys(component.set for component in series.components):
            key = json.dumps(overrides)
            if key not in paces["ratios"] and changes_the_step(overrides):
                paces["ratios"][key], once = step_ratio(base, load_recipe(series.recipe, [*common, *overrides]))
                seconds.append(once)
                self._write()
                print(f"{key}: a step takes {paces['ratios'][key]:.3f} times as long", flush=True)
        if "seconds" not in paces:  # never again: runs of all sessions are to be equally long
            paces["seconds"] = statistics.median(seconds or [step_seconds(base)])
            self._write()

    def _write(self) -> None:
        self.data["machine"] = environment()
        atomic_write(self.path, (json.dumps(self.data, indent=1) + "\n").encode())

    def do(self, golf: Golf, overrides: tuple[str, ...], setting: list[str], seed: int) -> None:
        """Run unless that was done; a run that fails is a result too (a file that does not fit, say)."""
        if self.find(overrides, setting, seed) is not None:
            return
        run: Run = {"set": list(overrides), "setting": setting, "seed": seed}
        bound = ["budget.seconds=0", f"budget.steps={self.steps(overrides, setting)}"]
        try:
            record = golf([*setting, *bound, f"train.seed={seed}", *overrides])
            run |= {key: record.get(key) for key in KEYS}
        except RuntimeError as error:
            run["failed"] = str(error).rpartition(" ended with ")[2]
        with self._writing:
            self.runs.append(run)
            self._write()
            print(json.dumps(run), flush=True)


def value(run: Run, score: str) -> float:
    return run[MODEL] - run[FLOAT] if score == GAP else run[score]


@dataclass(frozen=True)
class Measured:
    """Differences in BPB over common seeds, negative = better with the component; `low` and `high` its interval."""

    seeds: int
    difference: float
    low: float | None
    high: float | None
    cached: float | None  # the mean difference that is left with the n-gram cache
    step_ms: float | None


def measured(component: Component, results: Results, setting: list[str]) -> Measured | None:
    """What `component` does, or None where no seed has both runs."""
    pairs = []
    for seed in sorted({run["seed"] for run in results.runs}):
        own, base = results.find(component.set, setting, seed), results.find((), setting, seed)
        if own is not None and base is not None and "failed" not in own and "failed" not in base:
            pairs.append((own, base))
    if not pairs:
        return None
    if component.within:
        gains = np.array([run[MODEL] - value(run, component.score) for run, _ in pairs])
    else:
        gains = np.array([value(base, component.score) - value(run, component.score) for run, base in pairs])
    test = stats.one_sample(gains, 0.0, CONFIDENCE)
    return Measured(
        len(pairs), -float(gains.mean()), None if test.high is None else -test.high,
        None if test.low is None else -test.low,
        None if component.score != MODEL else float(np.mean([run[CACHED] - base[CACHED] for run, base in pairs])),
        None if component.score != MODEL else (results.ratio(component.set, setting) - 1) * results.step_ms(setting),
    )  # fmt: skip


@cache
def planned_bytes(recipe: str, overrides: tuple[str, ...]) -> int:
    """The expected file on the recipe's own grids, which the solver does not move."""
    made = load_recipe(recipe, [*overrides, "pack.fit=false"])
    return plan_bytes(made, made.data.vocab_size, tokenizer_bytes=2 * made.data.vocab_size).typical_bytes


def table(series: Series, results: Results, components: list[Component]) -> str:
    """A Markdown table, a line a component."""
    settings = [s for s in results.settings() if any(measured(c, results, s) for c in components)] or [[]]
    names = [", ".join(["BPB", *_words(setting)]) for setting in settings]
    head = ["component", "what it is; source", "keys", *names, "with the cache", "ms a step", "bytes"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for component in components:
        found = [measured(component, results, setting) for setting in settings]
        last = next((m for m in reversed(found) if m is not None), None)
        none = NOT_YET if last is None else ""
        size = planned_bytes(series.recipe, series.common + component.set) - planned_bytes(series.recipe, series.common)
        cells = [component.name, component.what, _keys(component), *(_difference(m, none) for m in found)]
        cells.append("" if last is None or last.cached is None else f"{last.cached:+.4f}")
        cells.append("" if last is None or last.step_ms is None else f"{last.step_ms:+.1f}")
        cells.append(f"{size:+,}" if size else "0" if component.score == MODEL else "")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _words(setting: list[str]) -> list[str]:
    """`60 s` of budget.seconds=60, other overrides as they are."""
    pairs = [word.partition("=") for word in setting]
    return [f"{value} s" if key == "budget.seconds" else f"`{key}={value}`" for key, _, value in pairs]


def _keys(component: Component) -> str:
    return "<br>".join(f"`{word}`" for word in component.set) or "(in pocket)"


def _difference(found: Measured | None, none: str) -> str:
    if found is None:
        return none
    if found.low is None or found.high is None:
        return f"{found.difference:+.4f} ({found.seeds} seed{'s' * (found.seeds > 1)})"
    return f"{found.difference:+.4f} ({found.low:+.4f} to {found.high:+.4f})"


def tables(series: Series, results: Results) -> str:
    """One table a group."""
    return "\n\n".join(f"### {name}\n\n{table(series, results, rows)}" for name, rows in series.groups.items())


def with_tables(page: str, made: str) -> str:
    """`page` with what stands between the marks replaced."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise GolfError(f"the page has no place for the tables; write {BEGIN} and {END} where they belong")
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def chosen(series: Series, names: list[str]) -> Series:
    """With the components of these names only; GolfError for one that there is not."""
    if unknown := [name for name in names if name not in {c.name for c in series.components}]:
        known = ", ".join(c.name for c in series.components)
        raise GolfError(f"--only: no component '{unknown[0]}'; known: {known}")
    kept = {group: [c for c in rows if not names or c.name in names] for group, rows in series.groups.items()}
    return replace(series, groups={group: rows for group, rows in kept.items() if rows})


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.ablation", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("results/ablation.json"))
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="runs at once, each on a core of its own")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a component; may be repeated")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="in all runs")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--page", type=Path, help="put the tables into this page")
    return parser.parse_args(words)


def main() -> None:
    options = parse()
    try:
        series, results = chosen(load_series(), options.only), Results(options.json)
        if not options.table:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            train, held = train_text(), tuning_split(cache_root())
            setting = [f"budget.seconds={options.seconds:g}", *options.set]

            def golf(words: list[str]) -> dict[str, Any]:
                return golf_run(series.recipe, [*series.common, *words], train=train, val=held)

            results.measure_paces(series, setting)
            every = dict.fromkeys([(), *(component.set for component in series.components)])
            jobs = [(overrides, seed) for seed in range(1, options.seeds + 1) for overrides in every]
            on_cores(lambda job: results.do(golf, job[0], setting, job[1]), jobs, options.workers)
        print(tables(series, results))
        if options.page:
            page = with_tables(options.page.read_text(encoding="utf-8"), tables(load_series(), results))
            atomic_write(options.page, page.encode())
    except GolfError as error:
        raise SystemExit(f"bench: {error}") from None


if __name__ == "__main__":
    main()
