"""Compressed files that are not what they should be, and writing that does not come to its end."""

from __future__ import annotations

import contextlib
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from paramgolf.errors import CheckFailed
from paramgolf.pack.wire import varint
from paramgolf.score import coder
from tests.run_common import error_line, golf_here, one_thread
from tests.test_score_coder import encode
from tests.test_text_files import INPUTS, TEXT, make_artifact


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("model") / "model.golf")


@pytest.fixture(scope="module")
def packed(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    from paramgolf.cli import main

    folder = tmp_path_factory.mktemp("packed")
    (folder / "note").write_bytes(TEXT)
    assert main(["compress", str(folder / "note"), "-m", str(artifact)]) == 0
    return (folder / "note.gtx").read_bytes()


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[:4] + b"\x09" + data[5:], "format version 9"),
        (lambda data: b"\x1f\x8b" + data[2:], "not made by golf compress"),
        (lambda data: data[:30] + b"\xff" + data[31:], "checksum of the header"),
        (lambda data: data[: len(data) // 2], "too early"),
        (lambda data: data + data, "after the end"),
        (lambda data: data[:100] + bytes([data[100] ^ 4]) + data[101:], "checksum"),
        (lambda data: b"", "too early"),
    ],
)
def test_each_fault_is_one_line(
    change: object, said: str, artifact: Path, packed: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert callable(change)
    bad = tmp_path / "bad.gtx"
    bad.write_bytes(change(packed))
    assert said in error_line(golf_here(capfd, "decompress", bad, "-m", artifact))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.gtx"]


def test_a_promise_of_more_tokens_than_there_are_ends_early() -> None:
    data, logits, _ = encode(1e-4, [40])
    head = coder._HEADER.size
    (block, vocab, _, _), at = coder._read_varints(data, head, 4)
    hostile = data[:head] + b"".join(varint(int(n)) for n in (block, vocab, 1, 2 * 10**9)) + data[at:]
    decoder = coder.Decoder(hostile)
    assert decoder.lengths[0] == 10**9
    with pytest.raises(CheckFailed, match="checksum"):
        for step in range(2000):
            decoder.step(logits[step % len(logits)][None])
    with pytest.raises(CheckFailed, match="not finite"):
        coder.Decoder(data).step(torch.full((1, 1024), torch.nan))


def test_no_space(artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "note"
    source.write_bytes(INPUTS["binary"])
    with file_size_limit(4096):
        line = error_line(golf_here(capfd, "compress", source, "-m", artifact))
    assert "cannot write" in line and "File too large" in line
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_no_space_on_standard_output(artifact: Path, tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "paramgolf", "compress", "-m", str(artifact)]
        done = subprocess.run(
            command, input=INPUTS["binary"], stdout=full, stderr=subprocess.PIPE, env=one_thread(), check=False
        )
    assert done.returncode == 2
    assert done.stderr.decode().splitlines()[-1].startswith("golf: error: cannot write standard output: No space left")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_half_way(how: signal.Signals, artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gtx"
    command = [sys.executable, "-m", "paramgolf", "compress", "-m", str(artifact), "-o", str(out)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=one_thread(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test in the background ignores it
    )  # fmt: skip
    assert process.stdin is not None and process.stderr is not None
    process.stdin.write(bytes(600_000))  # more will not come: it waits in the middle of the file
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.gtx.*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.glob(".out.gtx.*"))
    while process.poll() is None and time.monotonic() < deadline + 60:
        process.send_signal(how)  # again: one that comes just before a blocking read does not end that read
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)
    assert process.returncode
    assert not out.exists()
    if how != signal.SIGKILL:
        assert process.returncode in (128 + how, -how)  # the latter if one came when it was as good as gone
        said = process.stderr.read()
        assert not list(tmp_path.iterdir()) and b"Traceback" not in said
        assert process.returncode != 128 + signal.SIGINT or said.endswith(b"golf: error: interrupted\n")
    process.stdin.close()
    process.stderr.close()


def test_a_killed_command_takes_its_workers_along(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "note").write_bytes(TEXT * (1 + (1 << 25) // len(TEXT)))
    command = [sys.executable, "-m", "paramgolf", "compress", "-m", artifact, "--workers", "2", tmp_path / "note"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=one_thread()) as process:
        workers: list[psutil.Process] = []
        deadline = time.monotonic() + 60
        while len(workers) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
            children = psutil.Process(process.pid).children()
            workers = [child for child in children if any("spawn_main" in word for word in child.cmdline())]
        process.kill()
    assert len(workers) == 2
    assert not psutil.wait_procs(workers, timeout=30)[1]


def test_refusals_before_any_work(artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "note"
    source.write_bytes(TEXT)
    for arguments, said in [
        (["compress", source, source], "given twice"),
        (["compress", tmp_path], "is a folder"),
        (["compress", tmp_path / "none"], "no such file"),
        (["compress", "/dev/null"], "is a pipe or device"),
        (["compress", source, "--stride", "65"], "between 1 and the window length"),
        (["compress", source, source, "-o", tmp_path / "out"], "-o names the output of one file"),
        (["decompress", source], "does not end in .gtx"),
        (["prove", artifact, "--data", tmp_path / "none"], "no such file"),
        (["prove", tmp_path, "--data", source], "no artifact"),
    ]:
        given = arguments if arguments[0] == "prove" else [*arguments, "-m", artifact]
        assert said in error_line(golf_here(capfd, *given))
    assert [path.name for path in tmp_path.iterdir()] == ["note"]
