"""The process in which `golf audit --execute` runs somebody's code: no network, little memory, time and disk.

Started by `execute.py` with the source on stdin and a pipe for the answer. It gives up its network first (a namespace
of its own) and leaves the code alone if it cannot. The script is loaded without its `main`, its model built with the
script's own settings and random weights, and the four conditions are checked on what the model gives. What this
cannot stop is said in docs/audit.md.
"""

from __future__ import annotations

import ast
import ctypes
import inspect
import json
import os
import resource
import sys
import types
from typing import Any

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
LIMITS = {resource.RLIMIT_CPU: 300, resource.RLIMIT_DATA: 8 << 30, resource.RLIMIT_FSIZE: 64 << 20,
          resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: 256}  # fmt: skip
TOKENS = 193
_ALIASES = {"dim": "model_dim", "d_model": "model_dim", "n_layer": "num_layers", "n_head": "num_heads"}


class Unknown(Exception):
    """Why it is not determined, in words."""


def confine() -> None:
    """Limits, and no network: Unknown if this system does not let a process give it up."""
    for kind, most in LIMITS.items():
        resource.setrlimit(kind, (most, most))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) and libc.unshare(CLONE_NEWNET):
        reason = os.strerror(ctypes.get_errno())
        raise Unknown(f"this system does not let a process give up its network ({reason}); nothing was run")


def load(source: str) -> types.ModuleType:
    """The script as a module, without what stands under `if __name__ == "__main__"`."""
    _stand_in_for_flash_attention()
    module = types.ModuleType("audited")
    path = os.path.abspath("train_gpt.py")
    with open(path, "w", encoding="utf-8") as stream:  # scripts read themselves
        stream.write(source)
    module.__file__ = path
    sys.modules["audited"] = module
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except BaseException as error:
        raise Unknown(f"loading the script raised {_said(error)}") from None
    return module


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def _stand_in_for_flash_attention() -> None:
    """`flash_attn_func` of FlashAttention-3 on the processor, where the package is not installed."""
    import importlib.util

    import torch.nn.functional as F

    def flash_attn_func(q: Any, k: Any, v: Any, causal: bool = False, **settings: Any) -> Any:
        if set(settings) - {"softmax_scale"}:
            raise NotImplementedError(f"flash_attn_func with {', '.join(settings)}")
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True,
                                           scale=settings.get("softmax_scale"))  # fmt: skip
        return y.transpose(1, 2)

    def not_here(*args: Any, **settings: Any) -> Any:
        raise NotImplementedError("flash_attn_varlen_func needs a GPU")

    for name in ("flash_attn_interface", "flash_attn"):
        if importlib.util.find_spec(name) is None:
            module = types.ModuleType(name)
            module.__dict__.update(flash_attn_func=flash_attn_func, flash_attn_varlen_func=not_here)
            sys.modules[name] = module


def build(module: types.ModuleType, source: str) -> tuple[Any, int]:
    """(the script's model with random weights in evaluation mode, its vocabulary size)."""
    import torch

    model_class = next((c for name in ("GPT", "Model", "Transformer") if (c := vars(module).get(name))), None)
    if not (inspect.isclass(model_class) and issubclass(model_class, torch.nn.Module)):
        raise Unknown("the script has no model class called GPT")
    settings_class = next((c for n in ("Hyperparameters", "Config", "Args") if (c := vars(module).get(n))), None)
    if settings_class is None:
        raise Unknown("the script has no class of hyper-parameters")
    torch.manual_seed(0)
    try:
        settings: Any = settings_class() if inspect.isclass(settings_class) else settings_class
        model = model_class(*_arguments(model_class, settings, source)).float().eval()
        vocab = int(settings.vocab_size)
        with torch.no_grad():
            for parameter in model.parameters():  # outputs that start at zero would hide what flows through them
                parameter.add_(0.05 * torch.randn_like(parameter))
    except Exception as error:
        raise Unknown(f"building its model raised {_said(error)}") from None
    return model, vocab


def _arguments(model_class: type, settings: Any, source: str) -> list[Any]:
    """The values for the constructor: as the script's own call has them, else settings of the same name."""
    called: dict[str, ast.expr] = {}
    positional: list[ast.expr] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == model_class.__name__:
            called = {word.arg: word.value for word in node.keywords if word.arg}
            positional = list(node.args)
            break
    values = []
    parameters = list(inspect.signature(model_class).parameters.values())
    for place, parameter in enumerate(parameters):
        given = positional[place] if place < len(positional) else called.get(parameter.name)
        values.append(_value(parameter, given, settings))
    return values


def _value(parameter: inspect.Parameter, given: ast.expr | None, settings: Any) -> Any:
    if isinstance(given, ast.Attribute) and hasattr(settings, given.attr):
        return getattr(settings, given.attr)
    if isinstance(given, ast.Constant):
        return given.value
    for name in (parameter.name, _ALIASES.get(parameter.name, "")):
        if name and hasattr(settings, name):
            return getattr(settings, name)
    if parameter.name in ("args", "h", "config", "cfg", "hp", "hparams"):
        return settings
    if parameter.default is not inspect.Parameter.empty:
        return parameter.default
    raise Unknown(f"its model wants '{parameter.name}', which the hyper-parameters do not have")


class ModelScorer:
    """The script's model as a scorer that shows its distributions (see score/legality.py). They are caught where the
    model computes its loss, so that nothing of the script needs to be known but `model(x, y)`."""

    def __init__(self, model: Any, vocab_size: int) -> None:
        self.model, self.vocab_size = model, vocab_size
        self._rows: Any = None
        self._at = 0

    def reset(self, stream: Any) -> None:
        import torch
        import torch.nn.functional as F

        ids = torch.as_tensor(stream)[None]
        caught: list[Any] = []
        original = F.cross_entropy

        def watched(logits: Any, target: Any, *args: Any, **settings: Any) -> Any:
            caught.append(logits.detach().float())
            return original(logits, target, *args, **settings)

        F.cross_entropy = watched  # type: ignore[assignment]
        try:
            with torch.no_grad():
                self.model(ids[:, :-1], ids[:, 1:])
        except Exception as error:
            raise Unknown(f"its model raised {_said(error)}") from None
        finally:
            F.cross_entropy = original
        logits = next((t.reshape(-1, t.shape[-1]) for t in caught if t.numel() // t.shape[-1] == len(stream) - 1), None)
        if logits is None:
            raise Unknown("its model computes its loss in a way that shows no distribution for each token")
        self._rows = torch.log_softmax(logits.double(), -1).numpy()
        self._at = 0

    def log_probs(self) -> Any:
        return self._rows[self._at - 1]

    def give(self, token: int) -> None:
        self._at += 1


def examine(source: str) -> dict[str, Any]:
    """{"conditions": {name: [verdict, evidence]}} or {"unknown": why}."""
    from paramgolf.errors import GolfError
    from paramgolf.score.legality import check

    try:
        import numpy as np
        import torch

        torch.set_num_threads(1)
        confine()
        model, vocab = build(load(source), source)
        phrase = np.random.default_rng(0).integers(3, vocab, 24)
        stream = np.concatenate([[1], *(np.roll(phrase, i) for i in range(TOKENS // 24))])
        result = check(ModelScorer(model, vocab), stream, cuts=8)
    except (Unknown, GolfError) as why:
        return {"unknown": str(why)}
    found = {name: [str(f.verdict), f.evidence] for name, f in result.findings.items()}
    return {"conditions": found, "parameters": sum(p.numel() for p in model.parameters())}


def main() -> None:
    answer = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")
    result = examine(sys.stdin.read())
    answer.write(json.dumps(result))
    answer.close()
    os._exit(0)  # whatever threads the script left behind


if __name__ == "__main__":
    main()
