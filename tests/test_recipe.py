"""Recipes: what they resolve to, where values come from, and what a mistake is answered with."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from paramgolf.errors import GolfError
from paramgolf.recipe.fromenv import from_command_line
from paramgolf.recipe.load import from_table, load_recipe, recipe_names, resolve, to_table, to_toml
from paramgolf.recipe.show import recipe_text

PUBLISHED = ("baseline", "pr107", "pr114", "pr128", "pr137", "pr137-script")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_survives_its_own_file(name: str) -> None:
    recipe = load_recipe(name)
    assert from_table(to_table(recipe)) == recipe
    assert from_table(tomllib.loads(to_toml(recipe))) == dataclasses.replace(recipe, extends="")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_keep_the_challenge_rules(name: str) -> None:
    budget = load_recipe(name).budget
    assert (budget.seconds, budget.bytes, budget.clock) == (600.0, 16_000_000, "challenge")
    assert load_recipe(name).pack.count == "challenge"


def test_children_inherit_and_the_origin_is_known(tmp_path: Path) -> None:
    child = tmp_path / "mine.toml"
    child.write_text('extends = "pr128"\n[model]\nmlp_hidden = 640\n')
    resolved = resolve(str(child), ["optim.matrix_lr=0.5"])
    recipe = resolved.recipe
    assert (recipe.name, recipe.model.mlp_hidden, recipe.optim.matrix_lr) == ("mine", 640, 0.5)
    assert recipe.train.seq_len == 4096  # from pr128
    assert resolved.origin["model.mlp_hidden"] == "mine.toml"
    assert resolved.origin["train.seq_len"] == "pr128.toml"
    assert resolved.origin["optim.matrix_lr"].startswith("override")
    assert "mlp_hidden = 640   # mine.toml" in recipe_text(resolved)
    replaced = recipe_text(
        resolve(str(child), ["quant.grids.int6={bits = 5}", "model.parts={value_embed = {dim = 8}}"])
    )
    assert "grids.int6.bits = 5   # override quant.grids.int6=" in replaced
    assert "parts.value_embed.dim = 8   # override model.parts=" in replaced


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("modle.dim=3", ["modle", "did you mean 'model'"]),
        ("model.mlp_hiden=3", ["model.mlp_hiden", "did you mean 'mlp_hidden'"]),
        ("model.dim=0", ["model.dim", "greater than or equal to 1", "override model.dim=0"]),
        ("model.dim=wide", ["model.dim", "'wide'", "integer"]),
        ('quant.grids.int6={bits = 5, clip = "no"}', ["quant.grids.int6.clip", "set by override quant.grids.int6="]),
        ("budget.seconds=nan", ["budget.seconds", "finite"]),
        ("train.dtype=float8", ["train.dtype", "'float32' or 'bfloat16'"]),
        ("quant.qat=int5", ["quant.qat", "int5", "did you mean 'int"]),
        ("dim=3", ["section.key=value"]),
        ("model.dim=9999999999", ["model.dim", "less than or equal to 1048576"]),
        ("model.num_layers=1000000000", ["model.num_layers", "less than or equal to 4096"]),
        ("model.loop_extra=1000000000", ["model.loop_extra"]),
        ("train.threads=1000000000", ["train.threads"]),
        ("score.lanes=1000000000", ["score.lanes", "65536"]),
        ("train.seed=100000000000000000000", ["train.seed"]),
        ("budget.steps=" + "9" * 400, ["budget.steps", "..."]),
        ("budget.steps=" + "9" * 5000, ["budget.steps", "..."]),  # more digits than Python reads
        ("model.dim=" + "[" * 5000, ["model.dim", "..."]),
        ("model.dim", ["section.key=value"]),
        ("stages.0.at=1", ["stages", "recipe file"]),
        ("model.dim=256\nfoo=1", ["model.dim=256 foo=1", "goes on after its value"]),
        ("model.parts." + "a." * 1500 + "a=1", ["model.parts.a", "nested more than 8 deep"]),
        ("model.parts.x.y=" + "[" * 50 + "]" * 50, ["model.parts.x.y", "nested more than 8 deep"]),
        ("model.parts.x.y=1979-05-27", ["model.parts.x.y = 1979-05-27"]),
        ("model.parts.x.y=[1, {z = inf}]", ["model.parts.x.y.1.z = inf", "finite"]),
        ("ngram.levels=[{strength = 1e-322, discount = 0}]", ["ngram.levels, order 1", "impossible"]),
    ],
)
def test_a_mistake_is_named(override: str, words: list[str]) -> None:
    with pytest.raises(GolfError) as caught:
        load_recipe("pr128", [override])
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and len(message) < 400


def test_unknown_and_broken_recipes(tmp_path: Path) -> None:
    with pytest.raises(GolfError, match="did you mean 'pocket'"):
        load_recipe("pokcet")
    with pytest.raises(GolfError, match="cannot read recipe file"):
        load_recipe(str(tmp_path / "absent.toml"))
    broken = tmp_path / "broken.toml"
    broken.write_text("[model\n")
    with pytest.raises(GolfError, match="not valid TOML"):
        load_recipe(str(broken))
    circle = tmp_path / "circle.toml"
    circle.write_text(f'extends = "{circle}"\n')
    with pytest.raises(GolfError, match="circle"):
        load_recipe(str(circle))
    circle.write_text(f'extends = "../{tmp_path.name}/circle.toml"\n')
    with pytest.raises(GolfError, match="circle"):
        load_recipe(str(circle))
    broken.write_text('extends = "a\\u0000/b"\n')
    with pytest.raises(GolfError, match="cannot read recipe file"):
        load_recipe(str(broken))
    broken.write_text("a = " + "[" * 5000)
    with pytest.raises(GolfError, match="not valid TOML"):
        load_recipe(str(broken))
    broken.write_text('extends = "pocket"\nname = "../elsewhere"\n')
    with pytest.raises(GolfError, match="recipe key name"):
        load_recipe(str(broken))


def test_what_is_nested_or_chained_too_deep_is_refused(tmp_path: Path) -> None:
    deep = tmp_path / "deep.toml"
    for header in ("[model.parts{}]", "[[model.parts{}]]"):
        deep.write_text('extends = "pocket"\n' + header.format(".a" * 1500) + "\nx = 1\n")
        with pytest.raises(GolfError, match=r"deep\.toml: 'model\.parts\.a\S* is nested more than 8 deep"):
            load_recipe(str(deep))
    deep.write_text('extends = "pocket"\n' + "\n".join(f"[[model.parts.{'a.' * i}a]]" for i in range(200)))
    with pytest.raises(GolfError, match="nested more than 8 deep"):
        load_recipe(str(deep))
    for i in range(1200):
        (tmp_path / f"{i}.toml").write_text(f'extends = "{i + 1}.toml"\n')
    (tmp_path / "1200.toml").write_text('extends = "pocket"\n')
    with pytest.raises(GolfError, match=r"0\.toml' extends more than 50 others"):
        load_recipe(str(tmp_path / "0.toml"))
    assert load_recipe(str(tmp_path / "1155.toml")).name == "1155"


def test_files_that_extend_files_are_found_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "base.toml").write_text('extends = "pocket"\ntitle = "base"\n')
    (tmp_path / "mine" / "child.toml").write_text('extends = "base.toml"\n')
    monkeypatch.chdir(tmp_path)
    for name in ("mine/child.toml", str(tmp_path / "mine" / "child.toml")):
        recipe = load_recipe(name)
        assert (recipe.name, recipe.title) == ("child", "base")


def test_an_official_command_line_becomes_overrides() -> None:
    overrides, ignored = from_command_line(
        "RUN_ID=x MLP_HIDDEN=1500 EVAL_STRIDE=64 TIE_EMBEDDINGS=0 QAT=0 torchrun --nproc_per_node=8 train_gpt.py"
    )
    recipe = load_recipe("pr107", overrides)
    assert (recipe.model.mlp_hidden, recipe.score.stride, recipe.quant.qat) == (1500, 64, "")
    assert recipe.model.tie_embeddings is False
    assert ignored == ["RUN_ID"]


def test_derived_variables() -> None:
    overrides, _ = from_command_line("MODEL_DIM=384 MLP_MULT=3 MAX_WALLCLOCK_SECONDS=300 POST_QAT_SECONDS=30")
    recipe = load_recipe("pr107", overrides)
    assert recipe.model.mlp_hidden == 1152
    assert recipe.quant.post_qat_frac == pytest.approx(0.1)


@pytest.mark.parametrize(
    "line",
    [
        "MLP_HIDEN=3 x", "no assignment", "A='open", "MLP_MULT=three", "MLP_MULT=inf",
        "POST_QAT_SECONDS=30 MAX_WALLCLOCK_SECONDS=0",
    ],
)  # fmt: skip
def test_command_lines_that_cannot_be_read(line: str) -> None:
    with pytest.raises(GolfError, match="--from-env"):
        from_command_line(line)
