"""Trials of a recipe on a split of the training text: `python -m bench.pocket_tune TRIALS.toml --json FILE`.

TRIALS.toml holds `recipe`, `common` overrides and a list of `[[trial]]` tables with `name` and `overrides`. Trials run
one after the other and are appended to FILE as they end, so that a stopped series goes on where it was. The
validation set is never touched.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path
from typing import Any

from bench.runs import golf_run
from bench.webtext import train_text, tuning_split

KEYS = ("val_bpb", "val_bpb_sliding", "val_bpb_float", "total_bytes", "params", "steps", "train_tokens", "step_ms")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.pocket_tune", description=__doc__)
    parser.add_argument("trials", type=Path)
    parser.add_argument("--json", type=Path, required=True, help="results; trials already in it are not run again")
    options = parser.parse_args()
    series = tomllib.loads(options.trials.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = json.loads(options.json.read_text()) if options.json.exists() else []
    done = {row["name"] for row in rows}
    held = tuning_split(options.json.parent)
    for trial in series["trial"]:
        if trial["name"] in done:
            continue
        overrides = [*series.get("common", []), *trial["overrides"]]
        try:
            record = golf_run(series["recipe"], overrides, train=train_text(), val=held)
        except RuntimeError as error:  # over the cap, say: a result like any other
            record = {}
            print(error, flush=True)
        row = {"name": trial["name"], "overrides": overrides, **{key: record.get(key) for key in KEYS}}
        rows.append(row)
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
