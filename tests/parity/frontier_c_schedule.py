"""Learning-rate multiplier, momentum and the start of depth recurrence of the fraction rule with a floor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paramgolf.optim import schedule
from paramgolf.recipe.sections import ScheduleSection
from paramgolf.train.budget import Position, Window
from tests.parity.harness import Check, exact, worst

TOLERANCE = 1e-12


def check_variant(variant: str, z: Any) -> list[Check]:
    hyper = json.loads(str(z[f"{variant}/hyper_json"]))
    section = ScheduleSection(
        warmdown_frac=hyper["warmdown_frac"],
        warmdown_iters=0,
        min_lr=hyper["min_lr"],
        momentum_warmup_start=hyper["muon_momentum_warmup_start"],
        momentum_warmup_steps=hyper["muon_momentum_warmup_steps"],
        loop_at=(hyper["enable_looping_at"],),
    )
    cap = max(float(z[f"{variant}/effective_ms"]), 0.0)  # in milliseconds, as are all times here
    steps = z["steps"].tolist()
    if cap:
        stored = "lr_mul"
        window, places = Window(seconds=cap), [Position(elapsed=ms) for ms in z["elapsed_ms"].tolist()]
        factors = [schedule.lr_mul(section, step=0, elapsed=at.elapsed, budget_seconds=cap) for at in places]
    else:
        stored = "lr_mul_by_step"
        window, places = Window(steps=hyper["iterations"]), [Position(step=int(step)) for step in steps]
        factors = [schedule.lr_mul(section, step=int(step), budget_steps=hyper["iterations"]) for step in steps]
    momenta = [schedule.momentum(section, float(hyper["muon_momentum"]), step=int(step)) for step in steps]
    looping = [schedule.loop_passes(section, hyper["num_loops"], window.fraction(at)) > 0 for at in places]
    return [
        exact(f"{variant} looping", looping, z[f"{variant}/looping"]),
        worst(f"{variant} lr_mul", factors, z[f"{variant}/{stored}"], TOLERANCE),
        worst(f"{variant} momentum", momenta, z[f"{variant}/momentum_by_step"], TOLERANCE),
    ]


def check(path: Path, z: Any) -> list[Check]:
    variants = [key.removesuffix("/hyper_json") for key in z.files if key.endswith("/hyper_json")]
    return [c for variant in variants for c in check_variant(variant, z)]
