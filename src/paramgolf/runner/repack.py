"""`golf pack`: a trained checkpoint quantised and coded again, under another cap or by another plan.

The solver may move everything worth it (see `curves.open_up`). Calibration, probes and the final check read training
text, each its own windows as far as there is enough of it; validation text is not looked at.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from paramgolf.data.cache import cache_root
from paramgolf.data.dataset import Dataset, prepare
from paramgolf.dist import Dist
from paramgolf.dist import init as init_dist
from paramgolf.errors import GolfError
from paramgolf.model.gpt import GPT
from paramgolf.pack.curves import Curves, Loss, open_up
from paramgolf.pack.ledger import Ledger
from paramgolf.pack.packer import load_artifact, pack_model
from paramgolf.pack.registry import CODECS
from paramgolf.pack.solver import CapTooSmall
from paramgolf.quant.hessian import collect, training_loss, training_rows
from paramgolf.quant.registry import QUANTIZERS
from paramgolf.recipe.load import load_recipe, to_table
from paramgolf.recipe.sections import Recipe, trained_seq_len
from paramgolf.runner.folder import RunFolder
from paramgolf.runner.phases import Phases
from paramgolf.runner.reserve import calibrates
from paramgolf.script.generate import code_bytes
from paramgolf.train import runtime
from paramgolf.train.checkpoint import Snapshot, Store, read
from paramgolf.train.session import final_weights

PROBE_PHASE, CHECK_PHASE = 0.5, 0.25  # of the distance between two windows of the calibration
CHECK_TOKENS = 32_768  # on which a finished plan's loss is measured
FRONTIER_CAPS = 8
_FREE = ("quant", "pack", "budget", "title")  # what a plan may change of the recipe of a run


@dataclass(frozen=True)
class Trained:
    """A checkpoint and the recipe of its run."""

    folder: RunFolder
    recipe: Recipe
    state: dict[str, Tensor]
    step: int
    finished: bool  # False: training had not ended, so its averaging or post-training has not been done either


def open_trained(path: str | Path, overrides: Sequence[str] = ()) -> Trained:
    """The newest usable checkpoint of a run folder, or the one given (a file, or the folder of checkpoints).

    Overrides may change how the weights are stored, not what they are. Raises GolfError where there is no checkpoint.
    """
    path = Path(path)
    file = path if path.suffix == ".safetensors" else None
    folder = path.parent if file else path
    root = folder.parent if folder.name == "checkpoints" else folder
    if path.is_file() and file is None:
        raise GolfError(f"{path} has no float weights to pack again; give the folder of the run that made it")
    if not (root / "recipe.toml").is_file():
        raise GolfError(f"{path}: no run with a recipe.toml is there; give a run folder or a checkpoint in one")
    recipe = load_recipe(str(root / "recipe.toml"))
    chosen = load_recipe(str(root / "recipe.toml"), overrides)
    before, after = to_table(recipe), to_table(chosen)
    moved = [key for key in after if key not in _FREE and before[key] != after[key]]
    if moved:
        raise GolfError(f"golf pack changes quant., pack. and budget. keys only, not {moved[0]}.; train again for that")
    QUANTIZERS.check(chosen.quant.method)
    if chosen.pack.codec != "auto":
        CODECS.check(chosen.pack.codec)
    snapshot = read(file) if file else _newest(root)
    return Trained(
        RunFolder(root), chosen, final_weights(snapshot), snapshot.step, bool(snapshot.state.get("finished"))
    )


def _newest(root: Path) -> Snapshot:
    said: list[str] = []
    snapshot = Store(root / "checkpoints").newest(said.append)
    if snapshot is None:
        why = said[0] if said else f"no checkpoint in {root / 'checkpoints'}"
        raise GolfError(f"{why}; golf pack needs the float weights that a run leaves there")
    return snapshot


def data_of(trained: Trained, data: str = "") -> Dataset:
    """The prepared data of the run: from the cache, or prepared again from `data` (default: the recipe's).

    GolfError when it has another tokenizer than the run.
    """
    passport = trained.folder.passport()
    cached = cache_root() / str(passport.get("key"))[:20]
    if not data and (cached / "passport.json").is_file():
        return Dataset.open(cached)
    dataset = prepare(trained.recipe.data, data or None, cache=cache_root())
    if dataset.passport["tokenizer"] != passport.get("tokenizer"):
        raise GolfError(f"the data's tokenizer is not that of {trained.folder.root}; give the run's own data by --data")
    return dataset


@dataclass
class Packing:
    """What packing under several caps shares: calibration, the measured curves, the losses."""

    trained: Trained
    dataset: Dataset
    phases: Phases = field(default_factory=Phases)
    seconds: dict[str, float] = field(default_factory=dict)
    moments: dict[str, Tensor] | None = None  # of another packing of the same weights, so as not to calibrate again

    def __post_init__(self) -> None:
        recipe = self.trained.recipe
        self.dist: Dist = init_dist(recipe.train.device)
        self.dtype = runtime.configure(recipe.train, self.dist.device).dtype
        self.shards = list(self.dataset.train_tokens())
        self.code_bytes = code_bytes(recipe, own_tokenizer=self.dataset.tokenizer.reversible)
        with self._timed("model"):
            self.model = GPT(recipe.model, self.dataset.tokenizer.vocab_size)
            try:
                self.model.load_state_dict(self.trained.state)
            except RuntimeError as error:
                raise GolfError(f"the checkpoint does not fit its recipe ({str(error).splitlines()[0]})") from None
            self.model.to(self.dist.device).eval()
            self.model.compute_dtype = self.dtype
        shapes = {name: tuple(t.shape) for name, t in self.trained.state.items() if t.is_floating_point()}
        self.recipe = open_up(recipe, shapes) if recipe.pack.fit else recipe

    @cached_property
    def hessians(self) -> dict[str, Tensor]:
        if self.moments is not None:
            return self.moments
        with self._timed("calibrate"), self.phases.of("calibrating on training text") as progress:
            return collect(
                self.model, self.shards, seq_len=trained_seq_len(self.recipe),
                tokens=self.recipe.quant.calibration_tokens, dist=self.dist, progress=progress,
            )  # fmt: skip

    @cached_property
    def state(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    @cached_property
    def curves(self) -> Curves:
        hessians = self.hessians
        with self._timed("measure"), self.phases.of("measuring what coarser steps cost"):
            return Curves(self.state, self.recipe, hessians, self._loss(PROBE_PHASE, self.recipe.pack.fit_tokens))

    @cached_property
    def check(self) -> Loss:
        """Loss on training text that neither calibration nor probes read."""
        return self._loss(CHECK_PHASE, CHECK_TOKENS)

    @cached_property
    def float_loss(self) -> float:
        """Of the trained weights, in nats a token of the check."""
        with self._timed("check"):
            return self.check(self.state)

    @cached_property
    def nats_to_bpb(self) -> float:
        """Bits per byte that a nat per token is on the text of the check."""
        tokens = size = 0
        for rows in training_rows(self.shards, **self._windows(CHECK_PHASE, CHECK_TOKENS)):
            ids = rows.numpy()
            size += int(self.dataset.tokenizer.token_bytes.count(ids[:, :-1], ids[:, 1:]).sum())
            tokens += ids[:, 1:].size
        return tokens / max(1, size) / math.log(2)

    def _windows(self, phase: float, tokens: int) -> dict[str, Any]:
        calibrated = self.recipe.quant.calibration_tokens
        return {"seq_len": trained_seq_len(self.recipe), "tokens": tokens, "phase": phase, "among": calibrated}

    def _loss(self, phase: float, tokens: int) -> Loss:
        model = copy.deepcopy(self.model)

        def loss(state: Mapping[str, Tensor]) -> float:
            model.load_state_dict(dict(state))
            return training_loss(model, self.shards, **self._windows(phase, tokens))

        return loss

    def _timed(self, name: str) -> _Timer:
        return _Timer(self.seconds, name)

    def pack(self, cap: int, out: Path) -> dict[str, Any]:
        """Write the artifact for one cap (0 = none, without a solver); returns what it is and what it costs.

        Raises GolfError when nothing of that size can be made, with the smallest that can.
        """
        recipe = dataclasses.replace(self.recipe, budget=dataclasses.replace(self.recipe.budget, bytes=cap))
        hessians = self.hessians if calibrates(recipe) else {}
        curves = self.curves if recipe.pack.fit else None
        with self._timed("pack"), self.phases.of(f"packing into {cap:,} bytes" if cap else "packing"):
            ledger = pack_model(
                self.state, recipe, self.dataset.tokenizer.compact(), out, self.model.vocab_size,
                dtype=str(self.dtype).removeprefix("torch."), hessians=hessians, curves=curves,
                code_bytes=self.code_bytes,
            )  # fmt: skip
        before = self.float_loss
        with self._timed("check"):
            increase = self.check(load_artifact(out).state) - before
        return self._facts(out, recipe, ledger, increase)

    def _facts(self, out: Path, recipe: Recipe, ledger: Ledger, increase: float) -> dict[str, Any]:
        factor = self.nats_to_bpb
        facts: dict[str, Any] = {
            "artifact": str(out),
            "artifact_bytes": out.stat().st_size,
            "total_bytes": ledger.counted_bytes,
            "cap_bytes": ledger.cap_bytes,
            "codec": ledger.codec,
            "method": recipe.quant.method,
            "ledger": ledger.groups,
            "measured_loss": increase,
            "measured_bpb": increase * factor,
            "float_bpb": self.float_loss * factor,
            "check_tokens": CHECK_TOKENS,
        }
        if ledger.fit:
            predicted = float(ledger.fit["predicted_loss"])
            facts |= {
                "groups": ledger.fit["groups"],
                "encodes": ledger.fit["encodes"],
                "predicted_loss": predicted,
                "predicted_bpb": predicted * factor,
                "bpb_per_kilobyte": float(ledger.fit["nats_per_kilobyte"]) * factor,
            }
        return facts

    def frontier(self, done: dict[str, Any], scratch: Path) -> dict[str, Any]:
        """Bytes against bits per byte from the coarsest plan to the finest; `done` is what `pack` said of one cap."""
        beside = done["total_bytes"] - sum(group["bytes"] for group in done["groups"].values())
        low, high = (beside + sum(float(g.bytes[end]) for g in self.curves.groups) for end in (0, -1))
        points = {int(done["total_bytes"]): done}
        for cap in np.geomspace(low, 0.99 * high, FRONTIER_CAPS):
            try:
                point = self.pack(int(cap), scratch)
            except CapTooSmall as error:  # `low` is an estimate: this is the coarsest plan
                point = self.pack(error.smallest, scratch)
            points[int(point["total_bytes"])] = point
        keys = ("total_bytes", "cap_bytes", "measured_bpb", "predicted_bpb", "measured_loss", "predicted_loss")
        return {
            "float_bpb": done["float_bpb"],
            "check_tokens": CHECK_TOKENS,
            "method": done["method"],
            "chosen_bytes": done["total_bytes"],
            "points": [{key: point[key] for key in keys} for _, point in sorted(points.items())],
        }


class _Timer:
    """Adds the seconds of a block to a table."""

    def __init__(self, table: dict[str, float], name: str) -> None:
        self._table, self._name = table, name

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._table[self._name] = self._table.get(self._name, 0.0) + time.perf_counter() - self._begun


def default_out(folder: RunFolder, cap: int) -> Path:
    """`packed-<cap>.golf` in the run folder."""
    return folder.root / (f"packed-{cap}.golf" if cap else "packed.golf")


def repack(
    path: str | Path, *, cap: int = 0, out: Path | None = None, data: str = "", overrides: Sequence[str] = (),
    frontier: bool = False, say: Callable[[str], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Pack a checkpoint into `cap` bytes (default: the recipe's cap) and say what was chosen and what it costs.

    By default GPTQ and the solver are used; `overrides` may ask for others (`quant.method=rtn`, `pack.fit=false`).
    With `frontier` also a range of caps is packed, kept in the run folder and drawn into the run's report.
    """
    words = ["quant.method=gptq", "pack.fit=true", *([f"budget.bytes={cap}"] if cap else []), *overrides]
    trained = open_trained(path, words)
    cap = trained.recipe.budget.bytes
    if trained.recipe.pack.fit and not cap:
        raise GolfError("golf pack fills a byte cap and the run had none; give --bytes N")
    if frontier and not trained.recipe.pack.fit:
        raise GolfError("--frontier asks the solver for many caps; leave pack.fit=false out")
    target = out or default_out(trained.folder, cap)
    if target.resolve() == trained.folder.artifact.resolve():
        raise GolfError(f"{target} belongs to the run's sealed record; choose another --out")
    if target.exists() and not target.is_file():
        raise GolfError(f"{target} is no plain file; choose another --out")
    if not trained.finished and say is not None:
        say(f"note: training had not ended: these are the plain weights of step {trained.step}")
    packing = Packing(trained, data_of(trained, data))
    result = packing.pack(cap, target)
    result |= {"run": str(trained.folder.root), "step": trained.step, "seconds": packing.seconds}
    if frontier:
        scratch = target.with_name(f".{target.name}.frontier")
        try:
            result["frontier"] = packing.frontier(result, scratch)
        finally:
            scratch.unlink(missing_ok=True)
    return result
