"""Scripts made to keep the audit busy or to break it: bounded time, and findings instead of tracebacks."""

from __future__ import annotations

import base64
import time
import zlib
from pathlib import Path

import pytest

from paramgolf.submit.audit.audit import audit
from paramgolf.submit.audit.folder import read_submission
from tests.test_submit_audit import codes


@pytest.mark.parametrize(
    "text",
    [
        "x0 = 'a'\n" + "".join(f"x{i + 1} = x{i} + x{i}\n" for i in range(17)) + "exec(x17)\n",
        "import lzma as L\n"
        "exec(L.decompress(b'', L.FORMAT_RAW, None, [{'id': L.FILTER_LZMA2, 'dict_size': 4294967295}]))\n",
    ],
)
def test_expressions_that_explode_are_stopped(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bomb.py"
    path.write_text(text)
    started = time.monotonic()
    assert "code-bomb" in codes(audit(path))
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "text", ["(" * 5000, "-" * 50000 + "1", "x = " + "a." * 900 + "a\n", "a\0b", "'''", "+".join("a" * 5000)]
)
def test_hostile_scripts_are_findings(tmp_path: Path, text: str) -> None:
    path = tmp_path / "train_gpt.py"
    path.write_text(text)
    audit(path)


def layered(text: str, calls: int) -> str:
    """`text` packed four times, each layer run by so many calls."""
    for _ in range(4):
        data = base64.b85encode(zlib.compress(text.encode())).decode()
        text = f"import zlib, base64\nB = {data!r}\n" + "exec(zlib.decompress(base64.b85decode(B)))\n" * calls
    return text


def test_a_layer_that_is_run_many_times_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "train_gpt.py"
    path.write_text(layered("import requests\n", 6))
    assert "net-import" in codes(audit(path))
    assert len(read_submission(path).scripts[0].with_layers()) == 5


def packed_comment(size: int, ending: str) -> str:
    return f"exec(zlib.decompress({zlib.compress(('#' * size + ending).encode())!r}))\n"


BUDGETS = {
    "code": "import zlib\n" + "".join(packed_comment(4_000_000, str(i)) for i in range(5)),
    "values": f"A = {'#' * 3_000_000!r}\n" + "exec(A.strip())\n" * 20,
    "steps": f"exec({[1] * 15_000})\nexec('exec({[1] * 15_000})')\n",
    "failures": "import zlib\n" + f"exec(zlib.decompress({zlib.compress(b'#')[:-1] + b'?'!r}))\n" * 9,
}


@pytest.mark.parametrize("spent", BUDGETS)
def test_a_script_and_its_layers_share_one_budget(tmp_path: Path, spent: str) -> None:
    path = tmp_path / "train_gpt.py"
    path.write_text(BUDGETS[spent])
    assert "code-bomb" in codes(audit(path))


@pytest.mark.parametrize(
    "value",
    [
        "{[1]: 2}",
        "lzma.decompress(b'', 99999999999999999999)",
        "lzma.decompress(b'', lzma.FORMAT_RAW, None, [{'dict_size': 1e999}])",
        "base64.b64decode(b'aa', b'a')",
    ],
)
def test_values_that_decoders_refuse_are_opaque(tmp_path: Path, value: str) -> None:
    path = tmp_path / "train_gpt.py"
    path.write_text(f"import base64, lzma\nexec({value})\n")
    assert codes(audit(path)) == {"code-opaque"}
