"""Compiling: when, nothing again after warm-up, and a failure that is not fatal.

The graphs are captured as in a real run; only the code generator behind them is the trivial one ("eager"), except in
the test marked `full`.
"""

from __future__ import annotations

import functools
import getpass
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from paramgolf.data.dataset import Dataset
from paramgolf.model.gpt import GPT
from paramgolf.train import compiling
from paramgolf.train.signals import Interrupted
from tests.test_train_resume import At
from tests.train_common import QUANT, Log, make_dataset, same, tiny, train, weights

CHANGING: dict[str, Any] = {
    "train": {"compile": "on", "batch_tokens": 224, "micro_batch_tokens": 160},  # 7 rows of 32 as 4 and 3
    "stages": [{"at": 0.3, "seq_len": 16, "batch_tokens": 64}],
    "quant": QUANT | {"qat": "export", "qat_start": 0.6, "post_qat": "export", "post_qat_frac": 0.2},
    "average": {"kind": "ema", "decay": 0.5, "select": "train"},
    "budget": {"steps": 10},
    "schedule": {"warmup_steps": 2},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("data"))


def use_backend(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    torch._dynamo.reset()
    compile_with = functools.partialmethod(GPT.compile_regions, backend=backend)
    monkeypatch.setattr(GPT, "compile_regions", compile_with)


@pytest.fixture
def quick_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    use_backend(monkeypatch, "eager")


@pytest.mark.usefixtures("quick_backend")
def test_nothing_is_compiled_after_warm_up_nor_again_when_resuming(dataset: Dataset, tmp_path: Path) -> None:
    """Over stages, uneven micro batches, the QAT switch, the average and the post-training phase."""
    recipe = tiny(**CHANGING)
    before = compiling.compiled_graphs()
    straight = train(recipe, dataset, tmp_path / "straight")
    assert straight.result.compiled["enabled"]
    assert compiling.compiled_graphs() > before, "something was compiled at all"
    assert straight.result.recompiles == 0
    with pytest.raises(Interrupted):
        train(recipe, dataset, tmp_path / "run", callbacks=[At(4, 15)])
    resumed = train(recipe, dataset, tmp_path / "run", resume=True)
    assert resumed.result.resumed_from == 5 and resumed.result.recompiles == 0
    assert same(weights(resumed), weights(straight))


@pytest.mark.usefixtures("quick_backend")
def test_graphs_are_compiled_before_the_first_step_also_without_warm_up(dataset: Dataset, tmp_path: Path) -> None:
    result = train(tiny(**CHANGING | {"schedule": {"warmup_steps": 0}}), dataset, tmp_path / "run").result
    assert (result.compiled["enabled"], result.warmup_steps, result.recompiles) == (True, 0, 0)


@pytest.mark.usefixtures("quick_backend")
def test_a_recompilation_would_be_counted(dataset: Dataset, tmp_path: Path) -> None:
    """The counter can fail: a shape that warm-up did not see is noticed."""

    class Intruder(Log):
        def on_step(self, info: Any, fraction: float, model: Any) -> None:
            if info.step == 3:
                model(torch.zeros(1, 7, dtype=torch.long), torch.zeros(1, 7, dtype=torch.long)).backward()
                model.zero_grad()

    result = train(tiny(**CHANGING), dataset, tmp_path / "run", callbacks=[Intruder()]).result
    assert result.recompiles > 0


def broken_backend(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no code generator today")


def test_a_compile_failure_falls_back_and_says_why(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_backend(monkeypatch, broken_backend)
    log = Log()
    output = train(tiny(**CHANGING), dataset, tmp_path / "run", callbacks=[log])
    assert not output.result.compiled["enabled"]
    assert any("compiling failed" in note and "no code generator today" in note for note in log.notes)
    monkeypatch.undo()
    uncompiled = CHANGING["train"] | {"compile": "off"}
    eager = train(tiny(**CHANGING | {"train": uncompiled}), dataset, tmp_path / "eager")
    assert same(weights(output), weights(eager)), "the failed attempt left no trace"


def test_an_error_of_the_model_is_not_taken_for_a_compile_error(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def no_memory(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            raise MemoryError("out of memory")

        return run

    use_backend(monkeypatch, no_memory)
    with pytest.raises(MemoryError):
        train(tiny(**CHANGING), dataset, tmp_path / "run")


def decide(**changes: Any) -> compiling.CompilePlan:
    return compiling.decide(tiny(**changes), parameters=2_000_000, graphs=1, device="cpu", spent=10.0)


def test_auto_compiles_only_where_it_pays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    auto = {"compile": "auto"}
    short = decide(train=auto, budget={"seconds": 60.0, "steps": 0})
    assert not short.enabled and "would not pay" in short.reason and short.cache == "cold"
    assert decide(train=auto, budget={"seconds": 36_000.0, "steps": 0}).enabled
    assert not decide(train=auto, budget={"steps": 20}).enabled
    assert decide(train={"compile": "on"}, budget={"seconds": 60.0, "steps": 0}).enabled
    assert not decide(train={"compile": "off"}, budget={"seconds": 36_000.0, "steps": 0}).enabled


def test_no_compiler_no_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    plan = decide(train={"compile": "on"})
    assert not plan.enabled and "C++ compiler" in plan.reason


def test_the_cache_is_cold_until_something_is_in_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert compiling.cache_state() == "cold"
    kernel = tmp_path / "cache" / "ab" / "kernel.cpp"
    kernel.parent.mkdir(parents=True)
    assert compiling.cache_state() == "cold"
    kernel.write_text("int main;")
    assert compiling.cache_state() == "warm"


def test_the_cache_folder_is_the_compilers_own() -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    assert str(compiling.cache_folder()) == cache_dir()


def test_a_user_without_a_name_has_a_compile_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(getpass, "getuser", nobody)
    assert compiling.cache_folder().name == f"torchinductor_uid_{os.getuid()}"


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_nothing_is_compiled_after_warm_up_with_the_real_compiler(dataset: Dataset, tmp_path: Path) -> None:
    torch._dynamo.reset()
    output = train(tiny(**CHANGING), dataset, tmp_path / "run")
    assert output.result.compiled["enabled"] and output.result.recompiles == 0
