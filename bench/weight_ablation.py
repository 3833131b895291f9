"""What each part of the weight codec is worth: python -m bench.weight_ablation --json FILE [--payloads T,trained].

Every row is the codec with one part taken away (or put out of work), on the payloads of bench/weight_codec.py, decoded
and compared; bytes are those of the integers with all side data. The last rows are the row scales of the trained model,
and what coarser scales would cost and save. A minute for a payload of the synthetic ones, seconds for the trained one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from bench.weight_codec import payloads, versions
from paramgolf.files import atomic_write
from paramgolf.pack.codecs import rans_classes, rans_fit, rans_lanes
from paramgolf.pack.codecs.base import CodeSpec, CodeTensor
from paramgolf.pack.codecs.rans import RansCodec
from paramgolf.pack.codecs.rans_layout import View, remember
from paramgolf.pack.codecs.rans_side import Predictor, Sources, choose, predict

Fit = Callable[[View, rans_fit.Matrix, np.ndarray, Sources, int], None]
GAUSS = 0  # index of the Gaussian among the starting shapes


def without_classes(axis: int) -> Fit:
    """`rans_classes._fit_view` with one class for a whole axis."""

    def fit_view(view: View, matrix: rans_fit.Matrix, costs: np.ndarray, sources: Sources, reach: int) -> None:
        for now in (0, 1):
            own, live = (matrix.row, matrix.column)[now], view.live[now]
            if now == axis:
                own[:] = round(float(own.mean()))
                view.predictors[now] = Predictor(int(own[0]))
            else:
                known = sources.known(view.scale if now == 0 else None, (view.rows, view.columns)[now])
                found = choose((matrix.fine_row, matrix.fine_column)[now], live, known)
                view.predictors[now] = found
                rans_fit.refine(matrix, costs, now, predict(found, known, len(live))[live], reach)
            view.classes[now] = (matrix.row, matrix.column)[now]
            remember(sources, view, now)

    return fit_view


def alone(fine: np.ndarray, live: np.ndarray, sources: list[np.ndarray]) -> Predictor:
    """A vector without a look at those before it."""
    return Predictor(round(float(fine.mean())))


def gaussian(counts: np.ndarray, low: int, high: int, strengths: list[int]) -> tuple[float, int, int]:
    classes = np.flatnonzero(counts.sum(1))
    prior = rans_fit.shape_masses(GAUSS, low, high)[classes]
    seen = counts[classes, low + 128 : high + 129]
    bits, k = min((rans_fit.evidence_bits(seen, prior, s), k) for k, s in enumerate(strengths))
    return bits, GAUSS, k


PARTS: dict[str, Callable[[], Any]] = {
    "everything": nullcontext,
    "no column classes": lambda: patch.object(rans_classes, "_fit_view", without_classes(1)),
    "no row classes": lambda: patch.object(rans_classes, "_fit_view", without_classes(0)),
    "vectors not predicted from others": lambda: patch.object(rans_classes, "choose", alone),
    "one set of tables": lambda: patch.object(rans_classes, "MOST_GROUPS", 1),
    "tables start Gaussian": lambda: patch.object(rans_fit, "best_shape", gaussian),
    "tables do not learn": lambda: patch.object(rans_lanes.Tables, "add", lambda self, ids: None),
    "no common directions": lambda: patch.object(rans_classes, "find", lambda piece: []),
}


def measure(tensors: list[CodeTensor]) -> dict[str, Any]:
    codec, began = RansCodec(), time.perf_counter()
    coded = codec.encode(tensors)
    seconds = time.perf_counter() - began
    back = codec.decode(coded, [t.spec for t in tensors])
    if not all(np.array_equal(b, t.codes) for b, t in zip(back, tensors, strict=True)):
        raise SystemExit("the codec does not give its input back")
    return {"bytes": len(coded), "encode_s": round(seconds, 2)}


def variants(payload: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    arrays, scales = payload["arrays"], payload["scales"]
    known = scales or [None] * len(arrays)
    tensors = [CodeTensor(CodeSpec(n, q.shape, 6, scale=s), q) for (n, q), s in zip(arrays, known, strict=True)]
    for name, part in PARTS.items():
        with part():
            yield name, measure(tensors)
    if scales is not None:
        yield "row scales not known", measure([CodeTensor(CodeSpec(n, q.shape, 6), q) for n, q in arrays])


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, result in results.items():
        base = result["parts"]["everything"]["bytes"]
        lines.append(f"\n{name}: {result['weights']:,} weights ({result['note']})")
        for part, found in result["parts"].items():
            more = 100 * (found["bytes"] / base - 1)
            lines.append(f"  {part:<36}{found['bytes']:>12,}{more:>+9.3f} %{found['encode_s']:>8.2f} s")
        whole = result.get("row_scales", {}).get("10", {}).get("bytes", 0)
        for bits, found in result.get("row_scales", {}).items():
            saved = f"{whole - found['bytes']:>8,} saved" if bits != "10" else ""
            what = f"row scales of {bits} mantissa bits"
            lines.append(f"  {what:<36}{found['bytes']:>12,}  squared error x {found['error']:.4f} {saved}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--payloads", default="T,trained")
    parser.add_argument("--tensors", type=int, default=0, help="only the first tensors of G, T, S, to try the bench")
    parser.add_argument("--steps", type=int, default=160, help="training steps of the trained payload")
    parser.add_argument("--weights", type=Path, help="keep the trained weights in this .npz and reuse them")
    arguments = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for payload in payloads(arguments):
        entry: dict[str, Any] = {"weights": sum(q.size for _, q in payload["arrays"]), "note": payload["note"]}
        entry["parts"] = dict(variants(payload))
        if "row_scales" in payload:
            entry["row_scales"] = payload["row_scales"]
        results[payload["name"]] = entry
    print(table(results))
    if arguments.json:
        text = json.dumps({"versions": versions(), "payloads": results}, indent=1)
        atomic_write(arguments.json, (text + "\n").encode())


if __name__ == "__main__":
    main()
