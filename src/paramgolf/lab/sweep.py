"""`golf sweep`: trials of a recipe in an Optuna study, by any number of workers on any number of machines.

A trial is an ordinary run in a process of its own, trained and scored on a split of the training text. Optuna keeps
what was tried (in a journal file or a database) and says what to try next; a study joined by another machine, or after
an interruption, goes on where it stands. Trials whose process died without a word are given back and tried again.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil

from paramgolf.data.cache import cache_root
from paramgolf.errors import GolfError
from paramgolf.files import atomic_write
from paramgolf.lab.jobs import GOLF, Job, Outcome, Stop, in_turn, interruptible, run_job, share_of_cores
from paramgolf.lab.space import Axis, override, read_words
from paramgolf.lab.storage import open_storage, optuna_module, reachable, readable, shown, write_card
from paramgolf.lab.study import feasible, given_back, short, summary
from paramgolf.lab.tuning import tuning_data
from paramgolf.recipe.load import resolve, to_table, to_toml
from paramgolf.recipe.sections import BudgetSection

HEARTBEAT, GIVEN_UP = 20.0, 180.0  # seconds between signs of life of a trial, and without one until it is given back
_HOPELESS = 4  # failed trials, with none that ended well, after which a sweep gives up
_WARMUP_PERCENT = 20  # of its budget a trial trains before it can be pruned
_KEPT = ("val_bpb", "val_bpb_sliding", "val_loss", "total_bytes", "params", "steps", "step_ms", "train_tokens")


@dataclass(frozen=True)
class Plan:
    """One sweep: what is varied, how a trial is judged, and where its state lives."""

    recipe: str
    axes: list[Axis]
    overrides: list[str]
    out: Path
    objective: str = "val_bpb"
    on: str = "split"  # "split" of the training text, or the "validation" text
    trials: int = 30
    workers: int = 1
    storage: str = ""
    study: str = ""
    sampler: str = "tpe"
    pruner: str = "median"
    max_bytes: int = 0
    max_seconds: float = 0.0
    greedy: bool = False
    points: int = 5  # values of a range in a greedy sweep
    seed: int = 0
    program: tuple[str, ...] = GOLF
    note: Callable[[str], None] = field(default=lambda text: None, compare=False)

    @property
    def name(self) -> str:
        return self.study or f"{resolve(self.recipe).recipe.name}-sweep"

    def definition(self) -> dict[str, Any]:
        """What all machines of a study must agree on. Where the text lies is left out, as machines differ in it."""
        table = to_table(resolve(self.recipe, self.overrides).recipe)
        table["data"] |= {"train": "", "val": ""}
        definition = {
            "recipe": {k: v for k, v in table.items() if k not in ("title", "extends")},
            "over": [axis.as_dict() for axis in self.axes],
            "objective": self.objective, "on": self.on, "greedy": self.greedy,
            "max_bytes": self.max_bytes, "max_seconds": self.max_seconds,
        }  # fmt: skip
        return json.loads(json.dumps(definition))  # as a storage gives it back


def plan_sweep(recipe: str, words: list[str], *, steps: int = 0, **settings: Any) -> Plan:
    """A checked plan. `steps`: train so many steps instead of so many seconds, so that machines compare."""
    if steps:
        words = [*words, "budget.seconds=0", "budget.tokens=0", f"budget.steps={steps}"]
    axes, fixed = read_words(recipe, words)
    if not axes:
        raise GolfError("nothing to vary; name a range or several values, e.g. --over optim.matrix_lr=0.01..0.04:log")
    plan = Plan(recipe, axes, fixed, **settings)
    if plan.sampler == "grid" and any(not axis.choices for axis in axes):
        raise GolfError("--sampler grid needs lists of values, e.g. --over optim.matrix_lr=0.01,0.02,0.04")
    if plan.sampler == "grid":
        plan = replace(plan, trials=math.prod(len(axis.choices) for axis in plan.axes))
    return plan


def sweep(plan: Plan) -> dict[str, Any]:
    """Run trials until the study has `plan.trials`; returns its summary. KeyboardInterrupt after Ctrl-C."""
    where = plan.storage or str(plan.out)
    with readable(where):
        plan.out.mkdir(parents=True, exist_ok=True)
        study = _open(plan)
        write_card(plan.out, plan.name, plan.storage, plan.definition())
    runner = Runner(plan, study)
    with reachable(where), interruptible(runner.stop):
        runner.give_back_lost()
        pulse = threading.Thread(target=runner.beat, daemon=True)
        pulse.start()
        try:
            if plan.greedy:
                runner.greedy()
            else:
                in_turn(runner.tasks(), plan.workers, runner.stop)
        finally:
            runner.done.set()
            pulse.join()
    with reachable(where):
        result = summary(study, {
            "study": plan.name, "storage": shown(plan.storage) or str(plan.out), "objective": plan.objective,
            "on": plan.on,
        })  # fmt: skip
    if result["best"] is not None:
        words = [override(key, value) for key, value in result["best"]["params"].items()]
        recipe = resolve(plan.recipe, [*plan.overrides, *words]).recipe
        named = dataclasses.replace(recipe, name=f"{recipe.name}-best")
        atomic_write(plan.out / "best.toml", to_toml(named).encode())
    return result


def _open(plan: Plan) -> Any:
    """The study, created or joined. GolfError if it is another one."""
    optuna = optuna_module()
    seed = None if plan.workers > 1 else plan.seed
    samplers = optuna.samplers
    pick: dict[str, Callable[[], Any]] = {
        "tpe": lambda: samplers.TPESampler(seed=seed, multivariate=True),
        "random": lambda: samplers.RandomSampler(seed=seed),
        "grid": lambda: samplers.RandomSampler(seed=seed),  # the grid is queued whole
        "cmaes": lambda: samplers.CmaEsSampler(seed=seed),
    }
    pruners: dict[str, Callable[[], Any]] = {
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=_WARMUP_PERCENT),
        "hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=_WARMUP_PERCENT, max_resource=100),
        "none": optuna.pruners.NopPruner,
    }
    study = optuna.create_study(
        study_name=plan.name, storage=open_storage(plan.storage, plan.out), sampler=pick[plan.sampler](),
        pruner=pruners[plan.pruner](), direction="minimize", load_if_exists=True,
    )  # fmt: skip
    known, own = study.user_attrs.get("definition"), plan.definition()
    if known is None:
        study.set_user_attr("definition", own)
        for values in itertools.product(*(axis.choices for axis in plan.axes)) if plan.sampler == "grid" else ():
            study.enqueue_trial(dict(zip((axis.key for axis in plan.axes), values, strict=True)))
    elif differ := [key for key in own if known.get(key) != own[key]]:
        raise GolfError(
            f"the study '{plan.name}' there differs in {', '.join(differ)}; repeat its own command to join it, "
            "or give another --study or --out"
        )
    return study


class Runner:
    """Asks the study for trials and runs them; one object for all workers of this process."""

    def __init__(self, plan: Plan, study: Any) -> None:
        self.plan, self.study = plan, study
        self.stop, self.done = Stop(), threading.Event()
        self.threads = share_of_cores(plan.workers)
        self._lock = threading.Lock()
        self._running: dict[int, Any] = {}
        self.failures = 0
        data_swept = any(axis.key.startswith("data.") for axis in plan.axes)
        self.prunes = plan.pruner != "none" and not data_swept  # losses of different tokens do not compare
        if plan.pruner != "none" and data_swept:
            plan.note("note: no trial is pruned, since losses under different data settings do not compare")
        budget = resolve(plan.recipe, plan.overrides).recipe.budget
        if budget.seconds and plan.storage:
            plan.note("note: trials are bound by time; machines of different speed compare only with --steps")

    # -- which trials ------------------------------------------------------------------------------------------

    def tasks(self) -> Iterator[Callable[[], None]]:
        """Trials until the study has enough of them, counting those of other machines."""
        while self.count() < self.plan.trials:
            with self._lock:
                trial = self.study.ask()
                values = {axis.key: axis.suggest(trial) for axis in self.plan.axes}
                self._running[trial.number] = trial
            yield partial(self.run, trial, values)

    def count(self) -> int:
        """Trials that count: every one that was not given back."""
        return sum(1 for t in self.study.get_trials(deepcopy=False) if not given_back(t) and t.state.name != "WAITING")

    def greedy(self) -> None:
        """One key after the other: each of its values with the best of the keys before it."""
        best = {axis.key: axis.own for axis in self.plan.axes}
        for axis in self.plan.axes:
            candidates = [best | {axis.key: value} for value in axis.points(self.plan.points)]
            missing = [values for values in candidates if self._value_of(values) is None]
            room = max(0, self.plan.trials - self.count())
            in_turn((partial(self._try, values) for values in missing[:room]), self.plan.workers, self.stop)
            if self.stop:
                return
            scored = [(score, i) for i, v in enumerate(candidates) if (score := self._value_of(v)) is not None]
            if scored and min(scored)[0] < math.inf:
                best = candidates[min(scored)[1]]
            self.plan.note(f"{axis.key}: {best[axis.key]} is kept")

    def _try(self, values: dict[str, Any]) -> None:
        optuna = optuna_module()
        categorical = optuna.distributions.CategoricalDistribution
        choices = {axis.key: categorical(axis.points(self.plan.points)) for axis in self.plan.axes}
        with self._lock:
            self.study.enqueue_trial(values)
            trial = self.study.ask(choices)
            self._running[trial.number] = trial
        self.run(trial, dict(trial.params))

    def _value_of(self, values: dict[str, Any]) -> float | None:
        """The objective of finished trials with these values; infinity for pruned and infeasible ones."""
        found = None
        for trial in self.study.get_trials(deepcopy=False):
            if trial.params == values and not given_back(trial) and trial.state.is_finished():
                good = trial.state.name == "COMPLETE" and feasible(trial)
                found = min(found if found is not None else math.inf, trial.value if good else math.inf)
        return found

    # -- one trial ---------------------------------------------------------------------------------------------

    def run(self, trial: Any, values: dict[str, Any]) -> None:
        """Run a trial and tell the study how it ended."""
        plan, states = self.plan, optuna_module().trial.TrialState
        words = [*plan.overrides, *(override(key, value) for key, value in values.items())]
        folder = plan.out / f"trial-{trial.number:04d}"
        self._alive(trial)
        trial.set_user_attr("run", str(folder))
        begun = time.monotonic()
        try:
            recipe = resolve(plan.recipe, words).recipe
            data = str(tuning_data(recipe.data, cache_root())) if plan.on == "split" else ""
            words += ["data.val="] if data else []
            watch = self._watch(trial, recipe.budget) if self.prunes else None
            job = Job(plan.recipe, tuple(words), folder, data, plan.program)
            outcome = run_job(job, stop=self.stop, watch=watch, threads=self.threads)
        except GolfError as error:
            outcome = Outcome(None, str(error))
        try:
            if outcome.stopped and self.stop:
                self._give_back(trial)
            elif outcome.record is None:
                trial.set_user_attr("why", "pruned" if outcome.stopped else outcome.why)
                self.study.tell(trial, state=states.PRUNED)
                plan.note(f"trial {trial.number}: {'pruned' if outcome.stopped else outcome.why}")
                self._count_failure(outcome)
            else:
                self._finish(trial, outcome.record, time.monotonic() - begun)
        except optuna_module().exceptions.UpdateFinishedTrialError:
            plan.note(f"note: trial {trial.number} was given to another worker; its result here is not used")
        finally:
            with self._lock:
                self._running.pop(trial.number, None)

    def _count_failure(self, outcome: Outcome) -> None:
        """Several failures and no success: what is wrong is not the values."""
        self.failures += not outcome.stopped
        if self.failures >= _HOPELESS and not any(t.state.name == "COMPLETE" for t in self.study.trials):
            raise GolfError(f"{self.failures} trials failed and none ended well; the last: {outcome.why}")

    def _finish(self, trial: Any, record: dict[str, Any], seconds: float) -> None:
        plan = self.plan
        value = record.get(plan.objective)
        if not isinstance(value, int | float):
            self.study.tell(trial, state=optuna_module().trial.TrialState.FAIL)
            raise GolfError(f"--objective {plan.objective}: the record of a run has no such number")
        limits = {"bytes": (plan.max_bytes, record["total_bytes"]),
                  "seconds": (plan.max_seconds, record["seconds"]["strict"])}  # fmt: skip
        over = {name: float(used - limit) / limit for name, (limit, used) in limits.items() if limit}
        for name, value_over in over.items():
            trial.set_constraint(name, value_over)
        trial.set_user_attr("over", over)
        trial.set_user_attr("results", {key: record[key] for key in _KEPT if record.get(key) is not None})
        trial.set_user_attr("seconds", seconds)
        self.study.tell(trial, float(value))
        broken = "" if feasible(trial) else ", over a limit"
        what = f"trial {trial.number}: {plan.objective} {value:.4f}{broken}, {seconds:.0f} s"
        plan.note(f"{what}  {short(trial.params)}")

    def _watch(self, trial: Any, budget: BudgetSection) -> Callable[[list[dict[str, Any]]], bool]:
        """Report the mean loss of each percent of the budget and say when the pruner gives the trial up."""
        losses: list[float] = []
        told = 0

        def watch(lines: list[dict[str, Any]]) -> bool:
            nonlocal told
            for line in lines:
                losses.append(float(line["loss"]))
                percent = int(100 * used_fraction(line, budget))
                if percent > told:
                    trial.report(fmean(losses), percent)
                    told = percent
                    losses.clear()
                    if percent < 95 and trial.should_prune():
                        return True
            return False

        return watch

    # -- trials of processes that are gone -----------------------------------------------------------------------

    def _alive(self, trial: Any) -> None:
        trial.set_user_attr("alive", {"host": socket.gethostname(), "pid": os.getpid(), "at": time.time()})

    def beat(self) -> None:
        """A sign of life for every running trial, now and then, until `done`."""
        while not self.done.wait(HEARTBEAT):
            with self._lock:
                running = list(self._running.values())
            for trial in running:
                try:
                    self._alive(trial)
                except Exception as error:
                    self.plan.note(f"note: the study cannot be written ({type(error).__name__}); trying again")

    def _give_back(self, trial: Any) -> None:
        """An interrupted trial is tried again later: its values go to the front of the queue."""
        frozen = self.study.trials[trial.number]
        trial.set_user_attr("given_back", True)
        self.study.tell(trial.number, state=optuna_module().trial.TrialState.FAIL, skip_if_finished=True)
        if not self.plan.greedy:  # a greedy search finds out itself what is missing
            self.study.enqueue_trial(frozen.params)

    def give_back_lost(self) -> None:
        """Trials that a killed process left running."""
        for frozen in self.study.get_trials(deepcopy=False):
            if frozen.state.name == "RUNNING" and _lost(frozen.user_attrs.get("alive")):
                self.plan.note(f"trial {frozen.number} was left by a process that is gone: it is tried again")
                self._give_back(optuna_module().trial.Trial(self.study, frozen._trial_id))


def _lost(alive: dict[str, Any] | None) -> bool:
    if alive is None:
        return False  # just asked for by another worker
    if alive["host"] == socket.gethostname():
        return not psutil.pid_exists(alive["pid"])
    return time.time() - alive["at"] > GIVEN_UP


def used_fraction(line: dict[str, Any], budget: BudgetSection) -> float:
    """How much of its budget a run had used at this line of its log, 0 to 1."""
    used = [0.0]
    if budget.seconds:
        used.append(line["strict" if budget.clock == "strict" else "elapsed"] / budget.seconds)
    if budget.steps:
        used.append(line["step"] / budget.steps)
    if budget.tokens:
        used.append(line["tokens"] / budget.tokens)
    return min(1.0, max(used))
