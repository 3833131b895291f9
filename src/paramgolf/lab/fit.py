"""`golf fit`: measure this machine, choose a model for a budget of bytes and seconds, write its recipe, run it."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paramgolf.data import builtin, official, sources
from paramgolf.data.build import PASSPORT
from paramgolf.data.dataset import Dataset
from paramgolf.data.shards import read_header
from paramgolf.data.sources import Document
from paramgolf.dist import init as init_dist
from paramgolf.errors import GolfError
from paramgolf.files import atomic_write, user_path
from paramgolf.lab.choice import LEAST_STEPS, Budget, Choice, Text, choose, shaped
from paramgolf.lab.fit_text import fit_text, recipe_toml
from paramgolf.lab.jobs import GOLF, Stop, interruptible
from paramgolf.lab.records import read_record
from paramgolf.lab.sizing import KINDS, Rates, Rule, Shape, solve_rates
from paramgolf.recipe.load import load_recipe
from paramgolf.recipe.sections import Recipe, StageSection
from paramgolf.runner.folder import RunFolder
from paramgolf.runner.phases import Phases
from paramgolf.runner.plan import STARTUP_SECONDS
from paramgolf.train.timing import time_steps

PARENT = "pocket"
LEAST_TEXT = 10_000  # bytes
_ENOUGH_TEXT = 1_000_000_000  # bytes; more makes no difference to a choice
# Models that are timed, unlike one another in what takes their time: (vocabulary, layers, dim, hidden), and the
# (row, batch) of the steps. Six seconds on one core.
PROBES = ((1024, 4, 128, 320), (8192, 2, 128, 320), (1024, 3, 384, 960))
PROBE_WAYS = ((128, 256), (128, 1024), (512, 2048))
REFINEMENTS = 2  # times that the chosen shape is timed itself, and the choice made again
_TRUST = 10.0  # how much more the steps of the chosen shapes count than those of the probes
_POLL = 0.2  # seconds between looks at the run

Say = Callable[[str], None]
TimeModel = Callable[[Recipe, Sequence[Shape]], tuple[list[tuple[Shape, float]], float, str]]


def fit(
    data: str, budget: Budget, *, write: Path | None = None, out: Path | None = None, dry_run: bool = False,
    say: Say = lambda text: None, program: tuple[str, ...] = GOLF, timer: TimeModel | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Choose, write and (unless `dry_run`) run a recipe; everything that was found, as plain data.

    Args:
        data: as of `golf run`; "" = the built-in corpus.
        write: the recipe file; None = beside the run folder, and nowhere with `dry_run`.
        out: the run folder; None = `runs/fit-BYTES-SECONDS`, numbered where there is one.
        say: gets what a person should see before the run.
        timer: measures training steps; None = `time_model`.

    Raises GolfError for budgets that nothing fits, and for text that cannot be read.
    """
    check_budget(budget)
    root = _free(out, budget)
    if not dry_run and root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise GolfError(f"{root}: not an empty folder; choose another --out")
    if write is not None and write.suffix != ".toml":
        raise GolfError(f"--write {write}: the name of a recipe file ends in .toml")
    base, rule = load_recipe(PARENT), Rule.load()
    phases = Phases()
    with phases.of("reading the text"):
        text = look_at(data, base)
    choice, rates = measured_choice(base, rule, budget, text, phases=phases, timer=timer or time_model)
    toml = recipe_toml(choice, base, rates, data)
    result = facts(choice, rates, rule, budget, text) | {"recipe": "", "toml": toml, "run": "", "record": None}
    path = write or (None if dry_run else root.resolve().with_name(f"{root.resolve().name}.toml"))
    if path is not None:
        atomic_write(path, toml.encode())
        result["recipe"] = str(path)
    if not dry_run:
        say(fit_text(result))
        result["record"] = run_recipe(str(path), root, program)
        result["run"] = str(root)
    return result


def check_budget(budget: Budget) -> None:
    """GolfError for budgets that are none."""
    if budget.bytes < 1:
        raise GolfError(f"--bytes {budget.bytes}: not a size; give the cap of the file in bytes, e.g. 1000000")
    if not 0 < budget.seconds < float("inf"):
        raise GolfError(f"--seconds {budget.seconds:g}: not a time; give the seconds of the whole run, e.g. 240")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise GolfError("golf fit works in one process; run the recipe that it writes under torchrun")


def _free(out: Path | None, budget: Budget) -> Path:
    if out is not None:
        return out
    name = f"fit-{budget.bytes}-{budget.seconds:g}"
    names = (Path("runs", name if n == 1 else f"{name}-{n}") for n in range(1, 10_000))
    return next(path for path in names if not path.exists() and not path.with_name(f"{path.name}.toml").exists())


def look_at(data: str, base: Recipe) -> Text:
    """How much training text there is, and its tokenizer where it comes with one.

    Raises GolfError where there is none, or too little to size a model by.
    """
    if data == "-":
        raise GolfError("--data -: the text is read more than once; write it to a file and name that")
    folder = user_path(data)
    if data and folder.is_dir() and (folder / PASSPORT).is_file():
        text = _of_dataset(Dataset.open(folder))
    elif data and folder.is_dir() and official.has_shards(folder):
        text = _of_shards(folder)
    else:
        text = Text(_count(data, base.data.text_field))
    if not text.bytes:
        raise GolfError("the training text is empty; give a file with text in it")
    if text.bytes < LEAST_TEXT:
        raise GolfError(
            f"the training text has {text.bytes:,} bytes: too little to size a model by; give at least {LEAST_TEXT:,}"
        )
    return text


def _of_dataset(dataset: Dataset) -> Text:
    tokens, size = dataset.passport["train"]["tokens"], dataset.passport["train"]["bytes"]
    vocab = dataset.tokenizer.vocab_size
    a_token = size / tokens if size else float(Rule.load().token_bytes(vocab))
    return Text(round(tokens * a_token), vocab, a_token)


def _of_shards(folder: Path) -> Text:
    tokenizer = official.beside(folder)
    if tokenizer is None:
        raise GolfError(f"{folder}: no tokenizer with the shards; put its .model file into the folder")
    train, _ = official.shard_files(folder)
    a_token = float(Rule.load().token_bytes(tokenizer.vocab_size))
    return Text(round(sum(map(read_header, train)) * a_token), tokenizer.vocab_size, a_token)


def _count(data: str, field: str) -> int:
    """Bytes of the training documents, up to those that matter."""
    if data:
        found, _ = sources.find(data, field)
        training = [source for source in found if not sources.is_validation(source)] or found
        documents: Iterator[Document] = (document for source in training for document in source.documents())
    else:
        documents = builtin.documents()
    total = 0
    for document in documents:
        total += len(document.data)
        if total >= _ENOUGH_TEXT:
            break
    return total


# -- this machine ----------------------------------------------------------------------------------------------------


def time_model(base: Recipe, shapes: Sequence[Shape]) -> tuple[list[tuple[Shape, float]], float, str]:
    """(seconds of one training step of each shape, seconds to compile that a run must expect, how it was measured).

    The shapes are of one model; its steps are those that a run takes, in the package's own training code.
    """
    first, *others = shapes
    recipe = shaped(base, first, 1.0, LEAST_STEPS)
    stages = [
        StageSection(at=(i + 1) / len(shapes), seq_len=shape.seq_len, batch_tokens=shape.batch)
        for i, shape in enumerate(others)
    ]
    timing = time_steps(dataclasses.replace(recipe, stages=tuple(stages)), first.vocab, init_dist(base.train.device))
    timed = [(shape, timing.seconds[shape.seq_len, shape.batch]) for shape in shapes]
    return timed, timing.compile_seconds, timing.how


@dataclass
class Stopwatch:
    """Steps that were timed, and the rates that follow from them."""

    base: Recipe
    timer: TimeModel = time_model
    probes: list[tuple[Shape, float]] = dataclasses.field(default_factory=list)
    chosen: list[tuple[Shape, float]] = dataclasses.field(default_factory=list)
    compile_seconds: float = 0.0
    how: str = ""

    def probe(self, progress: Callable[[int, int], None]) -> None:
        for done, model in enumerate(PROBES):
            timed, seconds, how = self.timer(self.base, [Shape(*model, *way) for way in PROBE_WAYS])
            self.probes += timed
            self.compile_seconds = max(self.compile_seconds, seconds)
            self.how = how.partition("made-up tokens, ")[2] or how
            progress(done + 1, len(PROBES))

    def time(self, shape: Shape) -> None:
        timed, seconds, _ = self.timer(self.base, [shape])
        self.chosen += timed
        self.compile_seconds = max(self.compile_seconds, seconds)

    def knows(self, shape: Shape) -> bool:
        return any(shape == known for known, _ in self.chosen)

    def rates(self) -> Rates:
        timed = [*self.probes, *self.chosen]
        weights = [1.0] * len(self.probes) + [_TRUST] * len(self.chosen)
        device = init_dist(self.base.train.device).device.type
        before = STARTUP_SECONDS + self.compile_seconds
        return Rates(solve_rates(timed, weights), before, device, self.how, tuple(timed))


def measured_choice(
    base: Recipe, rule: Rule, budget: Budget, text: Text, *, phases: Phases | None = None, timer: TimeModel = time_model
) -> tuple[Choice, Rates]:  # fmt: skip
    """Time the probes, choose, time what was chosen, choose again."""
    phases = phases or Phases(quiet=True)
    bound = dataclasses.replace(base.budget, bytes=budget.bytes, seconds=budget.seconds)
    watch = Stopwatch(dataclasses.replace(base, budget=bound), timer)
    with phases.of("timing training steps of small models") as progress:
        watch.probe(progress)
    rates = watch.rates()
    for again in range(REFINEMENTS + 1):
        with phases.of("comparing models"):
            choice = choose(base, rule, rates, budget, text)
        if again == REFINEMENTS or watch.knows(choice.best.shape):
            break
        with phases.of("timing the chosen one"):
            watch.time(choice.best.shape)
        rates = watch.rates()
    return choice, rates


def facts(choice: Choice, rates: Rates, rule: Rule, budget: Budget, text: Text) -> dict[str, Any]:
    """Why this choice, as plain data."""
    return {
        "budget": dataclasses.asdict(budget),
        "text": dataclasses.asdict(text),
        "machine": {
            "how": rates.how,
            "seconds_before": rates.before,
            "rates": dict(zip(KINDS, rates.seconds, strict=True)),
            "error": rates.error,
            "timed": [{**shape._asdict(), "seconds": seconds} for shape, seconds in rates.timed],
        },
        "choice": choice.best.as_dict(),
        "expected_loss": choice.terms,
        "alternatives": [{"knob": knob, **found.as_dict()} for knob, found in choice.alternatives],
        "considered": choice.considered,
        "rule_error": rule.evidence.get("error_bpb"),
        "beyond": beyond(choice, rule),
    }


def beyond(choice: Choice, rule: Rule) -> list[str]:
    """In what the choice lies outside the runs that the rule was fitted to, by more than a fifth."""
    best = choice.best
    values: dict[str, float] = best.shape._asdict() | {"tokens": best.tokens}
    ranges = rule.evidence.get("ranges", {})
    return [
        name
        for name, value in values.items()
        if name in ranges and not ranges[name][0] / 1.2 <= value <= ranges[name][1] * 1.2
    ]


# -- the run ---------------------------------------------------------------------------------------------------------


def run_recipe(recipe: str, out: Path, program: tuple[str, ...] = GOLF) -> dict[str, Any]:
    """`golf run` in a process of its own, so that its clock starts with it; its record. What it shows is shown.

    Raises GolfError if it fails, KeyboardInterrupt after it was told to stop and has written its checkpoint.
    """
    stop, told = Stop(), False
    with interruptible(stop):
        child = subprocess.Popen(
            [*program, "run", recipe, "--out", str(out), "--json"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        while child.poll() is None:
            if stop and not told:
                told = True
                child.send_signal(signal.SIGTERM)
            stop.sleep(_POLL)
    if child.returncode:
        raise GolfError(f"the run in {out} failed, as said above; its recipe is {recipe}")
    return read_record(RunFolder(out))
