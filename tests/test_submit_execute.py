"""`golf audit --execute`: a model that reads ahead is caught, an honest one passes, and what runs is confined."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from paramgolf.cli import main
from paramgolf.submit.audit.audit import audit
from paramgolf.submit.audit.execute import check as run_model
from paramgolf.submit.audit.folder import read_submission
from tests.test_submit_audit import packed

SCRIPT = """
import os
import torch
import torch.nn.functional as F
from torch import nn
from flash_attn_interface import flash_attn_func

class Hyperparameters:
    vocab_size = int(os.environ.get("VOCAB_SIZE", 64))
    model_dim = 32
    softcap = 30.0

class GPT(nn.Module):
    def __init__(self, vocab_size, model_dim, softcap):
        super().__init__()
        self.emb = nn.Embedding(vocab_size, model_dim)
        self.qkv = nn.Linear(model_dim, 3 * model_dim, bias=False)
        self.proj = nn.Linear(model_dim, model_dim, bias=False)
        nn.init.zeros_(self.proj.weight)
        self.softcap = softcap

    def forward(self, x, y):
        h = self.emb(x)
        q, k, v = (t.unflatten(-1, (2, 16)) for t in self.qkv(h).chunk(3, -1))
        h = h + self.proj(flash_attn_func(q, k, v, causal=True).flatten(-2))
        logits = F.linear(h, self.emb.weight)
        logits = self.softcap * torch.tanh(logits / self.softcap)
        return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())

def main():
    args = Hyperparameters()
    model = GPT(vocab_size=args.vocab_size, model_dim=args.model_dim, softcap=args.softcap).cuda()

if __name__ == "__main__":
    main()
"""


def codes(tmp_path: Path, text: str, seconds: float = 120.0) -> dict[str, str]:
    path = tmp_path / "train_gpt.py"
    path.write_text(text)
    return {f.code: f.message for f in run_model(read_submission(path), seconds)}


def test_an_honest_model_passes_and_a_packed_one_too(tmp_path: Path) -> None:
    found = codes(tmp_path, packed(SCRIPT))
    assert list(found) == ["exec-passed"], found
    assert "evaluation loop was not run" in found["exec-passed"]


@pytest.mark.parametrize(
    "change",
    [
        ("causal=True", "causal=False"),  # hidden by the zero projection unless weights are random
        ("h = self.emb(x)", "h = self.emb(x) + self.emb(torch.roll(x, -1, 1))"),
        ("logits = F.linear(h, self.emb.weight)", "logits = F.linear(h, self.emb.weight) + 5 * F.one_hot(y, 64)"),
    ],
)
def test_a_model_that_reads_ahead_is_a_violation(tmp_path: Path, change: tuple[str, str]) -> None:
    assert change[0] in SCRIPT
    found = codes(tmp_path, SCRIPT.replace(*change))
    assert {"exec-causal", "exec-normalised"} & set(found), found
    assert "exec-passed" not in found


NETWORK = """
import socket
try:
    socket.create_connection(("127.0.0.1", {port}), 3)
    raise SystemExit("reached the network")
except OSError as error:
    raise RuntimeError(f"no way out: {{error}}")
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import not_a_module\n", "ModuleNotFoundError"),
        ("raise SystemExit(3)\n", "SystemExit"),
        ("class GPT: pass\n", "no model class"),
        ("import os\nos._exit(7)\n", "ended with code 7"),
        (SCRIPT.replace("vocab_size, model_dim, softcap):", "vocab_size, model_dim, softcap, secret):"), "'secret'"),
        (SCRIPT.replace("self.emb(x)", "self.emb(x.cuda())"), "its model raised"),
        ("def broken(:\n", "does not parse"),
    ],
)
def test_what_cannot_be_run_is_not_determined(tmp_path: Path, text: str, said: str) -> None:
    found = codes(tmp_path, text)
    assert list(found) == ["exec-unknown"] and said in found["exec-unknown"], found


def test_there_is_no_network_and_no_endless_run(tmp_path: Path) -> None:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        found = codes(tmp_path, NETWORK.format(port=server.getsockname()[1]))
    assert "no way out" in found["exec-unknown"] or "nothing was run" in found["exec-unknown"]
    begun = time.monotonic()
    away = "import os, time\nif os.fork() == 0: os.setsid()\ntime.sleep(40)\n"  # leaves the group, keeps the pipe
    found = codes(tmp_path, away, seconds=8)
    assert "longer than 8 s" in found["exec-unknown"]
    assert time.monotonic() - begun < 35


def test_only_when_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "train_gpt.py"
    path.write_text(SCRIPT.replace("causal=True", "causal=False"))
    assert not any(f.code.startswith("exec") for f in audit(path).findings)
    assert main(["audit", str(path), "--execute"]) == 1
    assert "exec-causal" in capsys.readouterr().out
