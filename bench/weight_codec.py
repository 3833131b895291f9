"""The weight codec against general compressors: python -m bench.weight_codec --json FILE [--payloads G,T,S,trained].

G, T, S: 21,233,664 synthetic weights each (PARAMGOLF_SHARED/tools/weight_payloads.py; equivalent ones are made here
where that is absent). `trained`: a small GPT trained on the spot, on two grids (R-max, R-k), every coder given the same
integers; `with-scales` is our codec with the row scales known, as in an artifact. Every coding is decoded and compared.
Peers: one byte a weight, strongest setting, as stored and with each tensor transposed (-T); lrzip -z where installed.

Each result is written when it is there, and the same command goes on where a stopped one ended. On one quiet core the
whole takes about 45 minutes (brotli-11 and lrzip -z most of it; --jobs 2 halves it: ours is measured alone, then the
peers side by side, each on a core of its own); --quick takes two and the time of the training, which --weights FILE
keeps for the next run.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

import numpy as np

from bench import weight_trained
from bench.weight_coders import OURS, PEERS, Arrays, flat, installed, measure, save
from paramgolf.files import atomic_write

SHAPES = [("q", 512, 512), ("k", 256, 512), ("v", 256, 512), ("o", 512, 512), ("up", 1536, 512), ("down", 512, 1536)]
QUICK = (*OURS, "zlib-9", "zlib-9-T")
STRONG = ("zstd-22", "lzma-9e", "brotli-11")  # a margin over the best of these, in both orientations, is asked for
LIMIT_SECONDS = 1200.0  # for one coder on one payload


def made_here(kind: str) -> tuple[Arrays, float]:
    """Payloads with the distributions of weight_payloads.py, and the bytes of the code that knows every scale."""
    from scipy import stats

    rng = np.random.default_rng([7, ord(kind)])
    known = stats.norm() if kind == "G" else stats.t(6)
    out, bits = [], 0.0
    for layer in range(9):
        for role, rows, columns in SHAPES:
            spread = 0.0 if kind == "G" else 0.25
            column = np.exp(spread * rng.standard_normal(columns))
            noise = rng.standard_normal((rows, columns)) if kind == "G" else rng.standard_t(6, (rows, columns))
            w = noise * column
            top = 12.85 * w.std(1, keepdims=True) if kind == "S" else np.abs(w).max(1, keepdims=True)
            q = np.clip(np.rint(w / (top / 31)), -31, 31).astype(np.int8)
            scale = column[None, :] * 31 / top
            low, high = known.cdf((q - 0.5) / scale), known.cdf((q + 0.5) / scale)
            low[q == -31], high[q == 31] = 0.0, 1.0
            bits -= float(np.log2(np.maximum(high - low, 1e-300)).sum())
            out.append((f"layer{layer}.{role}", q))
    return out, bits / 8


def synthetic(kind: str) -> tuple[Arrays, float, str]:
    """(tensors, ideal bytes, origin)."""
    path = Path(os.environ.get("PARAMGOLF_SHARED", "")) / "tools" / "weight_payloads.py"
    if os.environ.get("PARAMGOLF_SHARED") and path.is_file():
        spec = importlib.util.spec_from_file_location("weight_payloads", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.payload(kind), float(module.ideal_bytes(kind)), "weight_payloads.py"
    arrays, ideal = made_here(kind)
    return arrays, ideal, "made here (PARAMGOLF_SHARED has no tools/weight_payloads.py)"


def zero_order(arrays: Arrays) -> float:
    """Bytes of one histogram a tensor, tables not counted."""
    bits = 0.0
    for _, q in arrays:
        n = np.bincount(q.ravel().astype(np.int64) + 128)
        n = n[n > 0]
        bits -= float((n * np.log2(n / q.size)).sum())
    return bits / 8


def payloads(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What `--payloads` names: name, tensors, ideal bytes, origin, row scales, what else is to be told."""
    for kind in arguments.payloads.split(","):
        if kind == "trained":
            weights, note = weight_trained.trained(arguments.steps, arguments.weights)
            for name, grid in weight_trained.GRIDS.items():
                coded = weight_trained.quantised(weights, grid)
                yield {
                    "name": name, "arrays": [(n, q) for n, q, _ in coded], "ideal": None, "note": note,
                    "scales": [s for _, _, s in coded], "row_scales": weight_trained.scale_bytes(weights, grid),
                }  # fmt: skip
        elif kind in ("G", "T", "S"):
            arrays, ideal, origin = synthetic(kind)
            if arguments.tensors:
                arrays, ideal = arrays[: arguments.tensors], 0.0
            yield {"name": kind, "arrays": arrays, "ideal": ideal or None, "note": origin, "scales": None}
        else:
            raise SystemExit(f"no payload '{kind}'; known: G, T, S, trained")


class Results:
    """The JSON file: read at the start, written after every measurement."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.payloads: dict[str, dict[str, Any]] = {}
        if path is not None and path.is_file():
            before = json.loads(path.read_text())
            if before.get("versions") == versions():
                self.payloads = {p["name"]: p for p in before["payloads"]}

    def begin(self, payload: dict[str, Any]) -> dict[str, Any]:
        """The entry of a payload; what was measured on other bytes is dropped."""
        plain = flat(payload["arrays"], False)
        digest = hashlib.sha256(plain).hexdigest()
        before = self.payloads.get(payload["name"], {})
        coders = before.get("coders", {}) if before.get("sha256") == digest else {}
        limits = {"zero_order_per_tensor": round(zero_order(payload["arrays"])), "six_bit_packing": len(plain) * 6 // 8}
        entry = {
            "name": payload["name"], "weights": len(plain), "sha256": digest, "note": payload["note"],
            "ideal": None if payload["ideal"] is None else round(payload["ideal"]),
            "coders": coders, "limits": limits,
        }  # fmt: skip
        if "row_scales" in payload:
            entry["row_scales"] = payload["row_scales"]
        self.payloads[payload["name"]] = entry
        return entry

    def write(self) -> None:
        if self.path is None:
            return
        words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
        command = " ".join(["python -m bench.weight_codec", *words])
        report = {"command": command, "versions": versions(), "payloads": list(self.payloads.values())}
        atomic_write(self.path, (json.dumps(report, indent=1) + "\n").encode())


def bench(payload: dict[str, Any], wanted: list[str], results: Results, keep: Path | None, jobs: int) -> None:
    entry = results.begin(payload)
    coders = entry["coders"]
    todo = [n for n in wanted if n not in coders and (n != "with-scales" or payload["scales"] is not None)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "payload.npz")
        save(file, payload["arrays"], payload["scales"])

        cores: SimpleQueue[int] = SimpleQueue()
        for core in range(jobs):
            cores.put(core)
        writing = Lock()

        def one(name: str) -> None:
            core = cores.get()
            found = measure(name, file, LIMIT_SECONDS, core)
            cores.put(core)
            with writing:
                coders[name] = found
                results.write()
            said = f"{found['bytes']:,}" if "bytes" in found else "stopped"
            print(f"  {payload['name']} {name}: {said}", file=sys.stderr, flush=True)

        for name in [name for name in todo if name in OURS]:
            one(name)
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(one, [name for name in todo if name not in OURS]))
    entry["coders"] = {name: coders[name] for name in (*OURS, *PEERS) if name in coders}
    results.write()
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        atomic_write(keep / f"{payload['name']}.raw", flat(payload["arrays"], False))


def table(results: list[dict[str, Any]]) -> str:
    lines = [f"{'':26}{'bytes':>12}{'encode':>12}{'decode':>12}{'memory':>12}"]
    for r in results:
        lines.append(f"\n{r['name']}: {r['weights']:,} weights ({r['note']})")
        limits = {**r["limits"], **({} if r["ideal"] is None else {"known-scale ideal": r["ideal"]})}
        lines += [f"  {n:<24}{b:>12,}" for n, b in limits.items()]
        for n, c in r["coders"].items():
            if "bytes" not in c:
                lines.append(f"  {n:<24}{'stopped':>12} after {c['stopped_after']:.0f} s")
                continue
            memory = f"{c['peak_bytes'] / 1e6:>9.0f} MB"
            lines.append(f"  {n:<24}{c['bytes']:>12,}{c['encode_s']:>10.2f} s{c['decode_s']:>10.2f} s{memory}")
        lines += verdict(r)
    return "\n".join(lines)


def verdict(r: dict[str, Any]) -> list[str]:
    """Our size against the best peer, the best of STRONG and the ideal."""
    sizes = {n: c["bytes"] for n, c in r["coders"].items() if "bytes" in c}
    ours, lines = sizes.get("ours"), []
    if ours is None:
        return []
    others = {n: b for n, b in sizes.items() if n not in OURS}
    for what, pool in (("every peer", others), ("zstd, brotli, lzma", {n: others[n] for n in others if strong(n)})):
        if pool:
            best = min(pool, key=lambda n: pool[n])
            lines.append(f"  ours: {100 * (1 - ours / pool[best]):+.2f} % below the best of {what} ({best})")
    if r["ideal"] is not None:
        lines.append(
            f"  ours: {100 * (ours / r['ideal'] - 1):+.3f} % from the known-scale ideal, {ours - r['ideal']:,} B"
        )
    for bits, found in r.get("row_scales", {}).items():
        lines.append(f"  row scales, {bits} mantissa bits: {found['bytes']:,} B, squared error x {found['error']:.4f}")
    return lines


def strong(name: str) -> bool:
    return name.removesuffix("-T") in STRONG


def versions() -> dict[str, str]:
    names = ("numpy", "brotli", "zstandard", "torch")
    found = {n: importlib.metadata.version(n) for n in names if importlib.util.find_spec(n)}
    found |= {"python": platform.python_version(), "zlib": zlib.ZLIB_RUNTIME_VERSION, "machine": platform.machine()}
    if shutil.which("lrzip"):
        text = subprocess.run(["lrzip", "-V"], capture_output=True, text=True, check=False)
        found["lrzip"] = (text.stdout + text.stderr).strip()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="results; a run goes on with what this file has of the same payloads")
    parser.add_argument("--keep", type=Path, help="write every payload raw into this folder")
    parser.add_argument("--payloads", default="G,T,S,trained")
    parser.add_argument("--quick", action="store_true", help="ours and zlib only")
    parser.add_argument("--coders", help="only these")
    parser.add_argument("--jobs", type=int, default=1, help="peers measured at once")
    parser.add_argument("--tensors", type=int, default=0, help="only the first tensors of G, T, S, to try the bench")
    parser.add_argument("--steps", type=int, default=160, help="training steps of the trained payload")
    parser.add_argument("--weights", type=Path, help="keep the trained weights in this .npz and reuse them")
    arguments = parser.parse_args()
    wanted = list(QUICK if arguments.quick else (*OURS, *PEERS))
    if arguments.coders:
        wanted = arguments.coders.split(",")
    for name in [name for name in wanted if not installed(name)]:
        print(f"  {name} is not installed here", file=sys.stderr)
        wanted.remove(name)
    results = Results(arguments.json)
    named = []
    for payload in payloads(arguments):
        bench(payload, wanted, results, arguments.keep, arguments.jobs)
        named.append(payload["name"])
    print(table([results.payloads[name] for name in named]))


if __name__ == "__main__":
    main()
