"""Learning-rate multiplier and Muon momentum as pure functions of where the run stands.

Time is in seconds. A budget of 0 is unbound. Steps count from 0: `step` steps have been taken when step number `step`
is about to run.
"""

from __future__ import annotations

import math

from paramgolf.recipe.sections import ScheduleSection


def lr_mul(
    section: ScheduleSection,
    *,
    step: int,
    elapsed: float = 0.0,
    budget_seconds: float = 0.0,
    budget_steps: int = 0,
    tokens: int = 0,
    budget_tokens: int = 0,
    step_seconds: float | None = None,
) -> float:
    """The factor on every learning rate, in [0, 1].

    The final decay reaches its end when the first of the bound budgets does. `step_seconds` is the measured time of a
    step; by default `elapsed / step`. A phase after training (PR 107's post-training QAT) is not part of the budget:
    the caller passes what is left for the main phase.
    """
    left = 1.0
    if budget_seconds > 0:
        if step_seconds is None:
            step_seconds = elapsed / max(step, 1)
        window = _window(section, budget_seconds, section.warmdown_iters * step_seconds)
        left = min(left, _share(max(budget_seconds - elapsed, 0.0), window))
    if budget_steps > 0:
        window = _window(section, budget_steps, section.warmdown_iters)
        left = min(left, _share(max(budget_steps - step, 0), window))
    if budget_tokens > 0:
        window = _window(section, budget_tokens, section.warmdown_iters * tokens / max(step, 1))
        left = min(left, _share(max(budget_tokens - tokens, 0), window))
    if section.warmdown_shape == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * (1.0 - left)))
    ramp = min(1.0, (step + 1) / section.lr_warmup_steps) if section.lr_warmup_steps else 1.0
    return ramp * max(section.min_lr, left)


def momentum(
    section: ScheduleSection,
    final: float,
    *,
    step: int,
    elapsed: float = 0.0,
    budget_seconds: float = 0.0,
) -> float:
    """The matrix optimizer's momentum: a linear ramp from `momentum_warmup_start` to `final` (`optim.momentum`).

    Over a fraction of the time budget if one is asked for and there is a time budget, else over steps.
    """
    done = 1.0
    if section.momentum_warmup_frac > 0 and budget_seconds > 0:
        done = min(elapsed / (section.momentum_warmup_frac * budget_seconds), 1.0)
    elif section.momentum_warmup_steps > 0:
        done = min(step / section.momentum_warmup_steps, 1.0)
    return (1.0 - done) * section.momentum_warmup_start + done * final


def loop_passes(section: ScheduleSection, extra: int, fraction: float) -> int:
    """How many of `extra` further passes the looped layers run at `fraction` of the budget (depth recurrence).

    One entry of `loop_at` begins all of them; several begin one each (#1412: progressive).
    """
    begun = sum(fraction >= at for at in section.loop_at)
    return begun if len(section.loop_at) > 1 else extra * begun


def decay_mul(section: ScheduleSection, fraction: float) -> float:
    """The factor on the matrices' weight decay: 1 until `decay_taper_at`, then linear to `decay_taper_to` (#1729)."""
    if fraction <= section.decay_taper_at:
        return 1.0
    gone = min(1.0, (fraction - section.decay_taper_at) / (1.0 - section.decay_taper_at))
    return 1.0 + gone * (section.decay_taper_to - 1.0)


def _window(section: ScheduleSection, budget: float, by_steps: float) -> float | None:
    """Length of the final decay in the unit of the budget; None = there is none."""
    if section.warmdown_frac > 0:
        return section.warmdown_frac * budget
    return by_steps if section.warmdown_iters > 0 else None


def _share(remaining: float, window: float | None) -> float:
    """The part of the decay that is still to come: 1 before it starts, 0 at its end."""
    if window is None or remaining > window:
        return 1.0
    return remaining / window if window > 0 else 0.0
