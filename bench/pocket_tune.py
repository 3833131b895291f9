"""Trials of a recipe on a split of training text: `python -m bench.pocket_tune bench/pocket_trials.toml --json FILE`.

The TOML file holds `recipe`, `common` overrides and a list of `[[trial]]` tables with `name` and `overrides`. Trials
are appended to FILE as they end, so that a stopped series goes on where it was. The validation set is never touched.
"""

from __future__ import annotations

import argparse
import json
import threading
import tomllib
from pathlib import Path
from typing import Any

from bench.runs import golf_run, on_cores
from bench.webtext import train_text, tuning_split
from paramgolf.data.cache import cache_root

KEYS = (
    "val_bpb", "val_bpb_sliding", "val_bpb_ngram", "val_bpb_float", "total_bytes", "params", "steps", "train_tokens",
    "step_ms",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.pocket_tune", description=__doc__)
    parser.add_argument("trials", type=Path)
    parser.add_argument("--json", type=Path, required=True, help="results; trials already in it are not run again")
    parser.add_argument("--workers", type=int, default=1, help="trials at once, each on a core of its own")
    options = parser.parse_args()
    series = tomllib.loads(options.trials.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = json.loads(options.json.read_text()) if options.json.exists() else []
    done = {row["name"] for row in rows}
    train, held = train_text(), tuning_split(cache_root())
    writing = threading.Lock()

    def work(trial: dict[str, Any]) -> None:
        overrides = [*series.get("common", []), *trial["overrides"]]
        try:
            record = golf_run(series["recipe"], overrides, train=train, val=held)
        except RuntimeError as error:  # over the cap, say: a result like any other
            record = {}
            print(error, flush=True)
        row = {"name": trial["name"], "overrides": overrides, **{key: record.get(key) for key in KEYS}}
        with writing:
            rows.append(row)
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
            print(json.dumps(row), flush=True)

    on_cores(work, [trial for trial in series["trial"] if trial["name"] not in done], options.workers)


if __name__ == "__main__":
    main()
