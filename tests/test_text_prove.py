"""The proof: documents decoded by another process, and what must not pass as one."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from bench.lab import write_run
from paramgolf.api import load
from paramgolf.data.cache import cache_root
from paramgolf.data.shards import write_shard
from paramgolf.data.sources import SEPARATOR
from paramgolf.data.tokenizer import Tokenizer
from paramgolf.errors import CheckFailed, GolfError
from paramgolf.model.gpt import GPT
from paramgolf.pack.packer import pack_model
from paramgolf.recipe.load import load_recipe
from paramgolf.runner.folder import RunFolder
from paramgolf.runner.proof import proof_text
from paramgolf.runner.record import SEAL, seal, write_record
from paramgolf.runner.run import run
from paramgolf.runner.summary import summary_text
from paramgolf.score.scorer import score
from paramgolf.text import pieces as cut
from paramgolf.text.blocks import TextModel
from paramgolf.text.format import Content
from paramgolf.text.peers import compress_peers
from paramgolf.text.prove import compare, decode_elsewhere, prove
from paramgolf.text.replay import DocumentHashes
from tests.run_common import TINY, error_line, golf_here, prose
from tests.test_text_files import SIZES, make_artifact

DOCUMENTS = [prose()[at : at + 900].encode() for at in range(0, 18_000, 900)]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("model") / "model.golf")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "val.txt"
    path.write_bytes(SEPARATOR.join(DOCUMENTS))
    return path


def proved(artifact: Path, source: Path, **settings: Any) -> dict[str, Any]:
    return prove(artifact, str(source), say=lambda line: None, **settings)


def scored(artifact: Path, tokens: np.ndarray, size: int, **settings: Any) -> float:
    """Bits a byte by the scorer itself with the artifact's n-gram cache, over the whole stream at once."""
    model = TextModel(artifact, device="cpu")
    bits = score(
        model.model, tokens, token_bytes=model.tokenizer.token_bytes, true_bytes=size, seq_len=model.seq_len,
        bos_id=model.tokenizer.bos_id, ngram=model.ngram, **settings,
    ).val_bpb_ngram  # fmt: skip
    assert bits is not None
    return bits


def test_the_scorers_own_lanes_and_windows(
    artifact: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cut, "MAX_LANES", 2)  # two frames
    proof = proved(artifact, text, lanes=3, stride=32, out=tmp_path / "proof.gtx")
    assert proof["documents"] == 20 and proof["lanes"] == 3 and proof["text_bytes"] == 18_000
    tokens = TextModel(artifact, device="cpu").tokenizer.encode_documents(DOCUMENTS)
    assert proof["val_bpb_same_windows"] == pytest.approx(scored(artifact, tokens, 18_000, lane_count=3, stride=32))
    assert proof["proved_bpb"] == 8 * (tmp_path / "proof.gtx").stat().st_size / 18_000
    assert 0 < proof["overhead"] < 0.04  # of so short a text
    assert "20 documents" in proof_text(proof) and "xz -9e" in proof_text(proof)
    with pytest.raises(GolfError, match="exists"):
        proved(artifact, text, out=tmp_path / "proof.gtx")


def test_the_kept_file_is_the_text(
    artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several frames, lanes that begin inside documents; what anybody can decode."""
    monkeypatch.setattr(cut, "FRAME_BYTES", 8000)
    monkeypatch.setattr(cut, "LEAST_LANE", 1000)
    long, kept, back = tmp_path / "long.txt", tmp_path / "proof.gtx", tmp_path / "back.txt"
    long.write_bytes(SEPARATOR.join([DOCUMENTS[0], b"".join(DOCUMENTS[1:19]), DOCUMENTS[19]]))
    proof = proved(artifact, long, out=kept)
    assert proof["documents"] == 3 and 9 <= proof["lanes"] <= 20
    assert golf_here(capfd, "decompress", kept, "-m", artifact, "-o", back).code == 0
    assert back.read_bytes() == long.read_bytes()


def test_a_prefix_recorded_in_the_run(
    artifact: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "run")
    write_run(folder.root, 0, lines=1, artifact_bytes=1)
    folder.artifact.write_bytes(artifact.read_bytes())
    hashes = {"sha256": {"artifact": TextModel(artifact).sha256}, "val_bpb": 3.0}
    record = write_record(folder, json.loads(folder.record.read_text()) | hashes)
    shown = golf_here(capfd, "prove", folder.root, "--data", text, "--limit", "2000", "--json")
    assert shown.code == 0, shown.err
    proof = json.loads(shown.out)
    assert proof["text_bytes"] == 2000 and proof["documents"] == 3
    after = folder.read_record()
    assert after is not None and after["proof"] == proof | {"validation": False} and after["val_bpb"] == 3.0
    assert after["proved_bpb"] == proof["proved_bpb"] and seal(after)[SEAL] == after[SEAL] != record[SEAL]
    folder.record.write_text(json.dumps(after | {"val_bpb": 1.0}))
    prove = ("prove", folder.root, "--data", text, "--limit", "300")
    assert "seal" in error_line(golf_here(capfd, *prove))
    write_record(folder, after | {"seconds": {"train": 1.0}})
    assert f"{folder.record}: seconds: input should have 'strict'" in error_line(golf_here(capfd, *prove))


def test_a_run_with_lanes_and_its_proof(text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`score.lanes` goes from the recipe through record and artifact to the proof; report and summary show it."""
    folder = RunFolder(tmp_path / "run")
    (tmp_path / "train.txt").write_text(prose()[18_000:])
    data = [f"data.train={tmp_path / 'train.txt'}", f"data.val={text}"]
    record = run(load_recipe("pocket", [*TINY, *data, "score.stride=0", "score.lanes=3"]), out=folder.root)
    assert record is not None and record["lanes"] == 3 and load(folder.artifact).lanes == 3
    shown = golf_here(capfd, "prove", folder.root)
    assert shown.code == 0 and "recorded in" in shown.err and "3 lanes" in shown.out
    after = folder.read_record()
    assert after is not None and after["proof"]["validation"] and after["proof"]["lanes"] == 3
    ngram = record["val_bpb_ngram"]
    assert after["proof"]["val_bpb_same_windows"] == pytest.approx(ngram, rel=5e-3)  # float32 or bfloat16
    assert after["proved_bpb"] == pytest.approx(ngram, rel=0.05)
    assert after["peers"].items() <= after["proof"]["peers"].items()  # of one file, over the same bytes
    assert "proved: " in summary_text(after) and "proved: " not in summary_text(record)
    page = folder.report.read_text()
    assert "<h2>Proof</h2>" in page and f"{after['proof']['file_bytes']:,}" in page
    shutil.copy(folder.artifact, tmp_path / "model.golf")
    assert "give documents by --data" in error_line(golf_here(capfd, "prove", tmp_path / "model.golf"))
    shutil.rmtree(cache_root() / record["data"]["key"][:20])
    assert "is not kept here" in error_line(golf_here(capfd, "prove", folder.root))


def test_shards_are_proved_as_tokens(artifact: Path, text: Path, tmp_path: Path) -> None:
    tokenizer = TextModel(artifact).tokenizer
    tokens = tokenizer.encode_documents(DOCUMENTS[:4])
    shard = tmp_path / "fineweb_val_000000.bin"
    write_shard(shard, tokens)
    proof = proved(artifact, shard, lanes=2)
    assert proof["content"] == "tokens" and proof["bytes_from"] == "table" and proof["documents"] is None
    assert proof["lanes"] == 2 and proof["text_bytes"] == 3600 and "peers" not in proof
    assert "a token stream" in proof_text(proof) and "table" in proof_text(proof)
    part = np.concatenate(list(cut.shard_tokens(cut.open_corpus(shard, tokenizer), tokenizer, 1000)))
    assert np.array_equal(part, tokens[: len(part)]) and 980 <= len(tokenizer.decode(part)) <= 1000


def test_what_a_lossy_tokenizer_changes_counts(tmp_path: Path) -> None:
    """SentencePiece's own normalisation: full-width letters, double blanks and line ends do not survive it."""
    plain = ["the cat sat on the mat", "a dog ran after it", "and all of them went home", "at the end of the day"]
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(plain * 20), model_writer=made, model_type="bpe", vocab_size=300, byte_fallback=True,
        normalization_rule_name="nmt_nfkc", minloglevel=2,
    )  # fmt: skip
    tokenizer = Tokenizer(made.getvalue())
    assert not tokenizer.reversible
    recipe = load_recipe("pocket", [*SIZES, "train.seq_len=64", "score.seq_len=64", "budget.bytes=0"])
    model = GPT(recipe.model, tokenizer.vocab_size)
    model.init_weights(1)
    path = tmp_path / "model.golf"
    pack_model(model.state_dict(), recipe, tokenizer.compact(), path, tokenizer.vocab_size)
    documents = [("  ".join(plain) + "\n\uff26\uff55\uff4c\uff4c \u2460 \ufb01n\n").encode() * 3, b" ", b"the end"]
    file = tmp_path / "val.txt"
    file.write_bytes(SEPARATOR.join(documents))
    proof = proved(path, file)
    assert proof["documents"] == 3 and proof["patched_frames"] == 1
    assert proof["text_bytes"] == sum(map(len, documents))
    assert proof["overhead"] > 0.02  # the residual
    file.write_bytes(b" ")
    with pytest.raises(GolfError, match="nothing to prove"):
        proved(path, file)


def test_what_is_no_proof(artifact: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gtx"
    bad.write_bytes(b"\x89GTX nothing of the kind")
    with pytest.raises(CheckFailed, match="could not be decoded"):
        decode_elsewhere(artifact, bad, tmp_path)
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(bytes(64))
    other.write_bytes(bytes(33) + b"x" * 31)
    with pytest.raises(CheckFailed, match="1 documents came back changed, the first is number 1"):
        compare(one, other)
    other.write_bytes(bytes(32))
    with pytest.raises(CheckFailed, match="2 documents went in, 1 came"):
        compare(one, other)
    empty = tmp_path / "empty.txt"
    empty.write_bytes(b"")
    with pytest.raises(GolfError, match="nothing to prove"):
        proved(artifact, empty)


def test_a_prefix_does_not_cut_characters() -> None:
    assert [p.data for p in cut.parts_of(["aé".encode(), b"bb"], 2)] == [b"a"]
    assert [p.data for p in cut.parts_of([b"aa", b"bbbb"], 4)] == [b"aa", b"bb"]


def test_split_loses_nothing() -> None:
    rng = np.random.default_rng(0)
    for count in 1, 2, 7, 40:
        parts = [cut.Part(rng.integers(0, 256, n).astype(np.uint8).tobytes(), n % 3 == 0) for n in (1, 500, 3, 90, 9)]
        runs = cut.split(parts, sorted(rng.integers(0, 603, count - 1).tolist()))
        assert b"".join(p.data for run in runs for p in run) == b"".join(p.data for p in parts)
        assert sum(not p.joined for run in runs for p in run) == sum(not p.joined for p in parts)
        assert len(runs) <= count and all(runs)


def test_lanes_have_equally_many_tokens(artifact: Path) -> None:
    tokenizer = TextModel(artifact, device="cpu").tokenizer
    text = prose().encode()
    data = text + bytes(range(128, 256)) * (len(text) // 512)  # a fifth of the bytes, and each a token
    places = [0, *cut.even_places(data, 5, tokenizer), len(data)]
    counts = [len(tokenizer.encode_documents([data[a:b]])) for a, b in itertools.pairwise(places)]
    assert max(counts) <= 1.1 * min(counts)
    assert places[-1] - places[-2] < 0.6 * len(data) / 5  # by bytes the last lane would be the longest


@pytest.mark.parametrize("step", [1, 2, 5, 100])
def test_hashes_of_documents_do_not_depend_on_how_they_arrive(step: int) -> None:
    documents = [b"one\x1e", b"", b"\ntwo \x1e\x1e", b"three\n"]
    target, raw = io.BytesIO(), SEPARATOR.join(documents)
    hashes = DocumentHashes(Content.DOCUMENTS, target)
    for at in range(0, len(raw), step):
        hashes.write(raw[at : at + step])
    assert hashes.finish() == hashlib.sha256(raw).hexdigest()
    assert target.getvalue() == b"".join(hashlib.sha256(d).digest() for d in documents)


def test_peers_take_programs_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_bytes(b"peers of the text " * 40)
    archive = 'for a in "$@"; do case "$a" in *.7z|*.zpaq) printf 12345 > "$a";; esac; done\n'
    for name, script in {"7zz": archive, "zpaq": "exit 3\n"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin")
    peers = compress_peers(tmp_path / "text", 700)
    assert peers["7z PPMd, order 16, 1 GB"] == {"bytes": 5, "bpb": 8 * 5 / 700}
    assert set(peers) == {"xz -9e", "zstd -22", "bzip2 -9", "7z PPMd, order 16, 1 GB"}
