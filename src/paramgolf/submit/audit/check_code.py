"""Network, external programs, pickle loading, and validation data in training code: read from the syntax tree."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from paramgolf.submit.audit.catalog import Finding, finding
from paramgolf.submit.audit.folder import Submission
from paramgolf.submit.audit.script import Script, call_name

_NET_MODULES = {"requests", "urllib", "socket", "http", "ftplib", "smtplib", "huggingface_hub", "wandb", "aiohttp",
                "httpx", "boto3", "paramiko", "websockets", "urllib3"}  # fmt: skip
_NET_CALLS = {"urlopen", "urlretrieve", "hf_hub_download", "snapshot_download", "create_connection", "load_dataset"}
_NET_PROGRAMS = re.compile(r"(^|[\s/;&|])(curl|wget|pip3?|git|apt|apt-get|scp|ssh|rsync|hf|huggingface-cli)(\s|$)")
_START = {"run", "Popen", "call", "check_call", "check_output", "system", "popen", "getoutput"}
_VAL = re.compile(r"(^|_)val(id|idation)?(_|$)")
_VAL_DATA = re.compile(r"(^|_)val(id|idation)?(_\w+)?_?(tokens?|files?|data|loader|seqs|shards?)(_|$)")
_CALIBRATE = re.compile(r"hessian|calib|gptq", re.I)


def check(submission: Submission) -> Iterator[Finding]:
    for script in submission.code:
        yield from _network(script)
        yield from _programs(script)
        yield from _pickle(script)
        yield from _training_files(script)
        yield from _validation_calls(script)
        yield from _adaptation(script)
    for script in submission.scripts:
        if script not in submission.running:
            calls = [f for f in (*_network(script), *_programs(script)) if f.code.startswith("net-")]
            yield from [finding("net-helper", f.message, f.evidence) for f in calls[:1]]


def _calls(script: Script) -> Iterator[ast.Call]:
    return (node for node in script.nodes if isinstance(node, ast.Call))


def _network(script: Script) -> Iterator[Finding]:
    for node in script.nodes:
        if isinstance(node, ast.Import):
            names = [item.name for item in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        hits = [n for n in names if n.split(".")[0] in _NET_MODULES and n != "urllib.parse"]
        if hits:
            yield finding("net-import", f"imports {', '.join(hits)}", script.at(node.lineno, hits[0]))
    for call in _calls(script):
        full = script.literals.full_name(call.func)
        if call_name(call) in _NET_CALLS or full in ("requests.get", "requests.post", "wandb.init", "socket.socket"):
            yield finding("net-call", f"calls {full or call_name(call)}", script.at(call.lineno, call_name(call)))


def _programs(script: Script) -> Iterator[Finding]:
    for call in _calls(script):
        full = script.literals.full_name(call.func)
        if call_name(call) not in _START or not full.startswith(("subprocess.", "os.", "system", "Popen")):
            continue
        words = [n.value for n in ast.walk(call) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        line = " ".join(words)
        if line.startswith("nvidia-smi"):
            continue
        if _NET_PROGRAMS.search(line):
            yield finding("net-call", f"starts {line[:60]!r}", script.at(call.lineno, call_name(call)))
        else:
            told = repr(line[:60]) if line else "a program that is not determined"
            yield finding("code-external", f"starts {told}", script.at(call.lineno, call_name(call)))


def _pickle(script: Script) -> Iterator[Finding]:
    for call in _calls(script):
        full = script.literals.full_name(call.func)
        keywords = {k.arg: k.value for k in call.keywords}
        safe = keywords.get("weights_only")
        risky = full == "torch.load" and not (isinstance(safe, ast.Constant) and safe.value is True)
        if full in ("numpy.load",) and "allow_pickle" in keywords:
            flag = keywords["allow_pickle"]
            risky = isinstance(flag, ast.Constant) and bool(flag.value)
        if risky or full in ("pickle.loads", "pickle.load", "dill.loads", "dill.load", "joblib.load", "marshal.loads"):
            yield finding("load-pickle", f"{full} without weights_only=True" if full == "torch.load" else full,
                          script.at(call.lineno, "load"))  # fmt: skip


def _names(node: ast.AST) -> set[str]:
    found = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return found | {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}


def _assigned(script: Script) -> Iterator[tuple[str, ast.expr, int]]:
    for node in script.nodes:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target: ast.expr = node.targets[0]
            if isinstance(target, ast.Name | ast.Attribute):
                yield (target.id if isinstance(target, ast.Name) else target.attr), node.value, node.lineno


def _training_files(script: Script) -> Iterator[Finding]:
    for name, value, line in _assigned(script):
        if re.fullmatch(r"train_(files|shards|pattern|glob|data)", name):
            words = [n.value for n in ast.walk(value) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            text = " ".join(words)
            if re.search(r"_val_|/val|_val\b|fineweb_\*", text):
                yield finding("val-train-files", f"{name} is {text[:80]!r}", script.at(line, name))


def _validation_calls(script: Script) -> Iterator[Finding]:
    for call in _calls(script):
        name = call_name(call)
        arguments = [*call.args, *(k.value for k in call.keywords)]
        hits = sorted(n for a in arguments for n in _names(a) if _VAL_DATA.search(n))
        if hits and _CALIBRATE.search(name) and not name.startswith(("log", "print")):
            yield finding("val-calibration", f"{name} is given {', '.join(hits[:3])}", script.at(call.lineno, name))
    for target, value, line in _assigned(script):
        if re.search(r"(^|_)(train|calib\w*)_(loader|stream|data)$", target) and isinstance(value, ast.Call):
            hits = sorted(n for n in _names(value) if _VAL_DATA.search(n))
            if hits:
                yield finding("val-train-loader", f"{target} is built on {', '.join(hits)}", script.at(line, target))


def _adaptation(script: Script) -> Iterator[Finding]:
    nested = _lines_in_ttt(script)
    for function in script.functions:
        if re.search(r"slot|etlb", function.name) or function.lineno in nested:
            continue
        parameters = [a.arg for a in (*function.args.args, *function.args.kwonlyargs)]
        hits = [p for p in parameters if _VAL.search(p) and _VAL_DATA.search(p)]
        updates = [c for c in ast.walk(function) if isinstance(c, ast.Call) and call_name(c) == "backward"]
        trains = any(re.search(r"train_(loader|files|data)|next_batch", name) for name in _names(function))
        if hits and updates and not trains:  # a training loop is given validation data to print its progress
            message = (
                f"{function.name} is given {', '.join(hits)} and calls backward: what it updates is not determined"
            )
            yield finding("val-adapt", message, script.at(updates[0].lineno, "backward"))


def _lines_in_ttt(script: Script) -> set[int]:
    """The lines of `main` and of the functions that say they adapt, and so of every function inside them."""
    holding = [f for f in script.functions if re.search(r"ttt|test_time|^main$", f.name)]
    return {line for f in holding for line in range(f.lineno, (f.end_lineno or f.lineno) + 1)}
