"""What looking after every seed costs in power: `python -m bench.sequential`.

Simulated comparisons of normal scores whose true improvement lies so many deviations above the margin: how many
`golf compare --until-significant` finds and with how many seeds, beside one t test at the end.
"""

from __future__ import annotations

import argparse

import numpy as np

from paramgolf.lab.sequential import boundaries, t_statistics
from paramgolf.lab.stats import scipy_stats


def found_and_used(most: int, alpha: float, effect: float, count: int, seed: int) -> tuple[float, float]:
    """(share of comparisons that end in "better", mean number of seeds used) over `count` simulated comparisons."""
    x = np.random.default_rng(seed).standard_normal((count, most)) + effect
    crossed = t_statistics(x) >= np.array(boundaries(most, alpha))
    ended = crossed.any(axis=1)
    return float(ended.mean()), float(np.where(ended, crossed.argmax(axis=1) + 2, most).mean())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sequential", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8, help="the most")
    parser.add_argument("--alpha", type=float, default=0.01)
    parser.add_argument("--count", type=int, default=100_000)
    options, stats = parser.parse_args(), scipy_stats()
    most, alpha = options.seeds, options.alpha
    print(f"{options.count:,} comparisons, at most {most} seeds, alpha {alpha:g}")
    print("improvement  found  seeds used  one look at the end  ratio")
    for effect in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0):
        found, used = found_and_used(most, alpha, effect, options.count, seed=3)
        at_the_end = float(1 - stats.nct.cdf(stats.t.isf(alpha, most - 1), most - 1, effect * most**0.5))
        print(f"{effect:8.1f} sd  {found:6.1%}  {used:10.1f}  {at_the_end:19.1%}  {found / at_the_end:5.2f}")


if __name__ == "__main__":
    main()
