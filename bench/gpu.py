"""A recipe at full size on one GPU against its public script: python -m bench.gpu RECIPE --scripts DIR --json FILE ...

Both train for the same seconds on the same GPU, shards, batch and seed, each in a process of its own. The script gets
its submission's environment variables, the recipe the same through `recipe.fromenv`. How to run it: docs/gpu.md.

    python -m bench.gpu pr114 --scripts DIR --text FILE --tokenizer MODEL --seconds 60 --json results/gpu_pr114.json
    python -m bench.gpu --merge results/gpu_*.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu_logs import Side, compare, our_side, script_side
from bench.gpu_peers import (
    PATHS,
    SCRIPTS,
    data_facts,
    decay_steps,
    find_script,
    make_shards,
    our_overrides,
    our_variables,
    variables,
)
from paramgolf.errors import GolfError
from paramgolf.files import atomic_write, sha256_file
from paramgolf.recipe.fromenv import from_variables
from paramgolf.recipe.load import load_recipe
from paramgolf.runner.environment import environment

LOG_EVERY = 10
SOURCE = Path(__file__).resolve().parents[1] / "src"  # also where the package is not installed
STANDIN = Path(__file__).with_name("flash_attn_standin")
ON_GPU = ("train.device=cuda",)
NO_GPU = (
    "no CUDA device is present; this bench needs one (see docs/gpu.md). Without it: --prepare makes the shards, "
    "--merge prints results that are there"
)


def run_logged(command: list[str], folder: Path, env: Mapping[str, str], limit: float, name: str) -> tuple[str, str]:
    """(stdout, "" or what went wrong); stderr and stdout are kept in `folder` as NAME.err and NAME.out.

    After `limit` seconds the process and all it started are ended; what it had printed still counts.
    """
    out, err = folder / f"{name}.out", folder / f"{name}.err"
    with out.open("w") as stdout, err.open("w") as stderr:
        child = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **env, "PYTHONUNBUFFERED": "1"}, stdout=stdout, stderr=stderr,
            start_new_session=True,
        )  # fmt: skip
        try:
            code, problem = child.wait(limit), ""
        except BaseException as error:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code, problem = 0, f"stopped after {limit:.0f} s"
    if code:
        tail = [line for line in err.read_text(errors="replace").splitlines() if line.strip()][-3:]
        problem = f"ended with code {code}: {' | '.join(tail)}"
    return out.read_text(errors="replace"), problem


def run_script(script: Path, env: Mapping[str, str], folder: Path, limit: float) -> Side:
    """The public script on this GPU, alone: without torchrun it runs as one process with 8 accumulation steps.

    Where FlashAttention-3 is not installed, a module of its name that calls torch's kernels takes its place.
    """
    began = time.monotonic()
    if importlib.util.find_spec("flash_attn_interface") is None:
        env = {**env, "PYTHONPATH": _path(STANDIN, SOURCE)}
    text, problem = run_logged([sys.executable, str(script)], folder, env, limit, "script")
    side = script_side(text.splitlines())
    return side | {"wall_seconds": time.monotonic() - began, "problem": problem}


def run_recipe(recipe: str, env: Mapping[str, str], folder: Path, limit: float, more: Sequence[str] = ON_GPU) -> Side:
    """`golf run` with the same settings and `more` overrides, read from its record and its training log."""
    overrides, _ = from_variables(env)
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "paramgolf", "run", recipe, *overrides, *more, "--out", str(out)]
    began = time.monotonic()
    _, problem = run_logged(command, folder, {"PYTHONPATH": _path(SOURCE)}, limit, "recipe")
    record = out / "record.json"
    side: Side = script_side([])
    if record.exists():
        rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
        side = our_side(json.loads(record.read_text()), rows)
    return side | {"wall_seconds": time.monotonic() - began, "problem": problem}


def _path(*folders: Path) -> str:
    """PYTHONPATH with these before it."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH", "")])])


def gpu_facts() -> dict[str, Any]:
    """The card, its driver and what else is known of the machine."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv,noheader"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        line = ""
    major, minor = torch.cuda.get_device_capability()
    return {"nvidia_smi": line, "capability": f"{major}.{minor}", **environment()}


def bench(options: argparse.Namespace, data: Path, folder: Path) -> dict[str, Any]:
    """Run the sides that were asked for; what FILE already holds of the others is kept."""
    recipe = options.recipe
    env = variables(
        recipe, data, seconds=options.seconds, seed=options.seed, log_every=LOG_EVERY, steps=options.steps,
        ttt=options.ttt,
    )  # fmt: skip
    own, more = our_variables(recipe, env), [*ON_GPU, *our_overrides(recipe, ttt=options.ttt)]
    script = options.script or find_script(options.scripts, recipe)
    facts = {
        "recipe": recipe, "seconds": options.seconds, "seed": options.seed, "data": data_facts(data),
        "script": {"name": script.name, "bytes": script.stat().st_size, "sha256": sha256_file(script)},
        "variables": {key: value for key, value in env.items() if key not in PATHS},
    }  # fmt: skip
    facts |= {"steps": options.steps} if options.steps else {}
    answer: dict[str, Any] = {**facts, "command": command_line(), "environment": gpu_facts(), "sides": {}}
    if options.json.exists():
        before = json.loads(options.json.read_text())
        if all(before.get(key) == value for key, value in facts.items()):
            answer["sides"] = before["sides"]
    runs = {
        "ours": lambda: run_recipe(recipe, own, folder, options.limit, more),
        "theirs": lambda: run_script(script.resolve(), env, folder, options.limit),
        "ours-again": lambda: run_recipe(recipe, {**own, "SEED": str(options.seed + 1)}, folder, options.limit, more),
    }
    for name in options.only.split(","):
        print(f"{recipe}: {name} ...", file=sys.stderr, flush=True)
        answer["sides"][name] = runs[name]()
        answer |= comparisons(answer, options.seconds)
        atomic_write(options.json, json.dumps(answer, indent=1).encode())  # a stopped bench keeps what it measured
    return json.loads(options.json.read_text())


def comparisons(answer: dict[str, Any], seconds: float) -> dict[str, Any]:
    """`comparison` with the script and `noise` between two of our seeds, as far as the sides are there."""
    sides = {name: _with_steps(side) for name, side in answer["sides"].items()}
    out = {}
    for key, other in (("comparison", "theirs"), ("noise", "ours-again")):
        if "ours" in sides and other in sides:
            out[key] = compare(sides["ours"], sides[other], _decay(answer, seconds, sides["ours"], sides[other]))
    return out


def _decay(answer: dict[str, Any], seconds: float, ours: Side, theirs: Side) -> int:
    """Steps at the end of two runs in which their rates fall by the clock."""
    if answer.get("steps"):
        return 0
    part = load_recipe(answer["recipe"]).schedule.warmdown_frac
    last = min(ours["steps"] or 0, theirs["steps"] or 0)
    return math.ceil(part * last) if part else decay_steps(answer["recipe"], seconds)


def _with_steps(side: Side) -> Side:
    """With whole numbers as steps of the curve again, which JSON turns into text."""
    return side | {"curve": {int(step): loss for step, loss in (side["curve"] or {}).items()}}


def command_line() -> str:
    """What was typed, with paths cut to their last part: they mean nothing on another machine."""
    words = [Path(word).name if os.sep in word else word for word in sys.argv[1:]]
    return shlex.join(["python", "-m", "bench.gpu", *words])


def table(answers: list[dict[str, Any]]) -> str:
    """One line a side."""
    head = f"{'recipe':13} {'':10} {'steps':>6} {'ms/step':>8} {'tokens/s':>10} {'speed':>6} {'loss@step':>14} "
    lines = [head + f"{'gap':>7} {'BPB float':>9} {'BPB':>7} {'sliding':>7} {'TTT':>7} {'artifact':>11} {'GiB':>5}"]
    for answer in answers:
        batch = load_recipe(answer["recipe"]).train.batch_tokens
        lines += [_line(answer, name, batch) for name in answer["sides"]]
        for name, side in answer["sides"].items():
            if side["problem"]:
                lines.append(f"  {answer['recipe']} {name}: {side['problem']}")
    return "\n".join(lines)


def _line(answer: dict[str, Any], name: str, batch: int) -> str:
    side = answer["sides"][name]
    against = answer.get("noise" if name == "ours-again" else "comparison", {})
    loss = gap = speed = ""
    if against.get("steps_compared"):
        value = against["loss_ours" if name == "ours" else "loss_theirs"]
        loss = f"{value:.4f}@{against['last_step']}"
        gap = f"{against['mean_gap_second_half']:+.4f}" if name != "theirs" else ""
    if name == "ours" and against.get("speed_ratio"):
        speed = f"{against['speed_ratio']:.2f}x"

    def number(value: float | None, form: str) -> str:
        return format(value, form) if value is not None else "-"

    rate = number(1e3 * batch / side["step_ms"] if side["step_ms"] else None, ",.0f")
    peak = side["peak_memory_bytes"]
    return (
        f"{answer['recipe']:13} {name:10} {number(side['steps'], 'd'):>6} {number(side['step_ms'], '.1f'):>8} "
        f"{rate:>10} {speed:>6} {loss:>14} {gap:>7} {number(side['val_bpb_float'], '.4f'):>9} "
        f"{number(side['val_bpb'], '.4f'):>7} {number(side['val_bpb_sliding'], '.4f'):>7} "
        f"{number(side.get('val_bpb_ttt'), '.4f'):>7} "
        f"{number(side['artifact_bytes'], ',d'):>11} {number(peak / 2**30 if peak else None, '.1f'):>5}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", help=", ".join(SCRIPTS))
    parser.add_argument("--scripts", type=Path, help="folder of the public scripts")
    parser.add_argument("--script", type=Path, help="one script, where the folder does not tell which")
    parser.add_argument("--text", help="training text (.txt, .xz, .jsonl ...)")
    parser.add_argument("--val", default="", help="validation text; without it, part of --text")
    parser.add_argument("--val-bytes", type=int, default=1_000_000, help="size of a validation part of --text")
    parser.add_argument("--tokenizer", type=Path, help="the official SentencePiece model")
    parser.add_argument("--shards", type=Path, help="folder of the shards; with --text they are made there")
    parser.add_argument("--prepare", action="store_true", help="only make the shards (needs no GPU)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, each side")
    parser.add_argument("--steps", type=int, default=0, help="of records: so many steps instead, rates by steps too")
    parser.add_argument("--ttt", action="store_true", help="of records: test-time training too")
    parser.add_argument("--limit", type=float, default=280.0, help="most seconds of one side, all in all")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--only", default="theirs,ours", help="sides to run: theirs, ours, ours-again (next seed)")
    parser.add_argument("--keep", type=Path, help="folder for logs and the run folder")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--merge", type=Path, nargs="+", help="print one table of results of earlier calls")
    return parser.parse_args()


def single(options: argparse.Namespace) -> None:
    """The bench of one recipe."""
    with tempfile.TemporaryDirectory() as scratch:
        data = options.shards or Path(scratch, "shards")
        if options.text:
            if options.tokenizer is None:
                raise GolfError("--text needs --tokenizer, the official SentencePiece model")
            make_shards(options.text, options.tokenizer, data, val=options.val, val_bytes=options.val_bytes)
        elif not options.shards:
            raise GolfError("give --text and --tokenizer, or --shards made before")
        if options.prepare:
            print(json.dumps(data_facts(data), indent=1))
            return
        if not (options.recipe and options.json and (options.scripts or options.script)):
            raise GolfError("RECIPE, --scripts and --json are needed")
        if unknown := set(options.only.split(",")) - {"ours", "theirs", "ours-again"}:
            raise GolfError(f"--only: no side '{sorted(unknown)[0]}'; known: theirs, ours, ours-again")
        folder = options.keep or Path(scratch, "work")
        folder.mkdir(parents=True, exist_ok=True)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        answer = bench(options, data.resolve(), folder.resolve())
    print(table([answer]))
    if any(side["problem"] for side in answer["sides"].values()):
        sys.exit(1)


def main() -> None:
    options = parse()
    try:
        if options.merge:
            answers = [json.loads(path.read_text()) for path in options.merge]
            print(table(answers))
            if options.json:
                atomic_write(options.json, json.dumps({"results": answers}, indent=1).encode())
        elif not options.prepare and not torch.cuda.is_available():
            raise GolfError(NO_GPU)
        else:
            single(options)
    except GolfError as error:
        sys.exit(f"bench: {error}")


if __name__ == "__main__":
    main()
