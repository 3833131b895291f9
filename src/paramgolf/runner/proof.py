"""A proof of a score in the run's record, and as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paramgolf.data.cache import cache_root
from paramgolf.errors import GolfError
from paramgolf.files import sha256_file
from paramgolf.recipe.load import load_recipe
from paramgolf.runner.folder import RunFolder
from paramgolf.runner.record import SEAL, seal, write_record
from paramgolf.runner.report import write_report
from paramgolf.runner.summary import proof_coders, table_text


def record_of(artifact: Path) -> dict[str, Any] | None:
    """The record of the run that made the artifact, a run folder or a model.golf in one; None where there is none.

    Raises GolfError for a folder whose record does not match its seal or its artifact.
    """
    folder = _folder(artifact)
    record = folder.read_record()
    if record is None:
        return None
    made = record["sha256"].get("artifact") == sha256_file(folder.artifact if artifact.is_dir() else artifact)
    if not made and artifact.is_file():
        return None  # of another file beside it
    if not made or seal(record)[SEAL] != record.get(SEAL):
        raise GolfError(f"{folder.record} does not match its seal or its artifact; a proof cannot be recorded in it")
    return record


def record_proof(artifact: Path, proof: dict[str, Any]) -> str:
    """Put the proof into the record, which is sealed again, and into the report; a line that says so."""
    folder = _folder(artifact)
    try:
        with folder.locked():
            record = record_of(artifact)
            if record is None:
                return f"{folder.record} is not there; the proof is not recorded"
            val = record["data"]["val"]
            whole = (proof["text_bytes"], proof["text_file_sha256"]) == (val.get("bytes"), val.get("sha256"))
            kept = proof | {"validation": whole}
            record = write_record(folder, record | {"proved_bpb": proof["proved_bpb"], "proof": kept})
            saved = folder.root / "recipe.toml"
            if folder.report.is_file() and saved.is_file():
                write_report(folder, record, load_recipe(str(saved)).title)
    except OSError as error:
        raise GolfError(f"{folder.record} cannot be written: {error.strerror}; the proof is not recorded") from error
    return f"recorded in {folder.record}"


def own_validation(artifact: Path) -> str:
    """The prepared data, validation set and all, of the run that made the artifact. GolfError where it is not kept."""
    folder = _folder(artifact)
    try:
        key = str(folder.passport()["key"])
    except (GolfError, KeyError):
        raise GolfError(f"{artifact} is of no run that says which data it had; give documents by --data") from None
    kept = cache_root() / key[:20]
    if not kept.is_dir():
        raise GolfError(f"the data of {folder.root} is not kept here; give its validation text by --data")
    return str(kept)


def _folder(artifact: Path) -> RunFolder:
    return RunFolder(artifact if artifact.is_dir() else artifact.parent)


def proof_text(proof: dict[str, Any]) -> str:
    """The tables that `golf prove` prints."""
    what = f"{proof['documents']:,} documents" if proof["documents"] is not None else "a token stream, no documents"
    windows = f"windows of {proof['seq_len']}, stride {proof['stride']}, {proof['lanes']} lanes"
    rows = [
        ("proved_bpb", f"{proof['proved_bpb']:.6f}"),
        ("val_bpb of the same windows", f"{proof['val_bpb_same_windows']:.6f}"),
        ("overhead", f"{100 * proof['overhead']:.3f} %"),
        ("text", f"{proof['text_bytes']:,} bytes"),
        ("encoding", f"{proof['encode_bytes_per_second'] / 1000:.1f} kB/s"),
        ("decoding", f"{proof['decode_bytes_per_second'] / 1000:.1f} kB/s"),
    ]
    if proof["bytes_from"] == "table":
        rows.append(("bytes of the text counted by", "the tokenizer's table"))
    if proof["patched_frames"]:
        rows.append(("frames with a patch for what the tokenizer loses", f"{proof['patched_frames']:,}"))
    coders = [(row["name"], row["bpb"], row["bytes"]) for row in proof_coders(proof)]
    return "\n\n".join(
        [
            table_text(rows, title=f"proved: {what} came back from the file ({windows})"),
            table_text(coders, header=("the same text", "bits per byte", "bytes")),
            f"model.golf itself: {proof['model_bytes']:,} bytes, not counted above",
        ]
    )
