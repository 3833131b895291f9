"""The structure the design promises: imports point one way, codecs need no torch, nothing is unpickled."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import paramgolf

ROOT = Path(paramgolf.__file__).parent

# A module may import modules of its own layer and of those above it in this list. The first prefix that fits decides.
LAYERS = [
    (
        "paramgolf.errors",
        "paramgolf.registry",
        "paramgolf.files",
        "paramgolf.processors",
        "paramgolf.recipe",
        "paramgolf.strict_json",
    ),
    ("paramgolf.data", "paramgolf.dist", "paramgolf.quant.grid"),
    ("paramgolf.model",),
    ("paramgolf.optim",),
    ("paramgolf.score",),
    ("paramgolf.quant", "paramgolf.pack"),
    ("paramgolf.train",),
    ("paramgolf.script",),
    ("paramgolf.api",),
    ("paramgolf.text",),
    ("paramgolf.runner",),
    ("paramgolf.lab", "paramgolf.submit"),
    (
        "paramgolf.cli",
        "paramgolf.cli_data",
        "paramgolf.cli_fit",
        "paramgolf.cli_lab",
        "paramgolf.cli_output",
        "paramgolf.cli_pack",
        "paramgolf.cli_sweep",
        "paramgolf.cli_audit",
        "paramgolf.cli_submit",
        "paramgolf.cli_text",
        "paramgolf.__main__",
    ),
]


def layer(module: str) -> int | None:
    """Index of the layer of a module; the longest prefix wins, None for the package itself."""
    fits = [
        (len(prefix), index)
        for index, prefixes in enumerate(LAYERS)
        for prefix in prefixes
        if module == prefix or module.startswith(f"{prefix}.")
    ]
    return max(fits)[1] if fits else None


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """What the module imports when it runs; imports for the type checker alone are no arrows."""
    names: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.startswith("paramgolf.")}


def test_every_module_has_a_layer() -> None:
    assert [name for name in modules() if name != "paramgolf" and layer(name) is None] == []


def test_imports_point_one_way() -> None:
    wrong = []
    for name, path in modules().items():
        own = layer(name)
        for target in imports(path):
            other = layer(target)
            if own is not None and other is not None and other > own:
                wrong.append(f"{name} imports {target}")
    assert wrong == []


def test_no_import_cycles() -> None:
    known = modules()
    edges = {name: {t for t in imports(path) if t in known and t != name} for name, path in known.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for target in edges[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in known:
        visit(name, ())


def test_nothing_is_unpickled() -> None:
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not forbidden & {alias.name.split(".")[0] for alias in node.names}, name
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in forbidden, name
            if isinstance(node, ast.Attribute) and node.attr == "load":
                assert not (isinstance(node.value, ast.Name) and node.value.id == "torch"), f"{name}: torch.load"
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, f"{name}: allow_pickle"


def test_recipes_and_codecs_need_no_torch() -> None:
    program = (
        "import sys; import paramgolf.recipe.load as r; r.load_recipe('pr137-script')\n"
        "from paramgolf.pack.registry import CODECS; [CODECS[name] for name in CODECS]\n"
        "import paramgolf.pack.container, paramgolf.cli; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
