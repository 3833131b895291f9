"""Clocks: what they count, what they leave out, and that a resumed run keeps what was spent."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from paramgolf.train.clock import Clock, process_age


def test_the_strict_clock_starts_with_the_process() -> None:
    code = (
        "import time; time.sleep(0.4)\n"
        "from paramgolf.train.clock import Clock\n"
        "print(Clock().strict())"
    )  # fmt: skip
    begun = time.monotonic()
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lasted = time.monotonic() - begun
    assert 0.4 <= float(answer.stdout) <= lasted + 0.02  # the kernel counts starts in 10 ms


def test_under_torchrun_the_launcher_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Clock().strict()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert Clock().strict() >= max(own, process_age(os.getppid()) - 0.05)


def test_outside_phases_are_reported_but_not_counted() -> None:
    clock = Clock(10.0)
    with clock.phase("data", outside=True):
        time.sleep(0.05)
        assert clock.strict() - clock.spent() >= 0.05  # also while it is open
        with clock.phase("inner", outside=True):
            time.sleep(0.02)
    assert clock.phases()["data"] >= 0.07
    assert 0.07 <= clock.strict() - clock.spent() < 0.2, "a nested outside phase is not counted twice"
    assert clock.spent() >= 10.0


def test_the_challenge_clock_starts_late_and_once() -> None:
    clock = Clock(5.0)
    assert clock.challenge() == 0.0
    clock.start_challenge()
    time.sleep(0.03)
    clock.start_challenge()
    with clock.phase("score", outside=True):
        time.sleep(0.1)
    assert 0.03 <= clock.spent("challenge") < 0.1


def test_repeated_phases_add_up() -> None:
    clock = Clock(0.0)
    for _ in range(2):
        with clock.phase("save"):
            time.sleep(0.02)
    assert clock.phases()["save"] >= 0.04


def test_a_resumed_clock_adds_what_earlier_processes_spent() -> None:
    first = Clock(100.0)
    with first.phase("data", outside=True):
        time.sleep(0.02)
    first.start_challenge()
    time.sleep(0.05)
    state = first.state_dict()
    second = Clock(3.0)
    second.load_state_dict(state)
    assert second.strict() == pytest.approx(103.07, abs=0.05)
    assert second.strict() - second.spent() == pytest.approx(0.02, abs=0.02)
    held = second.challenge()
    assert held == pytest.approx(0.05, abs=0.03)
    time.sleep(0.03)
    assert second.challenge() == held, "restarting is not on the challenge clock"
    second.start_challenge()
    time.sleep(0.03)
    assert second.challenge() >= held + 0.03


def test_time_lost_after_the_last_checkpoint_still_counts() -> None:
    state = Clock(50.0).state_dict()
    clock = Clock(0.0)
    clock.load_state_dict(state, last_seen=80.0)
    assert clock.strict() == pytest.approx(80.0, abs=0.1)
    assert clock.spent() == pytest.approx(80.0, abs=0.1)
