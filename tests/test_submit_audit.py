"""Every planted fault is found, a clean submission has no alarm, and hostile input is bounded."""

from __future__ import annotations

import base64
import json
import lzma
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from paramgolf.cli import main
from paramgolf.errors import GolfError
from paramgolf.submit.audit.audit import Audit, audit, expand
from paramgolf.submit.audit.catalog import CATALOG, Severity
from paramgolf.submit.audit.newer_python import blank_fstrings

SCRIPT = """
import os
import numpy as np
import torch

class Hyperparameters:
    train_files = os.path.join("data", "fineweb_train_*.bin")
    num_layers = int(os.environ.get("NUM_LAYERS", 9))
    max_wallclock_seconds = float(os.environ.get("MAX_WALLCLOCK_SECONDS", 600.0))

def build_luts(sp, size):
    base_bytes = np.zeros((size,), dtype=np.int16)
    leading_space = np.zeros((size,), dtype=np.bool_)
    is_boundary = np.ones((size,), dtype=np.bool_)
    for i in range(size):
        if sp.is_control(i):
            continue
        is_boundary[i] = False
        if sp.is_byte(i):
            base_bytes[i] = 1
            continue
        piece = sp.id_to_piece(i)
        if piece.startswith("\\u2581"):
            leading_space[i] = True
            piece = piece[1:]
        base_bytes[i] = len(piece.encode("utf-8"))
    return base_bytes, leading_space, is_boundary

def train(model, train_loader):
    model(train_loader.next_batch()).backward()

state = torch.load("final_model.ptz", weights_only=True)
""".lstrip()
SEEDS = (1, 2, 3)
BPB = {1: 1.2001, 2: 1.2003, 3: 1.2008}


def log_text(seed: int, code: str = SCRIPT, bpb: float | None = None) -> str:
    size = len(code.encode())
    return f"""{code}
{"=" * 100}
model_params:17059912
val_loader:shards pattern=fineweb_val_*.bin tokens:62021632
world_size:8 grad_accum_steps:1
num_layers:9 max_wallclock_seconds:600.000
seed:{seed}
step:100/20000 train_loss:5.1234 train_time:5000ms step_avg:50.00ms
step:13000/20000 val_loss:2.0300 val_bpb:1.1900 train_time:599900ms step_avg:46.14ms
stopping_early: wallclock_cap train_time:599900ms step:13000/20000
Serialized model: 67224983 bytes
Code size: {size} bytes
Total submission size: {67224983 + size} bytes
Serialized model int8+zlib: 15800000 bytes (payload:17178912 raw_torch:17224025 payload_ratio:3.91x)
Total submission size int8+zlib: {15800000 + size} bytes
final_int8_zlib_roundtrip val_loss:2.0265 val_bpb:{bpb or BPB[seed]:.4f} eval_time:1401ms
final_int8_zlib_roundtrip_exact val_loss:2.02650000 val_bpb:{bpb or BPB[seed]:.8f}
"""


def claims() -> dict[str, object]:
    return {
        "author": "a", "github_id": "a", "name": "n", "val_bpb": 1.2004, "val_bpb_std": 0.00036,
        "bytes_total": 15800000 + len(SCRIPT.encode()), "seed_results": {str(s): {"val_bpb": BPB[s]} for s in SEEDS},
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A submission without a fault."""
    root = tmp_path / "submission"
    root.mkdir()
    (root / "README.md").write_text("# A run\n")
    (root / "submission.json").write_text(json.dumps(claims()))
    (root / "train_gpt.py").write_text(SCRIPT)
    for seed in SEEDS:
        (root / f"train_seed{seed}.log").write_text(log_text(seed))
    return root


def code(root: Path, text: str) -> None:
    """Make `text` the submitted script, and the logs those of it."""
    (root / "train_gpt.py").write_text(text)
    for seed in SEEDS:
        (root / f"train_seed{seed}.log").write_text(log_text(seed, text))


def add(text: str) -> Callable[[Path], None]:
    return lambda root: code(root, SCRIPT + text)


def swap(old: str, new: str) -> Callable[[Path], None]:
    assert old in SCRIPT
    return lambda root: code(root, SCRIPT.replace(old, new))


def in_log(old: str, new: str, seed: int = 2) -> Callable[[Path], None]:
    def plant(root: Path) -> None:
        path = root / f"train_seed{seed}.log"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return plant


def in_logs(old: str, new: str) -> Callable[[Path], None]:
    return lambda root: [in_log(old, new, seed)(root) for seed in SEEDS] and None


def claim(**values: object) -> Callable[[Path], None]:
    def plant(root: Path) -> None:
        table = {k: v for k, v in {**claims(), **values}.items() if v is not None}
        (root / "submission.json").write_text(json.dumps(table))

    return plant


def remove(pattern: str) -> Callable[[Path], None]:
    return lambda root: [p.unlink() for p in root.glob(pattern)] and None


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda root: (root / name).write_text(text) and None


def packed(text: str) -> str:
    blob = base64.b85encode(lzma.compress(text.encode()))
    return f"import lzma as L,base64 as B\nexec(L.decompress(B.b85decode({blob!r})))\n"


def zlib_packed(text: str) -> str:
    blob = base64.b64encode(zlib.compress(text.encode())).decode()
    call = "zlib.decompress(base64.b64decode(DATA)).decode()"
    return f"import zlib, base64\nDATA = {blob!r}\nexec(compile({call}, 'x', 'exec'))\n"


def copy_log(old: str, new: str) -> Callable[[Path], None]:
    return lambda root: (root / new).write_bytes((root / old).read_bytes()) and None


def compressed_code(root: Path) -> None:
    in_logs("zlib: 15800000", "zlib: 15999500")(root)
    in_logs("Code size:", "Code size (compressed): 300 bytes\nCode size (uncompressed):")(root)


def helper_module(root: Path) -> None:
    code(root, "import extra\n" + SCRIPT)
    (root / "extra.py").write_text("x = 1\n")


TAIL = "def load_val(tokens, seq_len):\n    return tokens[: (tokens.numel() - 1) // seq_len * seq_len]\n"
TTT = "\ndef eval_ttt(model, val_tokens):\n    model(val_tokens).backward()\n    loss_sum = 0\n    loss_sum += 1\n"
FAULTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "no readme": ("readme-missing", remove("README.md")),
    "no json": ("json-missing", remove("submission.json")),
    "no log": ("log-missing", remove("*.log")),
    "no script": ("script-missing", remove("*.py")),
    "other script name": ("script-name", lambda root: (root / "train_gpt.py").rename(root / "train_v5.py") and None),
    "syntax error": ("script-syntax", add("def broken(:\n")),
    "broken json": ("json-broken", write("submission.json", '{"val_bpb": 1.2')),
    "json list": ("json-broken", write("submission.json", "[1]")),
    "no author": ("json-field-missing", claim(author=None)),
    "bpb is text": ("json-field-type", claim(val_bpb="1.2004")),
    "bpb is nan": ("json-field-type", claim(val_bpb=float("nan"))),
    "link out": ("file-symlink", lambda root: (root / "more.log").symlink_to("/etc/hostname")),
    "linked folder": ("file-symlink", lambda root: (root / "logs").symlink_to("/etc")),
    "16 MiB": ("size-over-cap", in_logs("int8+zlib: 15800000", "int8+zlib: 16500000")),
    "model file too large": ("size-over-cap", lambda root: (root / "m.ptz").write_bytes(bytes(16_100_000)) and None),
    "total over": ("size-log-total", in_log("size int8+zlib: 1580", "size int8+zlib: 1680")),
    "wrong sum": ("size-sum", in_log("size int8+zlib: 15801", "size int8+zlib: 15701")),
    "bytes in json": ("size-json", claim(bytes_total=15_000_000)),
    "other code size": ("size-code-log", in_log("Code size: 1", "Code size: 2")),
    "code counted compressed": ("size-code-compressed", compressed_code),
    "helper module": ("size-helper-code", helper_module),
    "no bytes known": ("size-unknown", in_logs("Serialized", "serialised")),
    "packed lzma": ("code-packed", lambda root: code(root, packed(SCRIPT))),
    "packed zlib": ("code-packed", lambda root: code(root, zlib_packed(SCRIPT))),
    "bomb": ("code-bomb", lambda root: code(root, packed("import os\n" + " " * (20 << 20)))),
    "opaque": ("code-opaque", add("exec(state['code'])\n")),
    "indirect": ("code-indirect", add("exec(open('other.py').read())\n")),
    "external program": ("code-external", add("import subprocess\nsubprocess.run(['lrzip', 'x'])\n")),
    "log without source": ("log-source-absent", write("train_seed1.log", log_text(1, ""))),
    "other source": ("log-source-differs", in_log("is_boundary[i] = False", "is_boundary[i] = True")),
    "parameters differ": ("log-params", in_log("model_params:17059912", "model_params:18059912")),
    "undocumented setting": ("log-hparams", in_logs("num_layers:9", "num_layers:11")),
    "truncated log": ("log-truncated", write("train_seed2.log", log_text(2).partition("final_")[0])),
    "nan": ("log-nonfinite", in_log("train_loss:5.1234", "train_loss:nan")),
    "time backwards": ("log-order", in_log("train_time:5000ms", "train_time:599999ms")),
    "traceback": ("log-traceback", in_log("model_params", "Traceback (most recent call last):\nmodel_params")),
    "copied log": ("log-copy", copy_log("train_seed1.log", "train.log")),
    "wrong seed": ("seed-name", in_log("seed:2\n", "seed:1337\n")),
    "copied seed": ("seed-copied", copy_log("train_seed1.log", "train_seed4.log")),
    "one seed": ("seed-few", remove("train_seed[23].log")),
    "seed without log": ("seed-no-log", remove("train_seed3.log")),
    "mixed settings": ("seed-config", in_log("num_layers:9", "num_layers:11")),
    "seed score": ("seed-score", claim(seed_results={"1": 1.1901})),
    "score in no log": ("stat-score", claim(val_bpb=1.1504)),
    "best seed": ("stat-best-seed", claim(val_bpb=1.2001)),
    "another seed": ("stat-other-metric", claim(val_bpb=1.2008)),
    "deviation": ("stat-std", claim(val_bpb_std=0.00001)),
    "p-value": ("stat-p-value", claim(p_value=0.001)),
    "training over": ("time-train", in_log("train_time:599900ms", "train_time:660000ms")),
    "training just over": ("time-train-edge", in_log("train_time:599900ms", "train_time:600100ms")),
    "evaluation over": ("time-eval", in_log("eval_time:1401ms", "eval_time:700000ms")),
    "cap over": ("time-cap", in_log("max_wallclock_seconds:600.000", "max_wallclock_seconds:2400.000")),
    "no time": ("time-unknown", in_logs("train_time", "time")),
    "two GPUs": ("time-hardware", in_log("world_size:8", "world_size:2")),
    "download": ("net-call", add("from urllib.request import urlopen\nurlopen('http://x')\n")),
    "pip install": ("net-call", add("os.system('pip install brotli')\n")),
    "network import": ("net-import", add("import requests\n")),
    "network in a helper": ("net-helper", write("prepare.py", "import huggingface_hub\n")),
    "unsafe load": ("load-pickle", add("torch.load('m.pt')\n")),
    "pickle": ("load-pickle", add("import pickle as p\np.loads(b'')\n")),
    "calibrated on validation": ("val-calibration", add("collect_hessians(state, val_tokens)\n")),
    "trains on validation files": ("val-train-files", swap("fineweb_train_*.bin", "fineweb_*.bin")),
    "loader on validation": ("val-train-loader", add("train_loader = Loader(state.val_files)\n")),
    "adapts": ("val-adapt", add("def tune(model, val_tokens):\n    model(val_tokens).backward()\n")),
    "fallback not handled": ("bytes-fallback-missing", swap("sp.is_byte(i)", "sp.is_unused(i)")),
    "fallback charged three": ("bytes-fallback-charge", swap("base_bytes[i] = 1\n", "base_bytes[i] = 3\n")),
    "characters": ("bytes-characters", swap('piece.encode("utf-8")', "piece")),
    "no marker": ("bytes-leading-space", swap('"\\u2581"', '"_"')),
    "no boundary": ("bytes-boundary", lambda root: code(root, SCRIPT.replace("is_boundary", "flags"))),
    "constant": ("bytes-constant", add("val_bpb = state.loss / 0.6931471805599453 * 0.4097\n")),
    "sidecar": ("bytes-sidecar", add("byte_sidecar = np.fromfile('fineweb_val_bytes.bin')\n")),
    "tail": ("score-tail", add(TAIL)),
    "subset": ("score-subset", add("def eval_val(val_tokens):\n    return val_tokens[:1000000]\n")),
    "subset by setting": ("score-subset", in_log("num_layers:9", "num_layers:9 val_max_tokens:1000000")),
    "counts differ": ("score-count", in_log("tokens:62021632", "tokens:61021632")),
    "old export": ("score-old-export", in_logs("tokens:62021632", "tokens:63779840")),
    "unknown count": ("score-count-unknown", in_logs("tokens:62021632", "tokens:1024")),
    "sliding": ("eval-sliding", add("def eval_val_sliding(model, stride):\n    return model\n")),
    "ttt": ("eval-ttt", add(TTT)),
    "ttt order": ("eval-ttt-order", add(TTT)),
    "ttt before quantisation": ("eval-ttt-prequant", add("prequant_ttt(state)\n")),
    "two passes": ("eval-two-pass", add("def two_pass_eval(model):\n    return model\n")),
    "n-gram": ("eval-ngram", add("ngram_cache = {}\n")),
    "slot": ("eval-slot", add("slot_steps = 8\n")),
    "ppm": ("eval-ppm", add("def ppm_mix(p):\n    return p\n")),
    "logit bias": ("eval-logit-bias", add("def eval_etlb(model):\n    return model\n")),
    "temperature": ("eval-temperature", add("def find_temp(model):\n    return 1.0\n")),
    "newer python": ("script-newer", add("d = {'a': 1}\nprint(f'{d['a']}')\n")),
}  # fmt: skip


def codes(result: Audit) -> set[str]:
    return {f.code for f in result.findings}


def test_a_clean_submission_has_no_finding(folder: Path) -> None:
    assert [f for f in audit(folder).findings] == []


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault(folder: Path, fault: str) -> None:
    if fault == "newer python" and sys.version_info >= (3, 12):
        pytest.skip("this interpreter reads such f-strings itself")
    code_expected, plant = FAULTS[fault]
    plant(folder)
    hits = [f for f in audit(folder).findings if f.code == code_expected]
    assert hits, codes(audit(folder))
    assert hits[0].evidence and hits[0].ruling and len(hits[0].evidence) < 2000


def test_every_code_has_a_planted_fault() -> None:
    executed = {code for code in CATALOG if code.startswith("exec-")}  # tests/test_submit_execute.py
    assert {expected for expected, _ in FAULTS.values()} | {"file-skipped"} | executed == set(CATALOG)


def test_a_packed_script_is_read_like_a_plain_one(folder: Path) -> None:
    code(folder, packed(zlib_packed(SCRIPT + "torch.load('m.pt')\n")))
    result = audit(folder)
    assert {"code-packed", "load-pickle"} <= codes(result)
    evidence = next(f.evidence for f in result.findings if f.code == "load-pickle")
    assert evidence == f"train_gpt.py!unpacked!unpacked:{SCRIPT.count(chr(10)) + 1}: torch.load('m.pt')"


def test_nothing_is_executed(folder: Path, tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    text = f"open({str(trap)!r}, 'w').close()\n"
    code(folder, text + packed(text) + "exec(__import__('os').system('true'))\n")
    audit(folder)
    assert not trap.exists()


def test_switched_off_methods_are_only_noted(folder: Path) -> None:
    code(folder, SCRIPT + "slot_enabled = bool(int(os.environ.get('SLOT_ENABLED', '0')))\n")
    assert [f.severity for f in audit(folder).findings if f.code == "eval-slot"] == [Severity.NOTE]
    in_logs("num_layers:9", "num_layers:9 slot_enabled:True")(folder)
    assert [f.severity for f in audit(folder).findings if f.code == "eval-slot"] == [Severity.VIOLATION]


def test_documented_settings_are_no_finding(folder: Path) -> None:
    in_logs("num_layers:9", "num_layers:11")(folder)
    (folder / "README.md").write_text("Run with `NUM_LAYERS=11 torchrun ...`")
    assert "log-hparams" not in codes(audit(folder))


def test_of_two_runs_in_a_log_the_last_one_counts(folder: Path) -> None:
    path = folder / "train_seed2.log"
    path.write_text(log_text(2, SCRIPT.replace("is_boundary", "other")) + "=" * 100 + "\n" + log_text(2))
    assert codes(audit(folder)) == {"log-order"}


def test_a_long_log_is_read_to_its_bound(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paramgolf.submit.audit.log.MAX_BYTES", 50_000)
    with (folder / "train_seed1.log").open("a") as stream:
        stream.write("x" * 200_000)
    assert "file-skipped" in codes(audit(folder))


def test_a_script_alone_and_unreadable_paths(tmp_path: Path) -> None:
    path = tmp_path / "train_gpt.py"
    path.write_text("import requests\n")
    assert codes(audit(path)) == {"net-import"}
    with pytest.raises(GolfError, match="cannot read"):
        audit(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GolfError, match="neither"):
        audit(tmp_path / "pipe")


def test_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(folder)]) == 0
    (folder / "README.md").unlink()
    capsys.readouterr()
    assert main(["audit", str(folder.parent), "--json"]) == 1
    table = json.loads(capsys.readouterr().out)
    assert table["violations"] == 1 and table["audits"][0]["findings"][0]["code"] == "readme-missing"
    assert main(["audit", str(folder), str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().out == ""
    assert expand([folder.parent]) == [folder]


def test_the_audit_does_not_import_torch(folder: Path) -> None:
    program = "import sys; from paramgolf.submit.audit.audit import audit; "
    program += f"audit({str(folder)!r}); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_blanked_fstrings_keep_lines_and_other_strings() -> None:
    text = "a = f'{d['x']}' + \"{'\" # f'{\nb = rf'''{x}\n{{''' \nc = f\"{f'{y!r:>{w}}'}\"\nif'x':pass\n"
    blanked = blank_fstrings(text)
    assert blanked.count("\n") == text.count("\n")
    assert '"{\'"' in blanked and "d['x']" not in blanked and "if'x'" in blanked
    compile(blanked, "x", "exec")
