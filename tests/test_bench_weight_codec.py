"""The weight bench at toy size: every coder gives its input back, results are kept, a second run goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import weight_codec
from bench.weight_coders import installed, measure, save


def run(monkeypatch: pytest.MonkeyPatch, path: Path, *words: str) -> dict[str, dict[str, object]]:
    command = ["weight_codec", "--json", str(path), "--payloads", "tiny", *words]
    monkeypatch.setattr(sys, "argv", command)
    weight_codec.main()
    (entry,) = json.loads(path.read_text())["payloads"]
    return entry


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """A payload of two small matrices in place of the large ones; its list may be changed."""
    draw = np.random.default_rng(1)
    matrices = [np.clip(np.rint(draw.normal(0, 4, (60, 50))), -31, 31).astype(np.int8) for _ in range(2)]

    def payloads(_: object) -> list[dict[str, object]]:
        arrays = [(f"layer{i}.q", q) for i, q in enumerate(matrices)]
        return [{"name": "tiny", "arrays": arrays, "ideal": 3000.0, "note": "test", "scales": None}]

    monkeypatch.setattr(weight_codec, "payloads", payloads)
    return matrices


def test_a_stopped_bench_goes_on_and_other_bytes_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: list[np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.json"

    def measured() -> list[str]:
        """The coders that the bench has just told of."""
        told = capsys.readouterr()
        assert "below the best of every peer" in told.out and "from the known-scale ideal" in told.out
        return [line.split()[1].rstrip(":") for line in told.err.splitlines() if line.startswith("  tiny ")]

    first = run(monkeypatch, path, "--coders", "ours,zlib-9")["coders"]
    assert measured() == ["ours", "zlib-9"]
    assert list(first) == ["ours", "zlib-9"]
    assert all(c["bytes"] > 0 and c["peak_bytes"] > 1e6 and c["encode_s"] >= 0 for c in first.values())
    second = run(monkeypatch, path, "--coders", "ours,zlib-9,zlib-9-T")["coders"]
    assert measured() == ["zlib-9-T"] and {n: second[n] for n in first} == first
    tiny[0][0, 0] += 1
    run(monkeypatch, path, "--coders", "ours,zlib-9")
    assert measured() == ["ours", "zlib-9"]


@pytest.mark.parametrize("name", ["with-scales", "zstd-22", "lzma-9e-T", "brotli-11-T", "lrzip-z"])
def test_every_coder_gives_its_input_back(tmp_path: Path, name: str) -> None:
    if not installed(name):
        pytest.skip(f"{name} is not installed")
    draw = np.random.default_rng(2)
    arrays = [("a", draw.integers(-31, 32, (40, 30)).astype(np.int8)), ("b", draw.integers(-3, 4, 90).astype(np.int8))]
    save(tmp_path / "p.npz", arrays, [draw.random(40).astype(np.float16), np.asarray(0.5, np.float16)])
    found = measure(name, tmp_path / "p.npz", 60.0)
    assert 0 < found["bytes"] < 3000


def test_a_coder_over_its_limit_is_a_row_and_not_the_end(tmp_path: Path) -> None:
    save(tmp_path / "p.npz", [("a", np.zeros((4, 4), np.int8))], None)
    assert measure("ours", tmp_path / "p.npz", 0.001) == {"stopped_after": 0.001}


def test_the_trained_payload_and_what_coarser_scales_save() -> None:
    from bench import weight_trained

    draw = np.random.default_rng(3)
    weights = {"blocks.0.w": draw.standard_normal((400, 60)).astype(np.float32)}
    found = weight_trained.scale_bytes(weights, weight_trained.GRIDS["R-k"])
    assert found["5"]["bytes"] < found["10"]["bytes"] - 400 * 4 / 8 and found["5"]["error"] < 1.01


def test_every_part_taken_away_still_decodes_and_most_cost_bytes() -> None:
    """On matrices whose layers share row and column scales, with heavy tails, one with a common direction."""
    from bench import weight_ablation

    draw = np.random.default_rng(4)
    rows, columns = np.exp(0.5 * draw.standard_normal((200, 1))), np.exp(0.5 * draw.standard_normal(160))
    arrays = []
    for layer in range(4):
        values = draw.standard_t(4, (200, 160)) * rows * columns + (2.5 * columns if layer == 3 else 0)
        arrays.append((f"blocks.{layer}.w", np.clip(np.rint(2 * values), -31, 31).astype(np.int8)))
    scales = [np.ones(200, np.float16) for _ in arrays]
    found = {n: r["bytes"] for n, r in weight_ablation.variants({"arrays": arrays, "scales": scales})}
    whole = found.pop("everything")
    assert set(found) == {*weight_ablation.PARTS} - {"everything"} | {"row scales not known"}
    for part in ("no column classes", "no row classes", "vectors not predicted from others", "tables start Gaussian"):
        assert found[part] > whole
    assert min(found.values()) > 0.99 * whole
