"""What `golf compare` prints."""

from __future__ import annotations

from typing import Any

from paramgolf.runner.summary import table_text


def compare_text(result: dict[str, Any]) -> str:
    """The groups, each comparison with its tests and verdict, and every warning."""
    rows = [
        (g["name"], str(len(g["runs"])), f"{g['mean']:.5f}", _or_dash(g["deviation"], ".5f"), f"{g['mean_nats']:.5f}")
        for g in result["groups"]
    ]
    parts = [table_text(rows, header=("runs", "n", result["metric"], "deviation", "nats a token"))]
    parts += [f"{g['name']}: {note}" for g in result["groups"] for note in g["notes"]]
    if result.get("note"):
        parts.append(result["note"])
    if result["allowed"]:
        parts.append(f"compared although these may differ: {', '.join(result['allowed'])}")
    parts += [_comparison(test, result) for test in result["comparisons"]]
    return "\n\n".join([*parts, *([_sequential(result)] if "sequential" in result else [])])


def _sequential(result: dict[str, Any]) -> str:
    """What counts when seeds were added one by one: the sequential test, not the p-values above."""
    sequential = result["sequential"]
    last = sequential["looks"][-1]
    rows = [
        (str(look["n"]), _or_dash(look["statistic"], ".3f"), f"{look['boundary']:.3f}", _or_dash(look["p"], ".4g"))
        for look in sequential["looks"]
    ]
    title = f"sequential test, a look at every number of seeds up to {sequential['max_seeds']}"
    answer = "yes" if sequential["better_by_margin"] else "not shown"
    margin = f"{result['margin_nats']:g} nats"
    verdict = f"Better by at least {margin} at an error rate of {result['alpha']:g} over all looks: {answer}"
    table = table_text(rows, header=("seeds", "t", "boundary", "p over the looks"), title=title)
    return f"{table}\n  {verdict}, after {last['n']} seeds. The p-values above are those of a single look."


def _comparison(test: dict[str, Any], result: dict[str, Any]) -> str:
    t, permutation = test["t"], test["permutation"]
    other = f"the published {result['against']}" if result["baseline"] is None else result["baseline"]
    margin = f"{result['margin_nats']:g} nats ({result['margin_bpb']:.5f} BPB)"
    rows = [
        ("improvement (positive = better)", f"{test['improvement']:+.5f} BPB, {test['improvement_nats']:+.5f} nats")
    ]
    if t["low"] is not None:
        rows.append((f"{100 * (1 - result['alpha']):g} % interval", f"{t['low']:+.5f} to {t['high']:+.5f} BPB"))
    rows.append((f"p, {t['method']}", _or_dash(t["p"], ".4g")))
    if len(result["comparisons"]) > 1:
        rows.append(("p, for all comparisons (Holm)", _or_dash(test["p_holm"], ".4g")))
    kind = "all" if permutation["exact"] else "drawn"
    arrangements = (
        f"{permutation['arrangements']:,} arrangements, {kind}; smallest possible {permutation['smallest']:.4g}"
    )
    rows.append(("p, permutation", f"{permutation['p']:.4g} ({arrangements})"))
    if test["paired_seeds"]:
        rows.append(("paired by seeds", ", ".join(map(str, test["paired_seeds"]))))
    rows.append((f"runs for power {result['power']:g}", _needed(test)))
    verdict = _verdict(test, result, margin)
    table = table_text(rows, title=f"{test['candidate']} against {other}")
    return f"{table}\n  {verdict}"


def _verdict(test: dict[str, Any], result: dict[str, Any], margin: str) -> str:
    if test["t"]["p"] is None:
        return f"Better by at least {margin}: not determined; this needs two runs that differ on each side."
    answer = "yes" if test["better_by_margin"] else "not shown"
    return f"Better by at least {margin} at p <= {result['alpha']:g}: {answer}."


def _needed(test: dict[str, Any]) -> str:
    if test["t"]["p"] is None:
        return "unknown without a deviation"
    if test["runs_needed"] is None:
        return "no number of runs: the improvement seen is not above the margin (or needs more than 10,000)"
    each = "" if test["paired_seeds"] or test["t"]["method"] != "Welch t" else " in each group"
    return f"{test['runs_needed']}{each}, {test['runs_still_needed']} more than there are (if the truth is as seen)"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
