"""`golf verify`: does everything in a run folder still agree with its sealed record?

The seal has no secret in it. It shows that something was changed, not who wrote the record: whoever changes a score
can seal it again. Against that stand the checks on the artifact, and `score_check`, which measures the score anew.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from paramgolf.data.cache import cache_root
from paramgolf.data.dataset import Dataset, prepare
from paramgolf.errors import GolfError
from paramgolf.files import sha256_bytes, sha256_file, user_path
from paramgolf.lab.records import parse_record, read_bytes, recipe_table, run_folder
from paramgolf.pack.container import describe_artifact
from paramgolf.recipe.load import load_recipe
from paramgolf.runner.environment import installed_source, read_source, source_sha256, sources_sha256
from paramgolf.runner.folder import RunFolder
from paramgolf.runner.record import SEAL, canonical

SCORE_TOLERANCE = 1e-4  # BPB: other processors and thread counts round differently
_EXACT = ("scored_tokens", "scored_bytes", "table_bytes")
_SCORES = ("", "_sliding", "_ngram", "_tilt", "_ttt", "_ttt_tilt")
_ROUNDED = tuple(f"val_{what}{kind}" for kind in _SCORES for what in ("loss", "bpb"))


@dataclass(frozen=True)
class Check:
    """One thing looked at. `ok` None = could not be determined, with the reason in `detail`."""

    name: str
    ok: bool | None
    detail: str = ""


@dataclass
class Findings:
    """The checks of one run; `mismatches` is empty if all is well."""

    run: str
    checks: list[Check] = field(default_factory=list)

    @property
    def mismatches(self) -> list[Check]:
        return [check for check in self.checks if check.ok is False]

    def same(self, name: str, recorded: Any, found: Any) -> None:
        equal = type(recorded) is type(found) and recorded == found
        self.checks.append(Check(name, equal, "" if equal else f"recorded {_short(recorded)}, found {_short(found)}"))

    def unknown(self, name: str, why: str) -> None:
        self.checks.append(Check(name, None, why))

    def guard(self, name: str, work: Callable[[], None]) -> None:
        """Do `work`; what it cannot read, or a record without what it needs, is a mismatch under `name`."""
        try:
            work()
        except GolfError as error:
            self.checks.append(Check(name, False, str(error)))
        except KeyError as error:
            self.checks.append(Check(name, False, f"the record has no {error.args[0]}"))
        except (TypeError, AttributeError, ValueError, RecursionError, OverflowError) as error:
            self.checks.append(Check(name, False, f"the record is malformed there ({error})"))

    def as_dict(self) -> dict[str, Any]:
        return {"run": self.run, "ok": not self.mismatches, "checks": [asdict(check) for check in self.checks]}


def verify(
    run: str | Path, *, score: bool = False, data: str | None = None, source: bool = False,
    tolerance: float = SCORE_TOLERANCE,
) -> Findings:  # fmt: skip
    """Check a finished run against its record.

    Args:
        score: also measure the score of `model.golf` again, on the recorded validation text.
        data: where that text lies (a prepared folder or shards); None = the data cache, or the recipe's shards.
        source: a difference between this installation's code and the run's is a mismatch, not a remark.
        tolerance: largest difference of scores in BPB (and nats) that is taken for rounding.

    Raises GolfError when there is no record, or one of a newer format.
    """
    folder = run_folder(Path(run))
    raw = read_bytes(folder.record)
    record = parse_record(raw, folder.record)
    findings = Findings(str(folder.root))
    _check_seal(findings, record, raw)
    recorded = record.get("sha256")
    hashes: dict[str, Any] = recorded if isinstance(recorded, dict) else {}
    findings.guard("sha256 of files", lambda: _check_hashes(findings, hashes, folder))
    findings.guard("recipe", lambda: _check_recipe(findings, record, folder))
    findings.guard("model.golf", lambda: _check_artifact(findings, record, folder))
    findings.guard("data passport", lambda: _check_passport(findings, record, folder))
    findings.guard("source.tar.xz", lambda: _check_code(findings, hashes, folder))
    _check_source(findings, hashes, folder, strict=source)
    if score:
        findings.guard("score", lambda: _check_score(findings, record, folder, data, tolerance))
    return findings


def _check_seal(findings: Findings, record: dict[str, Any], raw: bytes) -> None:
    findings.same("seal of record.json", record.get(SEAL), sha256_bytes(canonical(record)))
    written = json.dumps(record, indent=1, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"
    detail = "" if raw == written else "its bytes are not as golf wrote them: spacing, order or repeated keys differ"
    findings.checks.append(Check("bytes of record.json", raw == written, detail))


def _check_hashes(findings: Findings, hashes: dict[str, Any], folder: RunFolder) -> None:
    for key, path in (
        ("recipe", folder.root / "recipe.toml"), ("train_log", folder.log), ("artifact", folder.artifact)
    ):  # fmt: skip
        found = sha256_file(path) if path.is_file() else "no file"
        findings.same(f"sha256 of {path.name}", hashes.get(key), found)


def _check_recipe(findings: Findings, record: dict[str, Any], folder: RunFolder) -> None:
    table = recipe_table(folder)
    findings.same("recipe name", record["recipe"], table.get("name"))
    findings.same("seed", record["seed"], table.get("train", {}).get("seed"))
    findings.same("byte cap", record["cap_bytes"], table.get("budget", {}).get("bytes"))


def _check_artifact(findings: Findings, record: dict[str, Any], folder: RunFolder) -> None:
    if not folder.artifact.is_file():
        raise GolfError("not there")
    size = folder.artifact.stat().st_size
    findings.same("artifact_bytes", record["artifact_bytes"], size)
    findings.same("sum of the ledger", sum(record["ledger"].values()), size)
    facts = describe_artifact(folder.artifact)
    for name, recorded, found in (
        ("ledger", record["ledger"], facts["ledger"]),
        ("codec", record["codec"], facts["codec"]),
        ("payload_bytes", record["payload_bytes"], facts["payload_bytes"]),
        ("params", record["params"], facts["weights"]),
    ):
        findings.same(name, recorded, found)
    counted = size
    if recipe_table(folder).get("pack", {}).get("count") == "challenge":
        counted += record["code_bytes"] - facts["ledger"].get("tokenizer", 0)
    findings.same("total_bytes", record["total_bytes"], counted)
    if cap := record["cap_bytes"]:
        detail = "" if counted <= cap else f"{counted - cap:,} bytes over the cap of {cap:,}"
        findings.checks.append(Check("within the cap", counted <= cap, detail))


def _check_passport(findings: Findings, record: dict[str, Any], folder: RunFolder) -> None:
    passport = record["data"]
    if folder.data.is_file():
        kept = json.loads(read_bytes(folder.data))
        for part in ("tokenizer", "train", "val"):
            findings.same(f"data.json, {part}", passport[part], kept.get(part))
    else:
        findings.unknown("data.json", "not there; the record has the passport as well")
    train, val = ({shard["sha256"] for shard in passport[side]["shards"]} for side in ("train", "val"))
    shared = len(train & val)
    findings.checks.append(
        Check("no shard in both training and validation", not shared, f"{shared} are" if shared else "")
    )
    leaked = passport["val_documents_in_train"]
    name = "no validation document in training"
    if leaked is None:
        findings.unknown(name, "the passport of shards without documents does not say")
    else:
        findings.checks.append(Check(name, leaked == 0, f"{leaked} are" if leaked else ""))


def _check_code(findings: Findings, hashes: dict[str, Any], folder: RunFolder) -> None:
    """The code kept with the run against the record's hash of the code that ran."""
    if not folder.source.is_file():
        findings.unknown("source.tar.xz", "the folder does not keep the code of the run")
        return
    findings.same("code in source.tar.xz", hashes.get("source"), sources_sha256(read_source(folder.source)))


def _check_source(findings: Findings, hashes: dict[str, Any], folder: RunFolder, *, strict: bool) -> None:
    """The installed code against the run's; which files differ is named where the run kept its own."""
    name = "sha256 of the installed code"
    recorded, here = hashes.get("source"), source_sha256()
    if recorded == here:
        findings.same(name, recorded, here)
        return
    why = f"the run was made by other code ({_short(recorded)}) than this ({_short(here)})"
    with contextlib.suppress(GolfError):
        kept, now = read_source(folder.source), installed_source()
        differ = sorted(f for f in kept.keys() | now.keys() if kept.get(f) != now.get(f))
        why += f"; {len(differ)} files differ: {', '.join(differ[:5])}" + (" ..." if len(differ) > 5 else "")
    if strict:
        findings.checks.append(Check(name, False, why))
    else:
        findings.unknown(name, why)


def _check_score(
    findings: Findings, record: dict[str, Any], folder: RunFolder, data: str | None, tolerance: float
) -> None:
    dataset = _dataset(record, folder, data)
    if dataset is None:
        findings.unknown("score", "the validation text is not in the data cache; name it with --data")
        return
    val = record["data"]["val"]
    before = len(findings.mismatches)
    if val.get("sha256") is not None:
        found = sha256_file(dataset.val_text) if dataset.val_text else None
        findings.same("validation text", val["sha256"], found)
    shards = [sha256_file(path) for path in dataset.val_shards]
    findings.same("validation tokens", [shard["sha256"] for shard in val["shards"]], shards)
    if len(findings.mismatches) > before:
        findings.unknown("score", "not measured on another text than the recorded one")
        return
    results = _measure(record, folder, dataset)
    for key in (key for key in _EXACT if key in record):
        findings.same(key, record[key], results.get(key))
    for key in (key for key in _ROUNDED if key in record):
        difference = results[key] - record[key]
        detail = f"recorded {record[key]:.6f}, measured {results[key]:.6f}"
        findings.checks.append(Check(key, abs(difference) <= tolerance, detail))


def _dataset(record: dict[str, Any], folder: RunFolder, data: str | None) -> Dataset | None:
    passport = record["data"]
    recipe = load_recipe(str(folder.root / "recipe.toml"))
    shards = passport.get("kind") == "shards"
    if data or (shards and recipe.data.train and user_path(recipe.data.train).is_dir()):
        return prepare(recipe.data, data, cache=cache_root())
    cached = cache_root() / str(passport.get("key"))[:20]
    return Dataset.open(cached) if not shards and (cached / "passport.json").is_file() else None


def _measure(record: dict[str, Any], folder: RunFolder, dataset: Dataset) -> dict[str, Any]:
    """The result keys of a run, of the artifact on `dataset`, by the record's own windows."""
    from paramgolf.data.tokenizer import Tokenizer
    from paramgolf.dist import pick_device
    from paramgolf.pack.packer import load_model
    from paramgolf.score.scorer import score
    from paramgolf.score.ttt.scorer import score_adapted

    recipe = load_recipe(str(folder.root / "recipe.toml"))
    loaded = load_model(folder.artifact, pick_device("auto"))
    tokenizer, tokens = Tokenizer.from_compact(loaded.tokenizer), dataset.val_tokens()
    results: dict[str, Any] = {}
    strides = (0, *([record["stride"]] if "val_bpb_sliding" in record else []))
    for stride in strides:
        results |= score(
            loaded.model, tokens, token_bytes=tokenizer.token_bytes, true_bytes=dataset.val_bytes,
            seq_len=record["eval_seq_len"], stride=stride, batch_tokens=recipe.score.batch_tokens,
            windows=record["windows"], lane_count=record["lanes"], bos_id=tokenizer.bos_id,
            ngram=recipe.ngram if stride == strides[-1] else None,
        ).as_dict()  # fmt: skip
    if any(key in record for key in ("val_bpb_ttt", "val_bpb_tilt")):
        results |= score_adapted(
            loaded.model, tokens, recipe.ttt, recipe.tilt, token_bytes=tokenizer.token_bytes,
            true_bytes=dataset.val_bytes, seq_len=record["eval_seq_len"], stride=recipe.score.stride,
            batch_tokens=recipe.score.batch_tokens, lane_count=record["lanes"], bos_id=tokenizer.bos_id,
        ).as_dict()  # fmt: skip
    return results


def _short(value: Any) -> str:
    text = f"{value:,}" if type(value) is int else str(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def findings_text(findings: Findings) -> str:
    """Mismatches first, then what could not be determined, then how many agree."""
    lines = [f"{findings.run}: " + (f"{len(findings.mismatches)} mismatches" if findings.mismatches else "verified")]
    lines += [f"  MISMATCH  {check.name}: {check.detail}" for check in findings.mismatches]
    lines += [f"  unknown   {check.name}: {check.detail}" for check in findings.checks if check.ok is None]
    agreed = [check for check in findings.checks if check.ok]
    lines += [f"  ok        {check.name}" + (f": {check.detail}" if check.detail else "") for check in agreed]
    return "\n".join(lines)
