"""Proofs and compressed files of one model on one text: `python -m bench.prove --model model.golf [--json FILE]`.

    overhead     proved_bpb over the scorer's val_bpb of the same windows, at three tolerances; a proof at the default
    differences  the largest log-odds difference between ways to compute the model, beside the default tolerance
    files        `golf compress` and `decompress`: sizes beside other compressors, speed, memory at two sizes of text
    full         decoding speed of a full-size model (random weights), windows of 1,024
    zeros        a gigabyte of zeros

Rows are kept in FILE as they end, so that `--only` can measure some of them again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.webtext import SEPARATOR, val_text
from paramgolf.data.bpe import train_bpe
from paramgolf.files import atomic_write
from paramgolf.model.gpt import GPT
from paramgolf.pack.packer import pack_model
from paramgolf.recipe.load import load_recipe
from paramgolf.recipe.sections import NgramLevel
from paramgolf.runner.environment import environment
from paramgolf.score import coder
from paramgolf.score.grid import LIMIT
from paramgolf.score.scorer import evaluating, window_batches
from paramgolf.score.stream import Caches, Stepper, path_log_odds
from paramgolf.score.windows import plan
from paramgolf.text import pieces
from paramgolf.text.blocks import TOLERANCE, TextModel, cut_evenly, encode_lanes, exact_arithmetic
from paramgolf.text.format import Content, Frame, Kind
from paramgolf.text.peers import compress_peers
from paramgolf.text.prove import encode_proof
from paramgolf.text.stream import Crew, default_workers, one_thread

LIMITS = {0.0: 0.001, 1e-5: 0.005, 1e-4: 0.015}  # tolerance: what the proof may cost
SPARE = 3.0  # times the largest difference seen must fit in the default tolerance
FULL = ["model.mlp_hidden=1536", "train.seq_len=1024", "budget.bytes=0", "pack.codec=raw"]
# Runs a command and writes what the largest of its processes held. Started from here, a process would be said to have
# held what this one holds: Linux counts in `ru_maxrss` the memory that it shared with its parent before it began.
PEAK = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
open(sys.argv[1], "w").write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""
Rows = dict[str, Any]
Levels = Sequence[NgramLevel]


def run_golf(*arguments: str, stdin: Path | None = None, stdout: Path | None = None) -> tuple[float, int, str]:
    """(seconds, bytes of the largest of its processes, what it printed) of one command."""
    command = [sys.executable, "-m", "paramgolf", *arguments]
    with contextlib.ExitStack() as held:
        given = held.enter_context((stdin or Path(os.devnull)).open("rb"))
        folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
        printed = held.enter_context((stdout or folder / "printed").open("w+b"))
        peak = folder / "peak"
        began = time.monotonic()
        code = subprocess.call([sys.executable, "-c", PEAK, str(peak), *command], stdin=given, stdout=printed)
        seconds = time.monotonic() - began
        if code:
            raise RuntimeError(f"{' '.join(command)} ended with code {code}")
        printed.seek(0)
        return seconds, 1024 * int(peak.read_text()), "" if stdout else printed.read().decode()


def overhead(options: argparse.Namespace, text: Path) -> Rows:
    """Sizes at each tolerance; at the default one a whole proof, by the command."""
    model, rows = TextModel(options.model, device="cpu"), []
    documents = text.read_bytes().split(SEPARATOR)
    for tolerance in LIMITS:
        header = model.header(Content.DOCUMENTS, tolerance)
        cuts = pieces.even_pieces(pieces.parts_of(documents), model.tokenizer, model.lane_limit(model.seq_len))
        with tempfile.TemporaryFile() as file:
            tally = encode_proof(cuts, model, header, file, None, lambda line: None)
            facts = tally.facts(file.tell(), model, header)
        rows.append({key: facts[key] for key in ("tolerance", "proved_bpb", "val_bpb_same_windows", "overhead")})
        rows[-1]["limit"] = LIMITS[tolerance]
    seconds, memory, printed = run_golf("prove", str(options.model), "--data", str(text), "--json")
    small = text.with_name("small.txt")
    small.write_bytes(text.read_bytes()[: len(text.read_bytes()) // 3])
    _, small_memory, _ = run_golf("prove", str(options.model), "--data", str(small), "--json")
    proof = json.loads(printed)
    del proof["data"]  # a file of this bench
    return {"rows": rows, "proof": proof, "seconds": seconds, "memory": memory, "memory_of_a_third": small_memory}


def print_overhead(found: Rows) -> None:
    print(f"{'tolerance':>10} {'proved_bpb':>11} {'val_bpb':>9} {'overhead':>9} {'limit':>7}")
    for r in found["rows"]:
        val = r["val_bpb_same_windows"]
        print(f"{r['tolerance']:10.0e} {r['proved_bpb']:11.5f} {val:9.5f} {r['overhead']:9.3%} {r['limit']:7.1%}")
    proof = found["proof"]
    kilo = [proof[f"{what}_bytes_per_second"] / 1000 for what in ("score", "encode", "decode")]
    print(f"proof of {proof['text_bytes']:,} bytes, {proof['lanes']} lanes: {proof['file_bytes']:,} bytes; ", end="")
    print(f"score {kilo[0]:.1f} kB/s, encode {kilo[1]:.1f} kB/s, decode {kilo[2]:.1f} kB/s")
    mib = [found[key] / 2**20 for key in ("memory_of_a_third", "memory")]
    print(f"largest process: {mib[0]:.0f} MiB for a third of the text, {mib[1]:.0f} MiB for all")


def differences(options: argparse.Namespace, text: Path) -> Rows:
    """Log-odds of the same decisions, computed in two ways each."""
    loaded = TextModel(options.model, device="cpu")
    seq_len, threads = loaded.seq_len, torch.get_num_threads()
    rows = max(2, options.difference_tokens // seq_len)
    tokens = loaded.tokenizer.encode_documents([text.read_bytes()[: 8 * rows * seq_len]])[: rows * seq_len + 1]
    many, largest = min(64, len(tokens) // seq_len), {}
    levels = loaded.ngram.levels
    one_batch = windows_of(loaded.model, levels, tokens, seq_len, many)
    for name, other in ways(loaded.model, levels, tokens, seq_len, many).items():
        print(f"  {name} ...", file=sys.stderr, flush=True)
        largest[name] = float(np.abs(other() - one_batch).max())
        torch.set_num_threads(threads)
    return {"tokens": len(tokens) - 1, "threads": threads, "default": TOLERANCE, "largest": largest}


def windows_of(model: GPT, levels: Levels, tokens: np.ndarray, seq_len: int, rows: int) -> np.ndarray:
    """(decisions,) log-odds by whole windows, each with a cache of its own, `rows` at once; what the coder treats as
    equal is equal."""
    whole, found, done = plan(len(tokens), seq_len, seq_len), [], 0
    caches, lane_of = Caches(levels, int(tokens[0]), tokens[:-1:seq_len].tolist()), np.arange(len(tokens)) // seq_len
    with evaluating(model, seq_len), exact_arithmetic():
        for _, hidden, truth in window_batches(model, tokens, whole, (rows, seq_len)):
            mix = caches.mixer(lane_of[done : done + len(truth)], truth.numpy())
            found.append(seen(path_log_odds(model, hidden, truth, mix)))
            done += len(truth)
    return np.concatenate(found)


def seen(log_odds: np.ndarray) -> np.ndarray:
    return np.clip(log_odds, -LIMIT, LIMIT)


def token_by_token(model: GPT, levels: Levels, tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """The same by the decoder's path, a window a lane."""
    rows = np.stack([tokens[at : at + seq_len + 1] for at in range(0, len(tokens) - 1, seq_len)]).astype(np.int64)
    stepper, found = Stepper(model, rows[:, 0], seq_len=seq_len), []
    caches = Caches(levels, int(tokens[0]), rows[:, 0].tolist())
    with evaluating(model, seq_len), exact_arithmetic():
        for column in rows.T[1:]:
            truth = torch.from_numpy(column.copy())
            found.append(seen(coder.path_log_odds(stepper.logits(), truth, caches.mixture())))
            caches.give(column.tolist())
            stepper.append(column)
    return np.stack(found, axis=1).reshape(len(tokens) - 1, -1)


def ways(
    model: GPT, levels: Levels, tokens: np.ndarray, seq_len: int, many: int
) -> dict[str, Callable[[], np.ndarray]]:
    """Other computations of the same log-odds, to be held against whole windows in one large batch."""

    def one_thread_only() -> np.ndarray:
        torch.set_num_threads(1)
        return windows_of(model, levels, tokens, seq_len, many)

    def compiled() -> np.ndarray:
        other = copy.deepcopy(model)
        other.compile_regions()
        return windows_of(other, levels, tokens, seq_len, many)

    def double() -> np.ndarray:
        other = copy.deepcopy(model).double()
        other.compute_dtype = torch.float64
        return windows_of(other, levels, tokens, seq_len, many)

    def cached_on_one_thread() -> np.ndarray:
        torch.set_num_threads(1)
        return token_by_token(model, levels, tokens, seq_len)

    return {
        f"{torch.get_num_threads()} threads / 1 thread": one_thread_only,
        f"batch {many} / 1": lambda: windows_of(model, levels, tokens, seq_len, 1),
        "eager / compiled": compiled,
        "float32 / float64": double,
        "batched / KV cache, 1 thread": cached_on_one_thread,
    }


def print_differences(found: Rows) -> None:
    print(f"largest difference of log-odds over {found['tokens']:,} tokens (default tolerance {found['default']:.0e})")
    for name, value in found["largest"].items():
        print(f"  {name:30} {value:9.2e}   tolerance is {found['default'] / max(value, 1e-12):8.1f} times that")


def files(options: argparse.Namespace, text: Path) -> Rows:
    """compress and decompress, of the text and of `--whole` times as much, that also with `--stride`."""
    more = text.with_name("whole.txt")
    more.write_bytes(validation_text(options, options.whole * text.stat().st_size))
    rows = [there_and_back(options.model, text, 0), there_and_back(options.model, more, 0)]
    if options.stride:
        rows.append(there_and_back(options.model, more, options.stride))
    return {"model_bytes": options.model.stat().st_size, "rows": rows}


def there_and_back(model: Path, source: Path, stride: int) -> Rows:
    packed, back = source.with_suffix(".gtx"), source.with_suffix(".back")
    there = run_golf("compress", str(source), "-m", str(model), "--stride", str(stride), "-o", str(packed))
    again = run_golf("decompress", str(packed), "-m", str(model), "-o", str(back))
    if back.read_bytes() != source.read_bytes():
        raise RuntimeError(f"{source} did not come back")
    size, small = source.stat().st_size, packed.stat().st_size
    packed.unlink()
    back.unlink()
    return {
        "stride": stride, "bytes": size, "packed": small, "encode": size / there[0], "encode_memory": there[1],
        "decode": size / again[0], "decode_memory": again[1],
        "peers": {peer: int(row["bytes"]) for peer, row in compress_peers(source, source.stat().st_size).items()},
    }  # fmt: skip


def print_files(found: Rows) -> None:
    print(f"golf compress and decompress; model.golf ({found['model_bytes']:,} bytes) is not counted")
    for row in found["rows"]:
        size = row["bytes"]
        print(f"  {size:,} bytes, stride {row['stride'] or 'of the window'}: {row['packed']:,}", end="")
        print(f" ({8 * row['packed'] / size:.4f} bits per byte)", end="")
        for what in ("encode", "decode"):
            print(f"; {what} {row[what] / 1000:.1f} kB/s, {row[f'{what}_memory'] / 2**20:.0f} MiB", end="")
        print()
        for peer, packed in row["peers"].items():
            print(f"    {peer:24} {packed:10,} {8 * packed / size:8.4f}   ours is {row['packed'] / packed - 1:+.1%}")


def full(options: argparse.Namespace, text: Path) -> Rows:
    """Two frames of a full-size model, decoded by as many processes as the machine has processors."""
    recipe = load_recipe("baseline", FULL)
    raw = text.read_bytes()[: 400_000 if not options.quick else 40_000]
    tokenizer = train_bpe([raw], recipe.data.vocab_size)
    model = GPT(recipe.model, tokenizer.vocab_size)
    model.init_weights(0)
    path = text.with_name("full.golf")
    pack_model(model.state_dict(), recipe, tokenizer.compact(), path, tokenizer.vocab_size)
    loaded = TextModel(path, device="cpu")
    header, workers = loaded.header(Content.FILE), default_workers()
    lanes = loaded.lanes(1 << 19)
    each = min(len(raw) // (workers * lanes), 4 * loaded.seq_len // 2)  # bytes of a lane: most of a window
    frames, began = [], time.monotonic()
    for index in range(workers):
        whole = raw[index * lanes * each : (index + 1) * lanes * each]
        tokens = [tokenizer.encode_documents([piece]) for piece in cut_evenly(whole, lanes, tokenizer)]
        starts = tuple(int(s) for s in np.cumsum([0, *map(len, tokens)])[:-1])
        payload, _ = encode_lanes(whole, header, loaded, np.concatenate(tokens), starts)
        frames.append(Frame(Kind.MODEL, len(whole), zlib.crc32(whole), payload))
    encoded = time.monotonic() - began
    began = time.monotonic()
    with one_thread():
        size = sum(len(back) for _, back in Crew(header, lambda: loaded, workers).run(iter(frames)))
    seconds = time.monotonic() - began
    params = sum(p.numel() for p in model.parameters())
    return {"params": params, "bytes": size, "lanes": lanes, "encode": size / encoded, "decode": size / seconds}


def print_full(found: Rows) -> None:
    print(f"{found['params'] / 1e6:.1f} M parameters, windows of 1,024, {found['lanes']} lanes a frame: ", end="")
    print(f"encode {found['encode'] / 1000:.2f} kB/s, decode {found['decode'] / 1000:.2f} kB/s (limit 1.5)")


def zeros(options: argparse.Namespace, text: Path) -> Rows:
    """A sparse file of zeros there and back."""
    size = 10**6 if options.quick else 10**9
    source, packed = text.with_name("zeros"), text.with_name("zeros.gtx")
    with source.open("wb") as stream:
        stream.truncate(size)
    there = run_golf("compress", "-m", str(options.model), stdin=source, stdout=packed)
    back = run_golf("decompress", "-m", str(options.model), stdin=packed, stdout=Path(os.devnull))
    memory = max(there[1], back[1])
    return {"bytes": size, "packed": packed.stat().st_size, "seconds": [there[0], back[0]], "memory": memory}


def print_zeros(found: Rows) -> None:
    there, back = found["seconds"]
    print(
        f"{found['bytes']:,} zeros to {found['packed']:,} bytes in {there:.1f} s (limit 120), back in {back:.1f} s, ",
        end="",
    )
    print(f"{found['memory'] / 2**20:.0f} MiB")


def validation_text(options: argparse.Namespace, size: int) -> bytes:
    """The first `size` bytes of the validation text, whole lines."""
    path = options.data or val_text()
    with lzma.open(path) if str(path).endswith(".xz") else Path(path).open("rb") as stream:
        data = stream.read(size)
    return data[: data.rfind(b"\n") + 1] or data


SECTIONS = {
    "overhead": (overhead, print_overhead),
    "differences": (differences, print_differences),
    "files": (files, print_files),
    "full": (full, print_full),
    "zeros": (zeros, print_zeros),
}


def measured(options: argparse.Namespace, text: Path) -> Iterator[tuple[str, Rows]]:
    for name in options.only.split(",") if options.only else SECTIONS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        yield name, SECTIONS[name][0](options, text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.prove", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a model.golf, made by `golf run pocket`")
    parser.add_argument("--json", type=Path, default=Path("results/prove.json"))
    parser.add_argument("--data", type=Path, help="a text file, .xz or not; default: the shared validation text")
    parser.add_argument("--bytes", type=int, default=1_000_000)
    parser.add_argument("--whole", type=int, default=4, help="`files` also takes so many times the text")
    parser.add_argument("--stride", type=int, default=0, help="`files` also compresses with this one")
    parser.add_argument("--difference-tokens", type=int, default=16_384)
    parser.add_argument("--only", default="", help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="small full-size and zeros parts, to see that it works")
    options = parser.parse_args()
    kept: Rows = json.loads(options.json.read_text()) if options.json.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        options.model = Path(shutil.copy(options.model, Path(folder, "model.golf")))  # away from any run's record
        text = Path(folder, "text.txt")
        text.write_bytes(validation_text(options, options.bytes))
        for name, found in measured(options, text):
            kept[name] = found | {"machine": environment(), "model_sha256": TextModel(options.model).sha256}
            atomic_write(options.json, json.dumps(kept, indent=1).encode() + b"\n")
    for name, (_, show) in SECTIONS.items():
        if name in kept:
            show(kept[name])


if __name__ == "__main__":
    main()
