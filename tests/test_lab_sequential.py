"""The sequential test keeps its error rate however many looks there are, and `--until-significant` runs by it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.sequential import found_and_used
from paramgolf.errors import GolfError
from paramgolf.lab.compare import Group, open_groups
from paramgolf.lab.compare_text import compare_text
from paramgolf.lab.further import until_significant
from paramgolf.lab.jobs import Job, run_all
from paramgolf.lab.sequential import boundaries, look, t_statistics
from paramgolf.recipe.load import load_recipe, to_toml
from tests.lab_standin import PROGRAM, RECIPE
from tests.run_common import error_line, golf_here

scipy_stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("most", [3, 5, 8, 12, 30])
@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_false_positives_over_all_looks(most: int, alpha: float) -> None:
    """2,000 comparisons whose truth is the margin; the seed is another than that of the boundaries."""
    found, _ = found_and_used(most, alpha, 0.0, 2000, seed=5)
    assert 0 < found <= alpha + 2 * math.sqrt(alpha * (1 - alpha) / 2000)
    more, _ = found_and_used(most, alpha, 0.0, 100_000, seed=6)
    assert more == pytest.approx(alpha, rel=0.12)  # and it is not wasted either
    worse, _ = found_and_used(most, alpha, -0.3, 2000, seed=7)
    assert worse <= found


def test_looking_without_correction_would_err_often() -> None:
    """Why there is a sequential test at all."""
    x = np.random.default_rng(1).standard_normal((20_000, 10))
    t = t_statistics(x)
    p = scipy_stats.t.sf(t, np.arange(1, 10))
    assert np.mean((p <= 0.01).any(axis=1)) > 0.025


def test_it_stops_early_and_finds_nearly_as_much_as_one_look_at_the_end() -> None:
    found, used = found_and_used(10, 0.01, 2.0, 20_000, seed=3)
    at_the_end = 1 - scipy_stats.nct.cdf(scipy_stats.t.isf(0.01, 9), 9, 2.0 * math.sqrt(10))
    assert found > 0.95 * at_the_end
    assert used < 7


def test_statistics_are_scipys_and_boundaries_do_not_depend_on_the_data() -> None:
    x = np.random.default_rng(2).standard_normal((1, 6)) + 0.7
    expected = [scipy_stats.ttest_1samp(x[0, :n], 0.0).statistic for n in range(2, 7)]
    assert t_statistics(x)[0] == pytest.approx(expected)
    assert boundaries(6, 0.01) == boundaries(6, 0.01)
    assert all(a > b for a, b in zip(boundaries(6, 0.01), boundaries(6, 0.01)[1:], strict=False))
    seen = look(x[0, :4] + 5.0, 0.0, 6, 0.01)
    assert seen.better and seen.p is not None and seen.p <= 0.01 * (4 / 6) ** 2
    assert look(np.array([0.1, 0.1]), 0.0, 6, 0.01).p is None
    close = look(x[0, :6] * 0 + np.array([1, -1, 1, -1, 1, -1.0]), 0.0, 6, 0.01)
    assert not close.better and close.p == pytest.approx(0.5, abs=0.02)


# -- golf compare --until-significant --------------------------------------------------------------------------------


def started(tmp_path: Path, name: str, seeds: int, *overrides: str) -> Group:
    path = tmp_path / f"{name}.toml"
    path.write_text(to_toml(load_recipe(RECIPE, list(overrides))))
    jobs = [Job(str(path), (f"train.seed={s}",), tmp_path / name / f"{name}-{s}", "", PROGRAM) for s in range(seeds)]
    run_all(jobs, 2, lambda text: None)
    (group,) = open_groups([str(tmp_path / name)])
    return group


def answer(groups: list[Group], **settings: Any) -> dict[str, Any]:
    return until_significant(groups, program=PROGRAM, workers=2, margin_nats=0.0, **settings)


def test_seeds_are_added_in_pairs_until_it_is_clear(tmp_path: Path) -> None:
    old = started(tmp_path, "old", 3, "average.kind=none")  # worse by 0.01, with noise of the seed in both
    new = started(tmp_path, "new", 1)
    result = answer([old, new], max_seeds=6)
    sequential = result["sequential"]
    assert sequential["better_by_margin"]
    assert result["comparisons"][0]["paired_seeds"] == list(range(sequential["looks"][-1]["n"]))
    made = sorted(p.name for p in (tmp_path / "new").iterdir())
    assert made[:2] == ["new-0", "new-0-seed1"]  # the partner of a run that was there already came first
    assert "sequential test" in compare_text(result) and "after" in compare_text(result)
    again = answer(open_groups([str(tmp_path / "old"), str(tmp_path / "new")]), max_seeds=6)
    assert len(list((tmp_path / "new").iterdir())) == len(made)  # nothing further was needed
    assert again["sequential"]["looks"][-1] == sequential["looks"][-1]


def test_it_gives_up_at_the_most_seeds(tmp_path: Path) -> None:
    result = answer([started(tmp_path, "new", 2)], against=1.99, max_seeds=3)
    assert not result["sequential"]["better_by_margin"]
    assert [look["n"] for look in result["sequential"]["looks"]] == [2, 3]
    assert "not shown, after 3 seeds" in compare_text(result)


def test_what_it_refuses(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    old, new = started(tmp_path, "old", 2), started(tmp_path, "new", 3, "model.mlp_hidden=481")
    with pytest.raises(GolfError, match="one candidate with one baseline"):
        answer([old], max_seeds=5)
    with pytest.raises(GolfError, match="must be at least that"):
        answer([new], against=2.0, max_seeds=2)
    with pytest.raises(GolfError, match="runs of one recipe, each seed once"):
        answer([Group("both", [*old.runs, *new.runs])], against=2.0, max_seeds=9)
    line = error_line(golf_here(capfd, "compare", tmp_path / "old", "--until-significant"))
    assert "one candidate" in line
