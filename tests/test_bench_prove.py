"""The bench of proofs: its ways to compute log-odds agree, and it runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench import prove
from paramgolf.recipe.sections import NgramLevel
from paramgolf.text.blocks import TOLERANCE, TextModel
from tests.run_common import prose
from tests.test_text_files import make_artifact


@pytest.mark.parametrize("levels", [[], [NgramLevel(scope="document", order=1), NgramLevel(scope="text", order=2)]])
def test_windows_and_single_tokens_give_the_same_log_odds(tmp_path: Path, levels: list[NgramLevel]) -> None:
    model = TextModel(make_artifact(tmp_path / "model.golf"), device="cpu")
    tokens = model.tokenizer.encode_documents([prose()[:4000].encode()])[: 3 * model.seq_len + 1]
    whole = prove.windows_of(model.model, levels, tokens, model.seq_len, 2)
    one = prove.token_by_token(model.model, levels, tokens, model.seq_len)
    assert one.shape == whole.shape == (3 * model.seq_len, 11)
    assert np.abs(one - whole).max() < TOLERANCE
    other = prove.windows_of(model.model, levels, np.roll(tokens, 5), model.seq_len, 2)
    assert np.abs(other - whole).max() > 1


@pytest.mark.full
def test_all_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text, answer = tmp_path / "text.txt", tmp_path / "prove.json"
    text.write_text(prose()[:30_000])
    line = [
        "prove", "--model", make_artifact(tmp_path / "model.golf"), "--json", answer, "--data", text, "--quick",
        "--bytes", 6000, "--whole", 2, "--difference-tokens", 256,
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", [str(part) for part in line])
    prove.main()
    found = json.loads(answer.read_text())
    assert set(found) == set(prove.SECTIONS)
    assert found["overhead"]["proof"]["text_bytes"] <= 6000
    assert max(found["differences"]["largest"].values()) < TOLERANCE
    assert "zeros to" in capsys.readouterr().out
