"""The generated training script: short enough, clean, self-contained, and the same run as the package's."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from paramgolf.data.shards import write_shard
from paramgolf.data.tokenizer import Tokenizer
from paramgolf.errors import GolfError
from paramgolf.pack.packer import load_artifact
from paramgolf.recipe.load import load_recipe
from paramgolf.runner.run import run
from paramgolf.script.generate import MAX_LINES, generate
from paramgolf.submit.audit.audit import audit
from paramgolf.submit.package import submit
from tests.run_common import losses
from tests.test_script_plain import quantising

LARGER = ["baseline", "pr107", "pr114", "pr128", "pr137"]
REFERENCES = [*LARGER, "pr137-script"]
ALLOWED = {"numpy", "sentencepiece", "torch", "zstandard", "brotli", "flash_attn_interface"}
SMALL = [
    "model.dim=64", "model.num_layers=3", "model.num_heads=4", "model.num_kv_heads=2", "model.mlp_hidden=96",
    "data.vocab_size=300", "train.seq_len=64", "train.batch_tokens=1024", "train.compile=off", "train.log_every=1",
    "train.kernels=plain", "train.dtype=float32", "train.device=cpu", "schedule.warmup_steps=1", "train.threads=1",
    "budget.seconds=0", "budget.steps=8", "score.stride=32", "score.batch_tokens=4096",
]  # fmt: skip


def check_script(script: Path) -> None:
    """Passes ruff, and imports nothing but what a submission may need."""
    root = Path(__file__).parent.parent
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--config", root / "pyproject.toml", script],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr
    roots = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").split(".")[0])
    assert roots - set(sys.stdlib_module_names) <= ALLOWED


@pytest.mark.full
@pytest.mark.parametrize("name", REFERENCES)
def test_script_is_short_and_self_contained(name: str, tmp_path: Path) -> None:
    text = generate(load_recipe(name))
    assert text.count("\n") <= MAX_LINES == 1500
    (tmp_path / "train_gpt.py").write_text(text)
    check_script(tmp_path / "train_gpt.py")


@pytest.mark.full
def test_script_is_deterministic() -> None:
    assert generate(load_recipe("baseline")) == generate(load_recipe("baseline"))


def test_what_a_script_cannot_do_is_refused() -> None:
    with pytest.raises(GolfError, match=r"pack\.codec"):
        generate(load_recipe("baseline", ["pack.codec=auto"]))


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of shards in the official layout and its SentencePiece model, made by SentencePiece itself."""
    root = tmp_path_factory.mktemp("official")
    words = (Path(__file__).parent.parent / "README.md").read_text().split()
    text = root / "text.txt"
    text.write_text("\n".join(" ".join(words[i : i + 40]) for i in range(0, len(words), 40)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(root / "tiny"), vocab_size=400, model_type="bpe", byte_fallback=True,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2, hard_vocab_limit=False, add_dummy_prefix=False,
    )  # fmt: skip
    tokenizer = Tokenizer.load(root / "tiny.model")
    lines = [np.concatenate([[1], tokenizer.encode(line)]) for line in text.read_text().splitlines()]
    shards = root / "shards"
    shards.mkdir()
    write_shard(shards / "fineweb_train_000000.bin", np.concatenate(lines * 8).astype(np.uint16))
    write_shard(shards / "fineweb_val_000000.bin", np.concatenate(lines).astype(np.uint16))
    return shards, root / "tiny.model"


def script_losses(out: str) -> list[float]:
    return [float(value) for value in re.findall(r"^step:\d+/\d+ train_loss:(\S+)", out, re.M)]


@pytest.mark.parametrize("name", ["pr137-script", *(pytest.param(n, marks=pytest.mark.full) for n in LARGER)])
def test_script_gives_the_losses_and_the_bytes_of_the_package(
    name: str, official: tuple[Path, Path], tmp_path: Path
) -> None:
    shards, tokenizer = official
    vocab = Tokenizer.load(tokenizer).vocab_size
    recipe = load_recipe(name, [*SMALL, f"data.vocab_size={vocab}", f"data.tokenizer={tokenizer}", "train.seed=7"])
    recipe = quantising(recipe)
    record = run(recipe, data=str(shards), out=tmp_path / "run")
    assert record is not None
    made = submit([tmp_path / "run"], tmp_path / "entry", compress_code=name == "baseline")
    if not made["files"].count("train_gpt_readable.py"):
        check_script(tmp_path / "entry" / "train_gpt.py")
    work = tmp_path / "work"
    work.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"] if name == "baseline" else []
    done = subprocess.run(
        [sys.executable, *launcher, tmp_path / "entry" / "train_gpt.py"], cwd=work, text=True, capture_output=True,
        check=False, env={**os.environ, "DATA_PATH": str(shards), "TOKENIZER_PATH": str(tokenizer), "SEED": "7"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert script_losses(done.stdout) == [round(loss, 6) for loss in losses(tmp_path / "run")]
    assert (work / "final_model.golf").read_bytes() == (tmp_path / "run" / "model.golf").read_bytes()
    assert load_artifact(work / "final_model.golf").manifest["name"] == name
    codec = recipe.pack.codec
    standard = f"val_loss:{record['val_loss']:.8f} val_bpb:{record['val_bpb']:.8f}"
    assert f"final_{codec}_roundtrip_exact {standard}" in done.stdout
    sliding = f"val_loss:{record['val_loss_sliding']:.8f} val_bpb:{record['val_bpb_sliding']:.8f}"
    assert f"final_{codec}_roundtrip_sliding_exact {sliding}" in done.stdout
    size = (tmp_path / "entry" / "train_gpt.py").stat().st_size
    assert f"Code size: {size} bytes" in done.stdout
    assert f"Total submission size {codec}: {made['bytes_total']} bytes" in done.stdout
    assert made["bytes_code"] == size
    assert record["code_bytes"] == made["code_bytes"]["plain"]
    found = audit(tmp_path / "entry")
    assert found.violations == 0, [f for f in found.findings if f.severity == "violation"]
    log = next((work / "logs").iterdir())
    assert log.read_text().startswith((tmp_path / "entry" / "train_gpt.py").read_text())
