"""`python -m tests.parity DIR [--only KIND]`: one row a file, worst error against tolerance; exit 1 on any failure."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

import numpy as np

from tests.parity.harness import Check

# File name prefix -> module of this package. The longest prefix that fits wins.
KINDS = {
    "A_model": "a_model",
    "B_components": "frontier_b_components",
    "B_muon": "b_muon",
    "B_normuon": "b_normuon",
    "C_muon": "frontier_c_muon",
    "C_quant": "c_quant",
    "C_schedule": "frontier_c_schedule",
    "C_statedict": "c_statedict",
    "C_fullsize": "c_fullsize",
    "C_trajectory": "frontier_c_trajectory",
    "D_eval": "d_eval",
    "D_prefix": "d_prefix",
    "D_fullsize": "frontier_d_fullsize",
    "D_quant": "frontier_d_quant",
    "D_statedict": "frontier_d_statedict",
    "E_caseops": "e_caseops",
    "E_schedule": "e_schedule",
    "F_loader": "f_loader",
    "F_ttt": "f_ttt",
    "G_loaders": "g_loaders",
    "G_trajectory": "g_trajectory",
}
# Where a set of files has another form under the same prefix: prefix -> (a key that tells it, module).
OTHER_FORMS = {"A_model": ("stream", "frontier_a_model")}


def kind_of(path: Path) -> str | None:
    fits = [prefix for prefix in KINDS if path.name.startswith(prefix)]
    return max(fits, key=len) if fits else None


def check_file(path: Path) -> list[Check]:
    """All comparisons of one fixture file; an unknown kind is a failed check."""
    kind = kind_of(path)
    if kind is None:
        return [Check("unknown kind of file", float("inf"), 0.0)]
    with np.load(path, allow_pickle=False) as arrays:
        marker, other = OTHER_FORMS.get(kind, ("", ""))
        name = other if marker in arrays.files else KINDS[kind]
        return importlib.import_module(f"tests.parity.{name}").check(path, arrays)


def checked(path: Path) -> list[Check]:
    """`check_file`; an exception is one failed check, and so is a file in which nothing was compared."""
    try:
        checks = check_file(path)
    except Exception as error:  # the files after this one still count
        text = " ".join(str(error).split())
        return [Check(f"{type(error).__name__}: {text}", float("inf"), 0.0)]
    return checks or [Check("nothing compared", float("inf"), 0.0)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="only files whose name starts with this, e.g. A_model")
    options = parser.parse_args()
    paths = sorted(p for p in options.folder.glob("*.npz") if p.name.startswith(options.only))
    if not paths:
        print(f"no .npz file of kind '{options.only or 'any'}' in {options.folder}", file=sys.stderr)
        return 2
    failed = 0
    print(f"{'file':40} {'checks':>6}  {'worst':>10} {'tolerance':>10}  seconds  result")
    for path in paths:
        start = time.monotonic()
        checks = checked(path)
        bad = [c for c in checks if not c.ok]
        top = max(checks, key=lambda c: (not c.ok, c.error / c.tolerance if c.tolerance else c.error))
        failed += bool(bad)
        verdict = "ok" if not bad else f"FAILED {len(bad)}: {bad[0].name}"
        seconds = time.monotonic() - start
        figures = f"{len(checks):6}  {top.error:10.3g} {top.tolerance:10.3g}  {seconds:7.1f}"
        print(f"{path.name:40} {figures}  {verdict}", flush=True)
    print(f"{len(paths) - failed} of {len(paths)} files agree")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
