"""Learning-rate multiplier and momentum over grids of step and elapsed time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from paramgolf.optim import schedule
from paramgolf.recipe.sections import ScheduleSection
from tests.parity.harness import Check, worst


def section_of(hyper: dict[str, Any], cosine: bool) -> ScheduleSection:
    """The script's settings in our words."""
    return ScheduleSection(
        warmdown_iters=hyper["warmdown_iters"],
        warmdown_frac=hyper.get("warmdown_frac", 0.0),
        warmdown_shape="cosine" if cosine else "linear",
        momentum_warmup_start=hyper["muon_momentum_warmup_start"],
        momentum_warmup_steps=hyper["muon_momentum_warmup_steps"],
        momentum_warmup_frac=hyper.get("muon_warmup_frac", 0.0),
    )


def check_variant(variant: str, z: Any) -> list[Check]:
    hyper = json.loads(str(z[f"{variant}/hyper_json"]))
    # The cosine is a fact of the one script that also has the fraction options.
    section = section_of(hyper, cosine="warmdown_frac" in hyper)
    cap = max(float(z[f"{variant}/max_wallclock_ms"]), 0.0) / 1000
    total = int(hyper["iterations"])

    def multiplier(step: int, ms: float) -> float:
        # With a clock the scripts ignore the step limit, and they define no decay past their last step.
        steps = total if cap == 0 and step < total else 0
        return schedule.lr_mul(section, step=step, elapsed=ms / 1000, budget_seconds=cap, budget_steps=steps)

    def momentum(step: int, ms: float) -> float:
        final = float(hyper["muon_momentum"])
        return schedule.momentum(section, final, step=step, elapsed=ms / 1000, budget_seconds=cap)

    steps, elapsed, rates = z["steps"].tolist(), z["elapsed_ms"].tolist(), z["avg_step_ms"].tolist()
    ours = {
        "lr_mul": [[multiplier(s, ms) for ms in elapsed] for s in steps],
        "lr_mul_constant_rate": [[multiplier(s, s * rate) for rate in rates] for s in steps],
        "momentum": [[momentum(s, ms) for ms in elapsed] for s in steps],
    }
    return [worst(f"{variant}/{key}", np.array(table), z[f"{variant}/{key}"], 1e-9) for key, table in ours.items()]


def check(path: Path, z: Any) -> list[Check]:
    variants = [key.removesuffix("/hyper_json") for key in z.files if key.endswith("/hyper_json")]
    return [c for variant in variants for c in check_variant(variant, z)]
