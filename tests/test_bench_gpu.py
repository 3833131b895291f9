"""The bench against the public scripts, as far as it goes without a GPU: logs, settings, shards, refusal."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.gpu import STANDIN, comparisons, run_recipe, run_script, table
from bench.gpu_logs import compare, script_side
from bench.gpu_peers import (
    FINAL_BYTES,
    RECORD_SCRIPT,
    RECORDS,
    REPORTED,
    SCRIPTS,
    data_facts,
    decay_steps,
    find_script,
    make_shards,
    our_overrides,
    our_variables,
    variables,
)
from paramgolf.data.dataset import prepare
from paramgolf.data.shards import read_header
from paramgolf.errors import GolfError
from paramgolf.model.backends import PlainMath
from paramgolf.recipe.fromenv import VARIABLES, from_variables
from paramgolf.recipe.load import load_recipe
from paramgolf.recipe.sections import DataSection

ON_CPU = ("train.device=cpu", "train.compile=off")
ROOT = Path(__file__).resolve().parents[1]
# Written for this test in the format of the scripts' own messages.
LOG = """\
model_params:1000
warmup_step:20/20
step:1/20000 train_loss:6.9000 train_time:100ms step_avg:100.00ms
step:10/20000 train_loss:6.0000 train_time:900ms step_avg:90.00ms
step:20/20000 train_loss:5.5000 train_time:1900ms step_avg:95.00ms
step:21/20000 val_loss:5.4000 val_bpb:3.2000 train_time:2000ms step_avg:95.24ms
stopping_early: wallclock_cap train_time:2000ms step:21/20000
peak memory allocated: 512 MiB reserved: 600 MiB
Serialized model: 4000 bytes
Code size: 300 bytes
Total submission size: 4300 bytes
"""
ZLIB = """\
Serialized model int8+zlib: 1200 bytes (payload:1500 raw_torch:1600 payload_ratio:2.67x)
Total submission size int8+zlib: 1500 bytes
final_int8_zlib_roundtrip val_loss:5.4100 val_bpb:3.2100 eval_time:10ms
final_int8_zlib_roundtrip_exact val_loss:5.41000000 val_bpb:3.21000000
"""
LATE = """\
  train_batch_tokens: 786432
model_params:35945671
warmup_step: 1/20
1/20000 train_loss: 9.0087 train_time: 0.0m tok/s: 786432
10/20000 train_loss: 7.5000 train_time: 0.2m tok/s: 655360
20/20000 val_loss: 6.3441 val_bpb: 3.0712
stopping_early: wallclock_cap train_time: 20100ms step: 20/20000
peak memory allocated: 41707 MiB reserved: 46984 MiB
diagnostic pre-quantization post-ema val_loss:6.31952808 val_bpb:3.05993108 eval_time:20917ms
Serialized model: 135418111 bytes
Code size (uncompressed): 191812 bytes
Code size (compressed): 38134 bytes
Serialized model quantized+brotli: 15943811 bytes
Total submission size quantized+brotli: 15981945 bytes
diagnostic quantized val_loss:6.33790966 val_bpb:3.06833072 eval_time:21788ms
quantized_ttt_phased val_loss:6.31400153 val_bpb:3.05740567 eval_time:572386ms
"""


def test_a_log_of_the_base_script() -> None:
    side = script_side((LOG + ZLIB).splitlines())
    assert side["curve"] == {1: 6.9, 10: 6.0, 20: 5.5}
    assert side["steps"] == 21
    assert side["step_ms"] == pytest.approx(2000 / 21)
    assert (side["val_bpb_float"], side["val_bpb"], side["val_bpb_sliding"]) == (3.2, 3.21, None)
    assert (side["artifact_bytes"], side["code_bytes"], side["total_bytes"]) == (1200, 300, 1500)
    assert side["peak_memory_bytes"] == 512 * 2**20
    assert side["params"] == 1000


def test_both_scores_of_the_scripts_that_print_both() -> None:
    more = "final_sliding_window_exact val_loss:5.30000000 val_bpb:3.10000000\n"
    side = script_side((LOG + ZLIB + more).splitlines())
    assert (side["val_bpb"], side["val_bpb_sliding"]) == (3.21, 3.1)
    mixed = (
        "Serialized model mixed+zstd-22: 1111 bytes (payload:1)\nfinal_mixed_roundtrip_exact val_loss:1 val_bpb:3.0\n"
    )
    side = script_side((LOG + mixed).splitlines())
    assert (side["artifact_bytes"], side["val_bpb"]) == (1111, 3.0)


def test_a_sliding_score_under_the_name_of_a_round_trip() -> None:
    more = (
        "Serialized model int6+zstd: 1000 bytes\nTotal submission size: 1300 bytes\n"
        "final_eval_mode:sliding_window stride:64 batch_seqs:16\n"
        "final_int6_zstd_roundtrip_exact val_loss:5.30000000 val_bpb:3.10000000\n"
    )
    side = script_side((LOG + more).splitlines())
    assert (side["val_bpb"], side["val_bpb_sliding"]) == (None, 3.1)
    assert (side["artifact_bytes"], side["total_bytes"]) == (1000, 1300)


def test_a_log_that_breaks_off_keeps_what_it_had() -> None:
    side = script_side(LOG.splitlines()[:4])
    assert (side["steps"], side["step_ms"], side["artifact_bytes"]) == (10, 90.0, None)
    assert script_side([])["curve"] == {}


def test_a_log_of_a_later_record() -> None:
    side = script_side(LATE.splitlines())
    assert side["curve"] == {1: 9.0087, 10: 7.5}
    assert (side["steps"], side["step_ms"], side["params"]) == (20, 1005.0, 35_945_671)
    assert (side["val_bpb_float"], side["val_bpb"], side["val_bpb_ttt"]) == (3.05993108, 3.06833072, 3.05740567)
    assert (side["artifact_bytes"], side["code_bytes"], side["total_bytes"]) == (15_943_811, 38_134, 15_981_945)
    by_steps = script_side(LATE.splitlines()[:6])  # without a clock to stop it
    assert (by_steps["steps"], by_steps["step_ms"]) == (20, 1200.0)


def test_rates_that_fall_by_steps_leave_all_steps_to_compare() -> None:
    curve = {str(step): 5.0 for step in range(1, 101)}
    side = script_side([]) | {"curve": curve, "steps": 100, "step_ms": 1.0}
    answer = {"recipe": "record-1.0611", "sides": {"ours": side, "theirs": side}}
    assert comparisons(answer, 60)["comparison"]["last_step"] == 14, "0.85 of the time the rates fall"
    assert comparisons(answer | {"steps": 100}, 60)["comparison"]["last_step"] == 99


def test_only_steps_before_the_decay_are_compared() -> None:
    ours, theirs = script_side(LOG.splitlines()), script_side(LOG.splitlines())
    theirs["curve"] = {step: loss + 0.1 for step, loss in theirs["curve"].items()}
    theirs["step_ms"] = 2 * ours["step_ms"]
    answer = compare(ours, theirs, decay_steps=5)
    assert answer["speed_ratio"] == pytest.approx(2.0)
    assert (answer["steps_compared"], answer["last_step"]) == (2, 10)
    assert answer["largest_gap"] == pytest.approx(0.1)
    assert answer["mean_gap_second_half"] == pytest.approx(-0.1)
    assert compare(ours, script_side([]), 5)["steps_compared"] == 0


@pytest.mark.parametrize("name", sorted(REPORTED))
def test_the_reported_variables_are_the_recipe(name: str) -> None:
    """What a submission typed, read by `recipe.fromenv`, changes nothing in the recipe of its name."""
    overrides, _ = from_variables(REPORTED[name])
    recipe, changed = load_recipe(name), load_recipe(name, overrides)
    if not recipe.score.seq_len:  # 0 means the training length, which the submission writes out
        changed = dataclasses.replace(changed, score=dataclasses.replace(changed.score, seq_len=0))
    assert changed == recipe


def test_the_final_decay_is_the_same_part_of_a_shorter_run() -> None:
    assert decay_steps("baseline", 600, gpus=8) == 1200
    assert decay_steps("baseline", 60) == 15
    assert decay_steps("pr114", 1) == 1


def test_scripts_are_found_by_name(tmp_path: Path) -> None:
    for name in ("baseline.py", "pr114-abc.py", "pr128-x/train_gpt.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("pass\n")
    assert find_script(tmp_path, "baseline").name == "baseline.py"
    assert find_script(tmp_path, "pr114").name == "pr114-abc.py"
    assert find_script(tmp_path, "pr128").parent.name == "pr128-x"
    with pytest.raises(GolfError, match="found none"):
        find_script(tmp_path, "pr107")
    for size in (10, FINAL_BYTES["pr107"]):
        (tmp_path / f"pr107-{size}.py").write_bytes(b"#" * size)
    assert find_script(tmp_path, "pr107").name == f"pr107-{FINAL_BYTES['pr107']}.py"
    with pytest.raises(GolfError, match="no public script"):
        find_script(tmp_path, "pocket")
    (tmp_path / "pr1855_record.py").write_text("pass\n")
    assert {find_script(tmp_path, name).name for name in RECORDS} == {"pr1855_record.py"}
    assert {*REPORTED, *RECORDS} <= set(SCRIPTS)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few documents as the scripts read them, with a small tokenizer of their own."""
    folder = tmp_path_factory.mktemp("gpu")
    text = folder / "text.txt"
    lines = [f"Document {n} tells of {n * n} ships and {n % 7} harbours, and of nothing else." for n in range(400)]
    text.write_text("\x1e\n".join(lines))
    small = DataSection(train=str(text), vocab_size=300, val_max_bytes=4000)
    made = prepare(small, cache=folder / "cache", workers=1)
    return make_shards(str(text), made.root / "tokenizer.model", folder / "shards", val_bytes=4000)


@pytest.fixture(scope="module")
def caseops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a CaseOps tokenizer."""
    folder = tmp_path_factory.mktemp("caseops")
    text = folder / "text.txt"
    text.write_text("\x1e\n".join(f"Document {n} tells of {n * n} SHIPS and of {n % 7} Harbours." for n in range(400)))
    small = DataSection(train=str(text), vocab_size=300, val_max_bytes=4000, caseops=True)
    made = prepare(small, cache=folder / "cache", workers=1)
    return make_shards(str(text), made.root / "tokenizer.model", folder / "shards", val_bytes=4000)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAMGOLF_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def test_shards_lie_as_the_scripts_expect_them(shards: Path) -> None:
    names = sorted(p.name for p in shards.iterdir())
    assert names == ["fineweb_train_000000.bin", "fineweb_val_000000.bin", "tokenizer.model"]
    assert read_header(shards / names[0]) > read_header(shards / names[1]) > 100
    assert set(data_facts(shards)) == set(names)


def test_each_change_of_the_run_is_stated_once(shards: Path) -> None:
    named = variables("pr107", shards, seconds=60, seed=7, log_every=10)
    assert named["MLP_HIDDEN"] == "1488"
    assert named["WARMDOWN_ITERS"] == "38"
    assert named["POST_QAT_SECONDS"] == "3.0"
    assert Path(named["TOKENIZER_PATH"]).parent == shards
    overrides, ignored = from_variables({**named, "VOCAB_SIZE": "1024"})
    recipe = load_recipe("pr107", overrides)
    assert (recipe.train.seed, recipe.budget.seconds, recipe.schedule.warmdown_iters) == (7, 60, 38)
    assert recipe.quant.post_qat_frac == 0.05
    assert sorted(ignored) == ["EVAL_BATCH_SEQS", "RUN_ID", "VAL_LOSS_EVERY"]
    assert "POST_QAT_SECONDS" not in variables("pr128", shards, seconds=60, seed=7, log_every=10)


def test_the_sidecar_lies_beside_caseops_shards(caseops: Path) -> None:
    assert sorted(p.name for p in caseops.iterdir()) == [
        "fineweb_train_000000.bin", "fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin", "tokenizer.model",
    ]  # fmt: skip
    assert read_header(caseops / "fineweb_val_000000.bin") == read_header(caseops / "fineweb_val_bytes_000000.bin")


def test_a_record_s_settings_are_its_recipe_s(caseops: Path) -> None:
    """What has a key by the name of a variable says there what the recipe says; ours is told of the run only."""
    known = {key: value for key, value in RECORD_SCRIPT.items() if key in VARIABLES}
    assert len(known) > 5
    assert load_recipe("record-1.0611", from_variables(known)[0]) == load_recipe("record-1.0611")
    env = variables("frontier", caseops, seconds=60, seed=7, log_every=10)
    assert (env["TTT_ENABLED"], env["MAX_WALLCLOCK_SECONDS"], env["VOCAB_SIZE"]) == ("0", "60", "300")
    assert "ITERATIONS" not in env and "WARMDOWN_ITERS" not in env
    steps = variables("frontier", caseops, seconds=60, seed=7, log_every=10, steps=40, ttt=True)
    assert (steps["TTT_ENABLED"], steps["ITERATIONS"], steps["MAX_WALLCLOCK_SECONDS"]) == ("1", "40", "0")
    overrides, _ = from_variables(our_variables("frontier", steps) | {"VOCAB_SIZE": "8192"})
    recipe = load_recipe("frontier", [*overrides, *our_overrides("frontier")])
    assert (recipe.train.seed, recipe.budget.seconds, recipe.budget.steps, recipe.ttt.kind) == (7, 0, 40, "none")
    assert (recipe.budget.clock, recipe.budget.count_packing, recipe.tilt.orders) == ("challenge", False, ())
    assert load_recipe("frontier", our_overrides("frontier", ttt=True)).ttt.kind == "phased"
    assert our_variables("pr114", {"GRAD_CLIP_NORM": "1"}) == {"GRAD_CLIP_NORM": "1"} and our_overrides("pr114") == []
    with pytest.raises(GolfError, match="--steps and --ttt are for record-"):
        variables("pr114", caseops, seconds=60, seed=7, log_every=10, steps=3)


def small(shards: Path) -> dict[str, str]:
    """Pull request 114 as four steps of a very small model."""
    env = variables("pr114", shards, seconds=600, seed=1337, log_every=1)
    env |= {"ITERATIONS": "4", "NUM_LAYERS": "2", "MODEL_DIM": "32", "NUM_HEADS": "2", "NUM_KV_HEADS": "1"}
    env |= {"MLP_HIDDEN": "32", "TRAIN_SEQ_LEN": "64", "EVAL_SEQ_LEN": "64", "TRAIN_BATCH_TOKENS": "512"}
    return env | {"EVAL_STRIDE": "32", "WARMUP_STEPS": "1"}


def test_our_side_is_a_run_of_the_recipe(shards: Path, tmp_path: Path) -> None:
    side = run_recipe("pr114", small(shards), tmp_path, 300, ON_CPU)
    assert side["problem"] == ""
    assert side["steps"] == 4
    assert sorted(side["curve"]) == [1, 2, 3, 4]
    assert side["val_bpb"] == pytest.approx(side["val_bpb_sliding"], abs=0.1)  # four steps have learnt no context
    assert 0 < side["artifact_bytes"] == side["total_bytes"] - side["code_bytes"] < side["file_bytes"]
    answer = {"recipe": "pr114", "sides": {"ours": side, "theirs": script_side((LOG + ZLIB).splitlines())}}
    answer["sides"]["theirs"] |= {"problem": "stopped after 5 s", "wall_seconds": 5.0}
    answer |= comparisons(json.loads(json.dumps(answer)), 1.0)
    lines = table([answer]).splitlines()
    assert lines[1].startswith("pr114         ours")
    assert "3.2100" in lines[2]
    assert "stopped after 5 s" in lines[3]


@pytest.mark.parametrize("name", RECORDS)
def test_our_side_of_a_record(name: str, caseops: Path, tmp_path: Path) -> None:
    env = variables(name, caseops, seconds=600, seed=1337, log_every=1, steps=4)
    sizes = [
        "model.dim=64", "model.num_heads=4", "model.num_kv_heads=2", "model.mlp_hidden=64", "model.rope_dims=8",
        "train.batch_tokens=1024", "train.seq_len=64", "stages=[]", "score.seq_len=0", "pack.fit=false",
        "schedule.warmup_steps=1", "quant.calibration_tokens=1024",
    ]  # fmt: skip
    side = run_recipe(name, our_variables(name, env), tmp_path, 300, [*ON_CPU, *our_overrides(name), *sizes])
    assert side["problem"] == ""
    assert (side["steps"], sorted(side["curve"]), side["val_bpb_ttt"]) == (4, [1, 2, 3, 4], None)
    assert 0 < side["val_bpb"] < 9 and 0 < side["artifact_bytes"] < side["file_bytes"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["pr107", "pr114", "pr128", "pr137-script"])
def test_a_gpu_run_follows_the_cpu_run(name: str, shards: Path, tmp_path: Path) -> None:
    """Compiled, in bfloat16, every kind of recipe: the losses of the float32 CPU run to rounding, no recompilation."""
    env = small(shards)
    gpu = run_recipe(name, env, tmp_path, 280, ["train.device=cuda"])
    cpu = run_recipe(name, env, tmp_path, 280, [*ON_CPU, "train.dtype=float32"])
    assert (gpu["problem"], cpu["problem"]) == ("", "")
    assert gpu["training"]["compiled"]["enabled"]
    assert gpu["training"]["recompiles"] == 0
    assert gpu["training"]["dtype"] == "bfloat16"
    for step, loss in cpu["curve"].items():
        assert gpu["curve"][step] == pytest.approx(loss, abs=0.02)
    assert gpu["val_bpb"] == pytest.approx(cpu["val_bpb"], abs=0.02)


def test_a_script_is_run_read_and_stopped(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, time\nprint({LOG!r} + os.environ['MORE'])\nif 'WAIT' in os.environ: time.sleep(60)\n"
    )
    side = run_script(script, {"MORE": ZLIB}, tmp_path, 60)
    assert (side["problem"], side["artifact_bytes"]) == ("", 1200)
    began = time.monotonic()
    side = run_script(script, {"MORE": "", "WAIT": "1"}, tmp_path, 2)
    assert time.monotonic() - began < 30
    assert side["problem"] == "stopped after 2 s"
    script.write_text("raise SystemExit('no GPU')\n")
    assert "no GPU" in run_script(script, {}, tmp_path, 60)["problem"]


def test_torch_s_kernels_stand_in_for_flash_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("flash_attn_interface") is not None:
        pytest.skip("FlashAttention-3 is installed")
    script = tmp_path / "script.py"
    script.write_text("import flash_attn_interface as f\nprint('model_params:7' if f.flash_attn_varlen_func else '')\n")
    assert run_script(script, {}, tmp_path, 60)["params"] == 7
    monkeypatch.syspath_prepend(STANDIN)
    standin = importlib.import_module("flash_attn_interface")
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 9, heads, 8, generator=draw) for heads in (4, 2, 2))
    torch.testing.assert_close(standin.flash_attn_func(q, k, v, causal=True), PlainMath()(q, k, v))
    with pytest.raises(NotImplementedError, match="causal"):
        standin.flash_attn_func(q, k, v)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_stand_in_keeps_packed_rows_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(STANDIN)
    standin = importlib.import_module("flash_attn_interface")
    q, k, v = (torch.randn(12, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    cut = torch.tensor([0, 5, 12, 12], dtype=torch.int32, device="cuda")
    packed = standin.flash_attn_varlen_func(q, k, v, cut, cut, 8, 8, causal=True, window_size=(-1, -1))
    alone = [PlainMath()(q[None, a:b], k[None, a:b], v[None, a:b])[0] for a, b in ((0, 5), (5, 12))]
    torch.testing.assert_close(packed, torch.cat(alone), atol=2e-2, rtol=2e-2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_line_says_so() -> None:
    command = [sys.executable, "-m", "bench.gpu", "baseline", "--scripts", ".", "--json", "x.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("bench: no CUDA device")
    assert done.stderr.count("\n") == 1
