"""Downloading the official FineWeb shards and their tokenizer from the Hugging Face hub.

Facts of the published export (openai/parameter-golf, data/cached_challenge_fineweb.py and data/README.md): dataset
repository `willdepueoai/parameter-golf`, everything under `datasets/`; `manifest.json` names the data sets
(`fineweb10B_<variant>`) with their shard counts and the tokenizer each one belongs to.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from paramgolf.data.build import Progress
from paramgolf.data.shards import read_header
from paramgolf.errors import CheckFailed, GolfError
from paramgolf.files import atomic_write, sha256_file

REPOSITORY = "willdepueoai/parameter-golf"
REMOTE_ROOT = "datasets"
_PARTIAL = ".partial"


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository: path under REMOTE_ROOT, size and content hash ("sha256:..." or git's "git:...")."""

    path: str
    size: int
    digest: str


def fetch_fineweb(
    variant: str,
    train_shards: int,
    out: Path,
    *,
    repository: str = REPOSITORY,
    revision: str = "main",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fetch the validation shards, the first `train_shards` training shards and the tokenizer into `out`.

    Files that are there with the right hash are kept, so an interrupted fetch is continued by running it again. The
    server is huggingface.co or HF_ENDPOINT. Returns what was fetched, with `folder` = the folder for --data. GolfError
    if the server or the data set cannot be had, CheckFailed if what arrives has another hash.
    """
    name = _dataset_name(variant)
    hub = _Hub(repository, revision, out / _PARTIAL)
    manifest_file = hub.describe(["manifest.json"])[0]
    hub.get(manifest_file, out / "manifest.json")
    wanted = _wanted(_read_manifest(out / "manifest.json"), name, variant, train_shards)
    files = hub.describe(wanted)
    total, done = sum(file.size for file in files), 0
    kept = 0
    for file in files:
        kept += hub.get(file, out / file.path)
        if file.path.endswith(".bin"):
            read_header(out / file.path)
        done += file.size
        if progress:
            progress("fetching", done, total)
    shutil.rmtree(out / _PARTIAL, ignore_errors=True)
    result = {
        "repository": repository,
        "revision": hub.commit,
        "variant": variant,
        "folder": str(out / "datasets" / name),
        "files": [{"path": f.path, "bytes": f.size, "hash": f.digest} for f in files],
        "kept": kept,
    }
    atomic_write(out / "datasets" / name / "fetched.json", json.dumps({**result, "folder": name, "kept": 0}).encode())
    return result


def _dataset_name(variant: str) -> str:
    if variant == "byte260" or re.fullmatch(r"sp\d+", variant):
        return f"fineweb10B_{variant}"
    raise GolfError(f"unknown variant '{variant}'; published ones are named sp1024, sp4096, sp8192, ... by vocabulary")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest["datasets"], list) or not isinstance(manifest["tokenizers"], list):
            raise TypeError("no lists of datasets and tokenizers")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GolfError(f"{path}: not a manifest of the published data ({error}); delete it and fetch again") from error
    return manifest


def _wanted(manifest: dict[str, Any], name: str, variant: str, train_shards: int) -> list[str]:
    """Paths under the remote root of what is to be fetched."""
    entries = {entry.get("name"): entry for entry in manifest["datasets"] if isinstance(entry, dict)}
    if name not in entries:
        raise GolfError(f"no data set for variant '{variant}'; published: {', '.join(sorted(map(str, entries)))}")
    stats = entries[name].get("stats") or {}
    most, val = int(stats.get("files_train") or 0), int(stats.get("files_val") or 0)
    if not 0 <= train_shards <= most:
        raise GolfError(f"--train-shards {train_shards}: '{variant}' has {most} training shards")
    tokenizers = [t for t in manifest["tokenizers"] if isinstance(t, dict)]
    tokenizer = next((t for t in tokenizers if t.get("name") == entries[name].get("tokenizer_name")), {})
    artifacts = [str(tokenizer[key]) for key in ("model_path", "vocab_path", "path") if tokenizer.get(key)]
    if not artifacts:
        raise GolfError(f"the manifest names no tokenizer for '{name}'; fetch another variant")
    folder = f"datasets/{name}"
    wanted = [f"{folder}/fineweb_val_{i:06d}.bin" for i in range(val)]
    wanted += [f"{folder}/fineweb_train_{i:06d}.bin" for i in range(train_shards)]
    for path in artifacts:
        parts = PurePosixPath(path)
        if parts.is_absolute() or ".." in parts.parts or "\\" in path:
            raise GolfError(f"the manifest names a path outside the data folder: {path!r}")
    return wanted + artifacts


class _Hub:
    """The few calls of huggingface_hub that are needed, with its errors turned into ours."""

    def __init__(self, repository: str, revision: str, partial: Path) -> None:
        try:
            import huggingface_hub
        except ImportError as error:
            raise GolfError("fetching needs huggingface_hub; pip install 'paramgolf[data]'") from error
        self._hub = huggingface_hub
        self._endpoint = os.environ.get("HF_ENDPOINT") or None
        self._api = huggingface_hub.HfApi(endpoint=self._endpoint, token=False)
        self._repository, self._partial = repository, partial
        with self._errors():
            self.commit = str(self._api.dataset_info(repository, revision=revision, token=False).sha)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

        where = self._endpoint or "https://huggingface.co"
        try:
            yield
        except RepositoryNotFoundError as error:
            raise GolfError(f"no dataset repository '{self._repository}' at {where}; check HF_ENDPOINT") from error
        except EntryNotFoundError as error:
            raise GolfError(f"{where} lacks a file of '{self._repository}': {_first_line(error)}") from error
        except HfHubHTTPError as error:
            raise GolfError(f"{where} answered with an error: {_first_line(error)}; try again later") from error
        except GolfError:
            raise
        except (OSError, ValueError, RuntimeError, self._http_error()) as error:
            raise GolfError(
                f"cannot fetch from {where} ({_first_line(error)}); check the network or HF_ENDPOINT, then run again"
            ) from error

    def _http_error(self) -> type[Exception]:
        errors: Any = self._hub.errors
        return getattr(errors, "HTTPError", OSError)

    def describe(self, paths: list[str]) -> list[RemoteFile]:
        """Size and hash of each path under the remote root, as the server states them."""
        remote = [f"{REMOTE_ROOT}/{path}" for path in paths]
        with self._errors():
            found = self._api.get_paths_info(
                self._repository, remote, revision=self.commit, repo_type="dataset", token=False
            )
        known = {entry.path: entry for entry in found if isinstance(entry, self._hub.hf_api.RepoFile)}
        missing = [path for path in remote if path not in known]
        if missing:
            raise GolfError(
                f"'{self._repository}' lacks {missing[0]} ({len(missing)} files missing); try another variant"
            )
        files = []
        for path, full in zip(paths, remote, strict=True):
            entry = known[full]
            digest = f"sha256:{entry.lfs.sha256}" if entry.lfs else f"git:{entry.blob_id}"
            files.append(RemoteFile(path, int(entry.size), digest))
        return files

    def get(self, file: RemoteFile, target: Path) -> bool:
        """Fetch one file unless it is there already; True if it was kept."""
        if target.is_file() and target.stat().st_size == file.size and _has_digest(target, file.digest):
            return True
        with self._errors():
            fetched = self._hub.hf_hub_download(
                self._repository,
                f"{REMOTE_ROOT}/{file.path}",
                repo_type="dataset",
                revision=self.commit,
                local_dir=self._partial,
                endpoint=self._endpoint,
                token=False,
            )
        if not _has_digest(Path(fetched), file.digest):
            Path(fetched).unlink(missing_ok=True)
            raise CheckFailed(f"{file.path}: the hash of what arrived is not {file.digest}; fetch it again")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(fetched, target)
        return False


def _has_digest(path: Path, digest: str) -> bool:
    kind, _, expected = digest.partition(":")
    if kind == "sha256":
        return sha256_file(path) == expected
    content = path.read_bytes()  # git's hash; only small files have no sha256
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == expected


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
