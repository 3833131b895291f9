"""The runs behind `golf fit`: `python -m bench.fit_sweep --json results/fit_sweep.json --minutes 60`, then `--fit`.

Trains models of many shapes for few tokens, as `golf fit` would train them, on one piece of the shared web text, judged
on a split of another piece: the validation text is not read. Runs are appended to FILE as they end, in an order in
which any beginning of the list says something about every coefficient; the same command goes on where it was. `--fit`
trains nothing: it writes the coefficients (src/paramgolf/lab/fit_rule.json) from FILE, from the checks below and from
results/fit_trials.json.

    python -m bench.fit_sweep --check 250000x120 --json results/fit_check.json

takes the choice of `golf fit` for one budget, the pocket recipe re-sized by width alone, the choice's neighbours and
models further down the list (14 and more in all), and runs all of them: what the choice is worth. `--workers 2` gives
each run a core of its own: then one core is the machine that a budget of seconds is for.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.fit_least_squares import BYTES_PER_TOKEN, fit
from bench.runs import golf_run, on_cores
from bench.webtext import train_text, tuning_split
from paramgolf.data.cache import cache_root
from paramgolf.errors import GolfError
from paramgolf.files import atomic_write
from paramgolf.lab.choice import AIM, Budget, Search, Text, file_bytes, shaped
from paramgolf.lab.fit import PARENT, look_at, measured_choice
from paramgolf.lab.sizing import HEAD, RULE_FILE, Rule, Shape, Shapes, kv_heads
from paramgolf.recipe.load import load_recipe, to_toml
from paramgolf.recipe.sections import Recipe
from paramgolf.runner.environment import environment

TRIALS, CHECKS = Path("results/fit_trials.json"), Path("results/fit_check.json")
RULE = Path(__file__).parent.parent / "src" / "paramgolf" / "lab" / RULE_FILE
KEYS = (
    "val_bpb", "val_bpb_float", "val_bpb_ngram", "total_bytes", "params", "steps", "train_tokens", "step_ms", "seconds",
)  # fmt: skip
_CENTRE = Shape(4096, 4, 192, 480, 256, 4096)
_BESIDE = 25.0  # seconds of a run beside its steps: start, score, packing
_COARSENESS = (1.0, 0.5, 1.41, 0.71, 2.0)  # in turn: rounding is measured beside, at no cost
WIDTH = "pocket by width"
_RANKS = (2, 5, 10, 20, 30, 100, 300)  # of further models of a check, by what is expected of them


def configurations() -> list[tuple[Shape, int]]:
    """(shape, tokens) of every run, the most telling first."""
    centre = _CENTRE
    small, large = Shape(2048, 3, 128, 320, 256, 4096), Shape(4096, 4, 384, 960, 256, 4096)
    first = [(centre, 500_000), (small, 1_000_000), (large, 500_000), (centre, 2_000_000), (small, 4_000_000)]
    vocabularies = [(centre._replace(vocab=v), n) for n in (700_000, 2_000_000) for v in (1024, 16384, 2048, 8192)]
    rows = [(centre._replace(seq_len=t), n) for n in (700_000, 2_000_000) for t in (128, 512, 1024)]
    batches = [(centre._replace(batch=b), n) for n, b in _BATCHES]
    forms = [
        (Shape(4096, 2, 256, 640, 256, 4096), 1_000_000), (Shape(4096, 9, 128, 320, 256, 4096), 1_000_000),
        (centre._replace(hidden=288), 1_000_000), (centre._replace(hidden=768), 1_000_000),
        (Shape(4096, 8, 192, 480, 256, 4096), 1_000_000), (Shape(4096, 2, 384, 960, 256, 4096), 1_000_000),
    ]  # fmt: skip
    tiny = [(Shape(512, 3, 128, 320, 256, 4096), 1_500_000), (Shape(1024, 2, 64, 192, 256, 2048), 1_500_000)]
    further = [(large, 2_000_000), (centre, 4_000_000), (Shape(8192, 6, 320, 800, 256, 8192), 1_500_000)]
    groups = [first, vocabularies, rows, batches, forms, tiny, further]
    return list(dict.fromkeys(_in_turn(groups)))


_BATCHES = ((1_000_000, 2048), (1_000_000, 16_384), (2_000_000, 32_768), (1_000_000, 8192), (3_000_000, 16_384))


def _in_turn(groups: Sequence[Sequence[tuple[Shape, int]]]) -> Iterator[tuple[Shape, int]]:
    """The first group, then one of each of the others at a time."""
    yield from groups[0]
    for i in range(max(map(len, groups[1:]))):
        yield from (group[i] for group in groups[1:] if i < len(group))


def recipe_of(shape: Shape, tokens: int, coarseness: float) -> Recipe:
    """What `golf fit` would write for the shape, bound by tokens, scored with plain windows only."""
    base = load_recipe(PARENT)
    recipe = shaped(base, shape, coarseness, tokens // shape.batch)
    return replace(
        recipe,
        name="fit-sweep",
        budget=replace(recipe.budget, seconds=0.0, tokens=tokens, bytes=0),
        score=replace(recipe.score, stride=0),
        ngram=replace(recipe.ngram, levels=()),
        train=replace(recipe.train, checkpoint_every=0.0),
    )


def name_of(shape: Shape, tokens: int) -> str:
    return f"{'-'.join(map(str, shape))} {tokens}"


class Sweep:
    """The runs of one file, each done once."""

    def __init__(self, path: Path) -> None:
        self.path, self._writing = path, threading.Lock()
        self.data: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
        self.data["machine"] = environment()

    def row(self, name: str) -> dict[str, Any] | None:
        return next((row for row in self.data["rows"] if row["name"] == name), None)

    def run(self, name: str, recipe: Recipe, facts: Mapping[str, Any], *, train: str = "", val: str = "") -> None:
        """Run a recipe and keep what came out; a run that fails is kept too, with no numbers."""
        held = val or ("" if train else tuning_split(cache_root()))
        record: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, f"{recipe.name}.toml")
            path.write_text(to_toml(recipe))
            try:
                record = golf_run(str(path), [], train=train or train_text(), val=held)
            except RuntimeError as error:
                print(error, flush=True)
        row = {"name": name, **facts, **{key: record.get(key) for key in KEYS}}
        if record:
            row["bytes_per_token"] = record["scored_bytes"] / record["scored_tokens"]
        with self._writing:
            self.data["rows"].append(row)
            self.write()
            print(json.dumps(row), flush=True)

    def write(self) -> None:
        atomic_write(self.path, (json.dumps(self.data, indent=1) + "\n").encode())


def sweep(path: Path, minutes: float, *, only: int = 0, train: str = "", val: str = "", workers: int = 1) -> None:
    """Run what is missing, as long as the next run is expected to end in time. `only`: so many of the list."""
    runs, begun = Sweep(path), time.monotonic()
    todo = configurations()[: only or None]

    def work(job: tuple[int, tuple[Shape, int]]) -> None:
        number, (shape, tokens) = job
        name, coarseness = name_of(shape, tokens), _COARSENESS[number % len(_COARSENESS)]
        if runs.row(name) is not None:
            return
        left = 60 * minutes - (time.monotonic() - begun)
        if _expected(runs, shape, tokens) > left:
            print(f"no time for {name} in the {left:.0f} s left", flush=True)
            return
        facts = {"shape": list(shape), "tokens": tokens, "coarseness": coarseness}
        runs.run(name, recipe_of(shape, tokens, coarseness), facts, train=train, val=val)

    on_cores(work, enumerate(todo), workers)
    done = sum(runs.row(name_of(*one)) is not None for one in todo)
    print(f"{done} of {len(todo)} runs are in {path}", flush=True)


def _expected(runs: Sweep, shape: Shape, tokens: int) -> float:
    """Seconds of a run, by the FLOP rate of those before; the first one is let through."""
    flops = [_flops(Shape(*row["shape"])) * row["tokens"] for row in runs.data["rows"] if row["seconds"]]
    seconds = [row["seconds"]["process"] - _BESIDE / 2 for row in runs.data["rows"] if row["seconds"]]
    if not flops:
        return 0.0
    return _BESIDE + 1.2 * _flops(shape) * tokens * max(1.0, sum(seconds)) / sum(flops)


def _flops(shape: Shape) -> float:
    """Of a token, about."""
    one = Shapes.of([shape])
    return 6.0 * float((one.block_weights + one.vocab_weights)[0])


# -- the coefficients ------------------------------------------------------------------------------------------------


def rows_of(path: Path, *, without: str = "") -> list[dict[str, Any]]:
    """Runs with a result, in the form of fit_least_squares.fit; not those that were chosen by the rule `without`."""
    if not path.exists():
        return []
    rows = [row for row in json.loads(path.read_text())["rows"] if row.get("val_bpb_float") and row.get("shape")]
    rows = [row for row in rows if not without or row.get("rule") != without]
    for row in rows:
        row["tokens"] = row.get("train_tokens") or row["tokens"]
        if row.get("params"):
            row["block_weights"] = row["params"] - row["shape"][0] * row["shape"][2]
    return rows


def signature(rule: Mapping[str, Any]) -> str:
    """Of the coefficients of a rule in its plain form."""
    return hashlib.sha256(json.dumps(rule["coefficients"], sort_keys=True).encode()).hexdigest()[:8]


def fit_rule(
    sweep_file: Path, trials: Path = TRIALS, checks: Path = CHECKS, rule: Path = RULE, *, without: str = ""
) -> dict[str, Any]:
    """Fit the coefficients to the runs there are, and write them. `without`: the signature of a rule whose own checks,
    which it is judged by, are left out."""
    swept = rows_of(sweep_file) + rows_of(checks, without=without)
    sizes = dict(BYTES_PER_TOKEN)
    for row in swept:
        sizes[row["shape"][0]] = round(row["bytes_per_token"], 4)
    # Where the sweep has runs of its own, trials that were trained otherwise only guide what it is silent about.
    rows = [{"series": "", **row} for row in swept] + rows_of(trials)
    if not swept:
        rows = [{**row, "series": "" if row.get("as_chosen") else row["series"]} for row in rows]
    table = fit(rows, dict(sorted(sizes.items())))
    table["about"] = "Coefficients of lab/sizing.py, written by `python -m bench.fit_sweep --fit`; see docs/fit.md"
    table["evidence"]["files"] = [file.name for file in (sweep_file, checks, trials) if rows_of(file)]
    atomic_write(rule, (json.dumps(dict(sorted(table.items())), indent=1) + "\n").encode())
    return table


# -- what a choice is worth ------------------------------------------------------------------------------------------


def pocket_by_width(budget: Budget) -> Recipe:
    """The pocket recipe re-sized to a cap by its width alone: the largest whose forecast fits, of those that the fused
    kernels run: MLPs of 2.5 widths to the next multiple of 16, heads of about pocket's 64 channels likewise."""
    base = load_recipe(PARENT, [f"budget.bytes={budget.bytes}", f"budget.seconds={budget.seconds}"])
    found = None
    for dim in range(16, 2049, 16):
        heads = min((n for n in range(1, dim // 16 + 1) if dim % (16 * n) == 0), key=lambda n: abs(dim / n - HEAD))
        if dim > HEAD and not HEAD / 2 <= dim / heads <= 2 * HEAD:
            continue
        hidden = -(-dim * 5 // 2 // 16) * 16
        model = replace(base.model, dim=dim, num_heads=heads, num_kv_heads=kv_heads(heads), mlp_hidden=hidden)
        recipe = replace(base, model=model)
        if file_bytes(recipe) <= AIM * budget.bytes:
            found = recipe  # not the first that is too large ends it: a wider one may have fewer matrices in float16
    if found is None:
        raise GolfError(f"{budget.bytes} bytes: the pocket recipe does not fit at any width")
    return found


def check(path: Path, budget: Budget, *, only: int = 0, train: str = "", val: str = "", workers: int = 1) -> None:
    """Run the re-sized pocket, the choice of today's rule, its neighbours and others under one budget (`only`: the
    first so many of them); print the table of all that were run under it."""
    runs, base = Sweep(path), load_recipe(PARENT)
    key, rule = f"{budget.bytes}x{budget.seconds:g}", signature(json.loads(RULE.read_text()))
    plans = runs.data.setdefault("plans", {})

    def choose(found: dict[str, Any]) -> None:
        configurations = _configurations(base, budget, look_at(train or train_text(), base))
        found[key] = {"rule": rule, "configurations": configurations}

    if plans.get(key, {}).get("rule") != rule:  # chosen once: a stopped check goes on with the same configurations
        on_cores(choose, [plans], workers)  # where the runs will be: the steps are timed there
        runs.write()
    planned = plans[key]["configurations"]
    bound = replace(base.budget, bytes=budget.bytes, seconds=budget.seconds)
    wanted = [(f"{key} {WIDTH}", pocket_by_width(budget), {"as": WIDTH, "expected": None})]
    for plan in planned:
        recipe = shaped(replace(base, budget=bound), Shape(*plan["shape"]), plan["coarseness"], plan["steps"])
        wanted.append((f"{key} {plan['shape']}", recipe, plan))

    def work(job: tuple[str, Recipe, dict[str, Any]]) -> None:
        name, recipe, facts = job
        if runs.row(name) is None:
            judged = replace(recipe, name="fit-check", score=replace(recipe.score, stride=0))
            runs.run(name, judged, {"budget": key, "rule": rule, **facts}, train=train, val=val)

    on_cores(work, wanted[: only or None], workers)
    told = {f"{key} {plan['shape']}": {"as": plan["as"], "expected": plan["expected"]} for plan in planned}
    rows = [row for row in runs.data["rows"] if row["budget"] == key]
    _print_check([row | told.get(row["name"], {"as": f"earlier {row['as']}"}) for row in rows])


def _configurations(base: Recipe, budget: Budget, text: Text) -> list[dict[str, Any]]:
    """The choice, the best models with one knob set otherwise, and some further down the list."""
    rule = Rule.load()
    choice, rates = measured_choice(base, rule, budget, text)
    search = Search(base, rule, rates, budget, text)
    order = np.argsort(search.bound, kind="stable")
    further = [(f"rank {rank}", search.exact(int(order[rank]))) for rank in _RANKS]
    found = [("chosen", choice.best), *choice.alternatives, *[(name, c) for name, c in further if c is not None]]
    named = {c.shape: (name, c) for name, c in reversed(found)}  # a shape that is several of them keeps its first name
    return [
        {"as": name, "shape": list(c.shape), "coarseness": c.coarseness, "steps": c.steps, "expected": c.loss}
        for name, c in reversed(named.values())
    ]


def _print_check(rows: Sequence[Mapping[str, Any]]) -> None:
    done = sorted((row for row in rows if row.get("val_bpb")), key=lambda row: row["val_bpb"])
    for row in done:
        expected = f"{row['expected']:.4f}" if row.get("expected") else ""
        print(f"{row['as']:18} {row.get('shape', '')!s:36} {row['val_bpb']:.4f} {expected:>8} {row['total_bytes']:,}")
    chosen = next((row["val_bpb"] for row in done if row["as"] == "chosen"), math.nan)
    pocket = next((row["val_bpb"] for row in done if row["as"].endswith(WIDTH)), math.nan)
    if done:
        best = done[0]["val_bpb"]
        print(f"{len(done)} runs; chosen / best {chosen / best:.4f}, chosen / pocket by width {chosen / pocket:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fit_sweep", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("results/fit_sweep.json"))
    parser.add_argument("--minutes", type=float, default=0.0, help="start no run that would end later than this")
    parser.add_argument("--only", type=int, default=0, help="the first so many configurations")
    parser.add_argument("--fit", action="store_true", help="write the coefficients from the runs there are")
    parser.add_argument("--check", metavar="BYTESxSECONDS", help="run a choice and its neighbours under one budget")
    parser.add_argument("--workers", type=int, default=1, help="runs at once, each on a core of its own")
    parser.add_argument("--data", default="", help="another training text than the shared one")
    parser.add_argument("--val", default="", help="its validation text")
    options = parser.parse_args()
    ways = {"train": options.data, "val": options.val, "workers": options.workers}
    try:
        if options.check:
            size, _, seconds = options.check.partition("x")
            if not (size.isdecimal() and seconds.isdecimal()):
                parser.error(f"--check {options.check}: not BYTESxSECONDS, e.g. 250000x120")
            check(options.json, Budget(int(size), float(seconds)), only=options.only, **ways)
        elif options.minutes:
            sweep(options.json, options.minutes, only=options.only, **ways)
        if options.fit:
            print(json.dumps(fit_rule(options.json), indent=1))
    except GolfError as error:
        sys.exit(f"bench: {error}")


if __name__ == "__main__":
    main()
