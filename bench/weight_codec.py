"""The weight codec against general compressors: python -m bench.weight_codec --json FILE [--payloads G,T,S,trained].

G, T, S: 21,233,664 synthetic weights each (PARAMGOLF_SHARED/tools/weight_payloads.py; equivalent ones are made here
where that is absent). `trained`: a small GPT trained on the spot, on two grids (R-max, R-k), every coder given the same
integers; its `ours` also gets the row scales, as in an artifact, under the variant "with-scales". Every coding is
decoded and compared. Peers: one byte a weight, strongest setting; T = each tensor transposed; lrzip -z where installed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import lzma
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench import weight_trained
from paramgolf.files import atomic_write
from paramgolf.pack.codecs.base import CodeSpec, CodeTensor
from paramgolf.pack.codecs.rans import RansCodec, decode_ints, encode_ints

Arrays = list[tuple[str, np.ndarray]]
Coder = tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]

SHAPES = [("q", 512, 512), ("k", 256, 512), ("v", 256, 512), ("o", 512, 512), ("up", 1536, 512), ("down", 512, 1536)]


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


def peers() -> dict[str, Coder]:
    """name -> (compress, expand) of the general compressors, strongest settings."""
    import brotli
    import zstandard

    extreme = 9 | lzma.PRESET_EXTREME
    return {
        "zlib-9": (lambda b: zlib.compress(b, 9), zlib.decompress),
        "zstd-22": (
            lambda b: zstandard.ZstdCompressor(level=22).compress(b),
            lambda b: zstandard.ZstdDecompressor().decompress(b),
        ),
        "lzma-9e": (lambda b: lzma.compress(b, preset=extreme), lzma.decompress),
        "brotli-11": (lambda b: brotli.compress(b, quality=11, lgwin=24), brotli.decompress),
    }


def lrzip(flag: str, data: bytes) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in"), Path(folder, "out")
        source.write_bytes(data)
        arguments = ["lrzip", "-q", "-f", *flag.split(), "-o", str(target), str(source)]
        subprocess.run(arguments, check=True, capture_output=True)
        return target.read_bytes()


def measure(name: str, payload: bytes, coder: Coder) -> tuple[dict[str, float], bytes]:
    began = time.perf_counter()
    coded = coder[0](payload)
    middle = time.perf_counter()
    back = coder[1](coded)
    seconds = time.perf_counter() - middle
    if back != payload:
        raise SystemExit(f"{name} does not give its input back")
    return {"bytes": len(coded), "encode_s": round(middle - began, 3), "decode_s": round(seconds, 3)}, coded


def zero_order(arrays: Arrays) -> float:
    """Bytes of one histogram a tensor, tables not counted."""
    bits = 0.0
    for _, q in arrays:
        n = np.bincount(q.ravel().astype(np.int64) + 128)
        n = n[n > 0]
        bits -= float((n * np.log2(n / q.size)).sum())
    return bits / 8


def ours(arrays: Arrays, limit: int) -> tuple[dict[str, float], bytes]:
    began = time.perf_counter()
    coded = encode_ints([(name, q, limit) for name, q in arrays])
    middle = time.perf_counter()
    back = decode_ints(coded, [q.shape for _, q in arrays])
    seconds = time.perf_counter() - middle
    if not all(np.array_equal(b, q) for b, (_, q) in zip(back, arrays, strict=True)):
        raise SystemExit("our codec does not give its input back")
    return {"bytes": len(coded), "encode_s": round(middle - began, 3), "decode_s": round(seconds, 3)}, coded


def with_scales(arrays: Arrays, scales: list[np.ndarray]) -> dict[str, float]:
    """Our codec as an artifact uses it: the decoder has the row scales already."""
    specs = [CodeSpec(name, q.shape, 6, scale=s) for (name, q), s in zip(arrays, scales, strict=True)]
    began = time.perf_counter()
    coded = RansCodec().encode([CodeTensor(spec, q) for spec, (_, q) in zip(specs, arrays, strict=True)])
    middle = time.perf_counter()
    back = RansCodec().decode(coded, specs)
    seconds = time.perf_counter() - middle
    if not all(np.array_equal(b, q) for b, (_, q) in zip(back, arrays, strict=True)):
        raise SystemExit("our codec does not give its input back")
    return {"bytes": len(coded), "encode_s": round(middle - began, 3), "decode_s": round(seconds, 3)}


PEERS = ("zlib-9", "zstd-22", "lzma-9e", "brotli-11", "brotli-11-T", "lrzip-z", "lrzip-z-T")
MORE = ("zlib-9-T", "zstd-22-T", "lzma-9e-T")
QUICK = ("ours", "with-scales", "zlib-9")


def general(name: str) -> Coder | None:
    """The compressor called `name` (without the -T of a transposed payload); None where it is not installed."""
    if name == "lrzip-z":
        if not shutil.which("lrzip"):
            return None
        return (lambda b: lrzip("-z -L 9", b)), (lambda b: lrzip("-d", b))
    return peers()[name]


def bench(
    name: str, arrays: Arrays, ideal: float | None, note: str, wanted: tuple[str, ...], keep: Path | None,
    scales: list[np.ndarray] | None, before: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """One payload; `before` holds what an earlier, partial run measured on it."""
    plain = b"".join(q.tobytes() for _, q in arrays)
    turned = b"".join(np.ascontiguousarray(q.T).tobytes() for _, q in arrays)
    coders, variants = dict(before.get("coders", {})), dict(before.get("variants", {}))
    if "ours" in wanted or keep is not None:
        coders["ours"], coded = ours(arrays, 31)
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            atomic_write(keep / f"{name}.raw", plain)
            atomic_write(keep / f"{name}.rans", coded)
    if "with-scales" in wanted and scales is not None:
        variants["with-scales"] = with_scales(arrays, scales)
    for peer in (*PEERS, *MORE):
        coder = general(peer.removesuffix("-T")) if peer in wanted else None
        if coder is not None:
            place = coders if peer in PEERS else variants
            place[peer] = measure(peer, turned if peer.endswith("-T") else plain, coder)[0]
            print(f"  {name} {peer}: {place[peer]['bytes']:,}", file=sys.stderr, flush=True)
    limits = {"zero_order_per_tensor": round(zero_order(arrays)), "six_bit_packing": len(plain) * 6 // 8}
    return {
        "name": name, "weights": len(plain), "note": note, "ideal": None if ideal is None else round(ideal),
        "coders": coders, "variants": variants, "limits": limits,
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    lines = []
    for r in results:
        if "ours" not in r["coders"] or len(r["coders"]) < 2:
            continue
        best = min((c["bytes"], n) for n, c in {**r["coders"], **r["variants"]}.items() if n not in OURS)
        size = r["coders"]["ours"]["bytes"]
        above = "" if r["ideal"] is None else f", {100 * (size / r['ideal'] - 1):+.3f} % from the known-scale ideal"
        lines.append(f"\n{r['name']}: {r['weights']:,} weights ({r['note']})")
        limits = {**r["limits"], **({} if r["ideal"] is None else {"known-scale ideal": r["ideal"]})}
        lines += [f"  {n:<24}{b:>12,}" for n, b in limits.items()]
        for n, c in {**r["coders"], **r["variants"]}.items():
            lines.append(f"  {n:<24}{c['bytes']:>12,}  {c['encode_s']:>8.2f} s {c['decode_s']:>8.2f} s")
        lines.append(f"  ours: {100 * (1 - size / best[0]):.2f} % below the best peer ({best[1]}){above}")
    return "\n".join(lines)


OURS = ("ours", "with-scales")


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
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="write every payload raw and coded into this folder")
    parser.add_argument("--payloads", default="G,T,S,trained")
    parser.add_argument("--quick", action="store_true", help="ours and zlib only")
    parser.add_argument("--coders", help="only these, added to what the JSON file holds already (the whole takes long)")
    parser.add_argument("--steps", type=int, default=160, help="training steps of the trained payload")
    parser.add_argument("--weights", type=Path, help="keep the trained weights in this .npz and reuse them")
    arguments = parser.parse_args()
    wanted = QUICK if arguments.quick else ("ours", "with-scales", *PEERS, *MORE)
    if arguments.coders:
        wanted = tuple(arguments.coders.split(","))
    done: dict[str, dict[str, Any]] = {}
    if arguments.coders and arguments.json and arguments.json.is_file():
        done = {p["name"]: p for p in json.loads(arguments.json.read_text())["payloads"]}
    for name, arrays, ideal, note, scales in payloads(arguments):
        done[name] = bench(name, arrays, ideal, note, wanted, arguments.keep, scales, done.get(name, {}))
        if arguments.json:
            write(arguments.json, list(done.values()))  # after every payload: the whole bench takes an hour
    print(table(list(done.values())))


def payloads(arguments: argparse.Namespace) -> Iterator[tuple[str, Arrays, float | None, str, list[np.ndarray] | None]]:
    """(name, tensors, ideal bytes, origin, row scales) of what `--payloads` names."""
    for kind in arguments.payloads.split(","):
        if kind == "trained":
            weights, note = weight_trained.trained(arguments.steps, arguments.weights)
            for name, grid in weight_trained.GRIDS.items():
                coded = weight_trained.quantised(weights, grid)
                yield name, [(n, q) for n, q, _ in coded], None, note, [s for _, _, s in coded]
        elif kind in ("G", "T", "S"):
            arrays, ideal, origin = synthetic(kind)
            yield kind, arrays, ideal, origin, None
        else:
            raise SystemExit(f"no payload '{kind}'; known: G, T, S, trained")


def write(path: Path, results: list[dict[str, Any]]) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    command = " ".join(["python -m bench.weight_codec", *words])
    report = {"command": command, "versions": versions(), "peak_bytes": peak, "payloads": results}
    atomic_write(path, (json.dumps(report, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
