"""Stands in for `golf run` where a test is about many runs and not about training: same command line, same folder.

The score is a known function of the recipe, so that a search has a known answer. `LAB_STANDIN_SECONDS` makes it slow,
a large learning rate makes it lose from the start (for pruners), and a tiny byte cap fails as golf would.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

from paramgolf.recipe.load import load_recipe, to_toml
from paramgolf.runner.record import FORMAT, seal

PROGRAM = (sys.executable, "-m", "tests.lab_standin")
RECIPE = str(Path(__file__).with_name("lab_standin.toml"))


def score(lr: float, hidden: int, seed: int, decay: float) -> float:
    """Best at a learning rate of 0.02 and 480 channels; averaging helps by 0.01; the seed is small noise."""
    noise = int(hashlib.sha256(f"{seed} {decay}".encode()).hexdigest()[:4], 16) / 65536 - 0.5
    return 2.0 + math.log(lr / 0.02) ** 2 + ((hidden - 480) / 480) ** 2 + (0.0 if decay else 0.01) + 0.0004 * noise


def main(arguments: list[str]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    name, rest = arguments[1], arguments[2:]
    out = Path(rest[rest.index("--out") + 1])
    recipe = load_recipe(name, [w for w in rest if "=" in w and not w.startswith("-")])
    out.mkdir(parents=True)
    (out / "recipe.toml").write_text(to_toml(recipe))
    if 0 < recipe.budget.bytes < 1000:
        sys.exit("golf: error: budget.bytes is too small for this recipe")
    lr, decay = recipe.optim.matrix_lr, recipe.average.decay if recipe.average.kind == "ema" else 0.0
    result = score(lr, recipe.model.mlp_hidden, recipe.train.seed, decay)
    with (out / "train.jsonl").open("w") as log:
        for step in range(1, 21):
            row = {"step": step, "loss": result + 20 / step, "tokens": 100 * step, "elapsed": step, "strict": step}
            log.write(json.dumps(row) + "\n")
            log.flush()
            time.sleep(float(os.environ.get("LAB_STANDIN_SECONDS", "0")) / 20)
    record = {
        "format": FORMAT, "recipe": recipe.name, "seed": recipe.train.seed, "val_bpb": result, "scored_bytes": 24_000,
        "scored_tokens": 10_000, "bytes_from": "documents", "cap_bytes": recipe.budget.bytes, "step_ms": 5.0,
        "total_bytes": 1000 * recipe.model.mlp_hidden, "seconds": {"strict": 2.0}, "steps": 20,
        "sha256": {"artifact": hashlib.sha256(f"{out}{result}".encode()).hexdigest()},
        "data": {
            "source": [{"sha256": "s"}], "tokenizer": {"sha256": "t"},
            "train": {"shards": [{"sha256": "a"}]}, "val": {"shards": [{"sha256": "b"}], "sha256": "v"},
        },
    }  # fmt: skip
    (out / "record.json").write_text(json.dumps(seal(record)))


if __name__ == "__main__":
    main(sys.argv[1:])
