"""A score says where the tokenizer's byte table differs from the documents: record, summary, report, `golf score`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import paramgolf
from paramgolf.data.tokenizer import Tokenizer
from paramgolf.runner.summary import summary_text
from tests.run_common import TINY, golf_here, prose
from tests.test_data_byte_oracle import trained

CapFd = pytest.CaptureFixture[str]
SHORT = [*TINY, "budget.steps=2", "score.stride=0", "pack.codec=zlib"]


def test_a_lossy_tokenizer_is_named_beside_the_score(capfd: CapFd, tmp_path: Path) -> None:
    (tmp_path / "foreign.model").write_bytes(trained())
    size = Tokenizer.load(tmp_path / "foreign.model").vocab_size
    folder, run = tmp_path / "text", tmp_path / "run"
    folder.mkdir()
    (folder / "a.txt").write_text(prose()[:20_000])
    held = "\x1e\n".join(["one line of text", "two  blanks,\nand a line", *["more plain text"] * 30])
    (folder / "my_val.txt").write_text(held)
    settings = [*SHORT, f"data.tokenizer={tmp_path / 'foreign.model'}", f"data.vocab_size={size}"]
    answer = golf_here(capfd, "run", "pocket", *settings, "--data", folder, "--out", run, "--json")
    assert answer.code == 0, answer.err
    record = json.loads(answer.out)
    true = len(held) - 2 * 31
    assert (record["scored_bytes"], record["table_bytes"], record["bytes_from"]) == (true, true - 1, "documents")
    assert record["val_bpb_table"] == pytest.approx(record["val_bpb"] * true / (true - 1))
    check = record["byte_table"]
    assert (check["documents"], check["documents_that_differ"], check["documents_changed"]) == (32, 1, 1)
    assert [row["document"] for row in check["first"]] == [1]
    shown = summary_text(record)
    assert "by the tokenizer's byte table" in shown and "document 1: true 23, table 22" in shown
    assert "byte table of the tokenizer" in (run / "report.html").read_text()

    scored = golf_here(capfd, "score", run, "--data", folder, "--json")
    assert scored.code == 0, scored.err
    assert json.loads(scored.out)["byte_table"] == check | {"documents_changed": None}
    told = golf_here(capfd, "score", run, "--data", folder).out
    assert "standard, by the byte table" in told and "1 of 32 documents differ" in told
    score = paramgolf.load(run / "model.golf").score("two  blanks")
    assert (score.scored_bytes, score.table_bytes) == (11, 10) and score.val_bpb_table == pytest.approx(
        score.val_bpb * 1.1
    )


def test_nothing_is_said_of_a_table_that_agrees(capfd: CapFd, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(prose()[:30_000])
    answer = golf_here(capfd, "run", "pocket", *SHORT, "--data", text, "--out", tmp_path / "run", "--json")
    assert answer.code == 0, answer.err
    record = json.loads(answer.out)
    assert record["val_bpb_table"] == record["val_bpb"] and record["byte_table"]["documents_that_differ"] == 0
    assert "byte table" not in summary_text(record)
    assert "byte table" not in (tmp_path / "run" / "report.html").read_text()


def test_a_changed_validation_text_stops_a_run_before_it_trains(capfd: CapFd, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\x1e\n".join(prose()[at : at + 500] for at in range(0, 30_000, 500)))
    out = tmp_path / "data"
    made = golf_here(capfd, "data", "prepare", tmp_path / "text.txt", "--vocab-size", "512", "--out", out)
    assert made.code == 0, made.err
    (out / "val.txt").write_text("another text")
    answer = golf_here(capfd, "run", "pocket", *SHORT, "--data", out, "--out", tmp_path / "run")
    assert answer.code == 2 and "prepare it again" in answer.err
    assert not (tmp_path / "run" / "model.golf").exists()
