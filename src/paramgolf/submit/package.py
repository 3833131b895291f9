"""`golf submit`: the official folder of a submission from finished runs: script, logs, JSON and README."""

from __future__ import annotations

import base64
import contextlib
import json
import lzma
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from paramgolf import __version__
from paramgolf.errors import GolfError
from paramgolf.lab.records import identity, modified_ns, read_record, run_folder
from paramgolf.recipe.load import from_table, load_recipe, to_table
from paramgolf.runner.environment import source_sha256
from paramgolf.runner.folder import RunFolder
from paramgolf.runner.form import SHOWN
from paramgolf.script.generate import generate
from paramgolf.submit.render import log_text, readme_text

CAP = 16_000_000  # decimal bytes of code and coded model
_NEEDED = (*SHOWN, "codec", "windows", "val_loss", "val_loss_float")
SCRIPT, READABLE = "train_gpt.py", "train_gpt_readable.py"


@dataclass(frozen=True)
class Author:
    """Who submits, as submission.json names them."""

    name: str
    github_id: str


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its sealed record and its whole recipe as a plain table."""

    folder: RunFolder
    record: dict[str, Any]
    table: dict[str, Any]

    @property
    def seed(self) -> int:
        return int(self.record["seed"])

    @property
    def model_bytes(self) -> int:
        """What the challenge counts of the artifact: everything but the tokenizer."""
        return int(self.record["artifact_bytes"]) - int(self.record["ledger"].get("tokenizer", 0))

    @property
    def score(self) -> tuple[float, float]:
        """(loss in nats a token, bits a byte) of the last, best-informed score: sliding where the recipe slides."""
        record = self.record
        if "val_bpb_sliding" in record:
            return float(record["val_loss_sliding"]), float(record["val_bpb_sliding"])
        return float(record["val_loss"]), float(record["val_bpb"])


def submit(
    paths: Sequence[Path], out: Path, *, author: Author | None = None, name: str = "", compress_code: bool = False
) -> dict[str, Any]:
    """Write the folder `out` and return its facts.

    Raises GolfError when the runs do not belong together, when code and model are over the cap (by how much), or when
    `out` holds something already. Then nothing is written.
    """
    runs = read_runs(paths)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise GolfError(f"--out {out} exists already; choose a new folder")
    recipe = from_table(runs[0].table)
    own = bool(runs[0].record["data"]["tokenizer"].get("reversible"))
    plain = generate(recipe, own_tokenizer=own).encode()
    packed = packed_script(plain)
    code = packed if compress_code else plain
    check_cap(runs, len(code))
    facts = submission_facts(runs, author or known_author(), name or recipe.title or recipe.name, len(code))
    sizes = {"plain": len(plain), "compressed": len(packed), "lines": plain.count(b"\n")}
    files = {SCRIPT: code, "submission.json": json.dumps(facts, indent=2, ensure_ascii=False).encode() + b"\n"}
    if compress_code:
        files[READABLE] = plain
    same_source = all(run.record["sha256"]["source"] == source_sha256() for run in runs)
    files["README.md"] = _utf8(readme_text(runs, facts, sizes, compress_code, same_source))
    for run in runs:
        files[f"train_seed{run.seed}.log"] = _utf8(log_text(run, len(code)))
    write_folder(out, files)
    return {"folder": str(out), "files": sorted(files), "code_bytes": sizes, **facts}


def _utf8(text: str) -> bytes:
    """Of a text with what others wrote in it: half a surrogate pair is spelt out."""
    return text.encode(errors="backslashreplace")


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in the order of their seeds. GolfError unless they are one recipe on one text under different seeds."""
    runs = []
    for path in paths:
        folder = run_folder(path)
        record = read_record(folder, _NEEDED)
        runs.append(Run(folder, record, to_table(load_recipe(str(folder.root / "recipe.toml")))))
    first = runs[0]
    for run in runs[1:]:
        for what, one, other in (
            ("recipe", identity(run.table), identity(first.table)),
            ("data", run.record["data"], first.record["data"]),
        ):
            if one != other:
                raise GolfError(f"{run.folder.root} and {first.folder.root} differ in their {what}: submit them apart")
    seeds = [run.seed for run in runs]
    if len(set(seeds)) != len(seeds):
        raise GolfError(f"seeds {sorted(seeds)}: each seed can be submitted once; leave the copies out")
    return sorted(runs, key=lambda run: run.seed)


def check_cap(runs: Sequence[Run], code_bytes: int) -> None:
    """GolfError when the largest of the runs is over the cap with this code."""
    total = max(run.model_bytes for run in runs) + code_bytes
    if total > CAP:
        raise GolfError(
            f"model and code take {total:,} bytes ({code_bytes:,} of them code), {total - CAP:,} over {CAP:,}; "
            "use --compress-code, or a recipe with a smaller budget.bytes"
        )


def packed_script(plain: bytes) -> bytes:
    """The script as LZMA in base 85 that unpacks and runs itself."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    data = base64.b85encode(lzma.compress(plain, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=filters)).decode()
    head = f"# {len(plain)} bytes of Python, readable in {READABLE}\nimport base64, lzma\n"
    return f'{head}exec(compile(lzma.decompress(base64.b85decode("{data}")), __file__, "exec"))\n'.encode()


def submission_facts(runs: Sequence[Run], author: Author, name: str, code_bytes: int) -> dict[str, Any]:
    """What submission.json says: means over the seeds, each seed, bytes and hardware, all from the records."""
    losses, bpbs = [run.score[0] for run in runs], [run.score[1] for run in runs]
    first, environment = runs[0].record, runs[0].record["environment"]
    world = int(first["training"]["world"])
    written = datetime.fromtimestamp(max(modified_ns(run.folder.record.stat()) for run in runs) / 1e9, UTC)
    facts: dict[str, Any] = {
        "author": author.name,
        "github_id": author.github_id,
        "name": name,
        "blurb": f"{first['recipe']}: {first['params']:,} parameters, codec {first['codec']}; made by paramgolf.",
        "date": f"{written:%Y-%m-%d}",
        "val_loss": round(statistics.fmean(losses), 8),
        "val_bpb": round(statistics.fmean(bpbs), 8),
    }
    if len(runs) > 1:
        facts |= {"val_loss_std": round(statistics.stdev(losses), 8), "val_bpb_std": round(statistics.stdev(bpbs), 8)}
    results = {
        str(run.seed): {
            "val_loss": round(run.score[0], 8),
            "val_bpb": round(run.score[1], 8),
            "artifact_bytes": run.model_bytes,
            "steps": run.record["steps"],
            "step_avg_ms": round(float(run.record["step_ms"]), 2),
        }
        for run in runs
    }
    return facts | {
        "seeds": [run.seed for run in runs],
        "seed_results": results,
        "bytes_total": max(run.model_bytes for run in runs) + code_bytes,
        "bytes_code": code_bytes,
        "model_params": first["params"],
        "hardware": f"{world} x {environment['gpus'][0] if environment['gpus'] else environment['cpu']}",
        "pytorch_version": environment["torch"],
        "paramgolf": __version__,
    }


def known_author(patience: float = 10.0) -> Author:
    """The name that git tells within so many seconds, else "unknown"."""
    name = ""
    if shutil.which("git"):
        with contextlib.suppress(subprocess.SubprocessError):
            done = subprocess.run(
                ["git", "config", "user.name"], capture_output=True, errors="replace", check=False, timeout=patience
            )
            name = done.stdout.strip()
    return Author(name or "unknown", name or "unknown")


def write_folder(out: Path, files: dict[str, bytes]) -> None:
    """All files or none: written beside and renamed."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            for name, data in files.items():
                (made / name).write_bytes(data)
            if out.is_dir():
                out.rmdir()
            made.rename(out)
    except OSError as error:
        raise GolfError(f"cannot write {out}: {error.strerror or error}; choose another --out") from None
