"""Optional watchers that send a run's numbers elsewhere: TensorBoard, wandb, trackio. Off unless a run asks for one.

Each writes `loss`, `lr_mul`, `momentum`, `tokens`, `seconds` and `grad_norm` of the logged steps. A tracker that fails
(no login, no network, a full disk) is dropped with a note: nothing outside may end a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from paramgolf.errors import GolfError
from paramgolf.registry import close_match
from paramgolf.train.callbacks import Callback, StepInfo

Send = Callable[[dict[str, float], int], None]  # (numbers, step)
Opened = tuple[Send, Callable[[], None]]  # and what ends it
PROJECT = "paramgolf"


def _tensorboard(folder: Path, config: dict[str, Any]) -> Opened:
    writer = import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))

    def send(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return send, writer.close


def _wandb(folder: Path, config: dict[str, Any]) -> Opened:
    run = import_module("wandb").init(project=PROJECT, name=folder.name, dir=str(folder), config=config)
    return lambda numbers, step: run.log(numbers, step=step), run.finish


def _trackio(folder: Path, config: dict[str, Any]) -> Opened:
    trackio = import_module("trackio")
    trackio.init(project=PROJECT, name=folder.name, config=config)
    return lambda numbers, step: trackio.log(numbers, step=step), trackio.finish


TRACKERS: dict[str, Callable[[Path, dict[str, Any]], Opened]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def check_trackers(names: Iterable[str]) -> None:
    """GolfError for a name that is none."""
    for name in names:
        if name not in TRACKERS:
            raise GolfError(f"--track {name}: no such tracker{close_match(name, TRACKERS)}")


class Tracker(Callback):
    """One tracker, opened at the first step, so that a run that never starts leaves nothing behind."""

    def __init__(self, name: str, folder: Path, config: dict[str, Any], every: int, say: Callable[[str], None]) -> None:
        check_trackers([name])
        self._name, self._folder, self._config = name, folder, config
        self._every, self._say = every, say
        self._opened: Opened | None = None
        self._dropped = False

    def on_step(self, info: StepInfo, fraction: float, model: nn.Module) -> None:
        if self._dropped or not (info.step == 1 or info.step % self._every == 0):
            return
        numbers = {"loss": info.loss, "lr_mul": info.lr_mul, "momentum": info.momentum,
                   "tokens": float(info.tokens), "seconds": info.elapsed}  # fmt: skip
        if info.grad_norm is not None:
            numbers["grad_norm"] = info.grad_norm
        self._guarded(lambda: self._send(numbers, info.step))

    def _send(self, numbers: dict[str, float], step: int) -> None:
        if self._opened is None:
            self._opened = TRACKERS[self._name](self._folder, self._config)
        self._opened[0](numbers, step)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever somebody else's program raises
            self._dropped = True
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            self._say(f"note: {self._name} is left out from here on: {reason}")

    def close(self) -> None:
        if self._opened is not None and not self._dropped:
            self._guarded(self._opened[1])
