"""Reads packed scripts without running them: evaluates literals, base-N decoders and decompressors only.

Every decompression is bounded by `MAX_UNPACKED`, nesting by `MAX_DEPTH`, all layers of a script by one `Budget`.
Anything else in an expression (a call of unknown code, a file, the network) makes it unreadable, which is reported and
never guessed.
"""

from __future__ import annotations

import ast
import base64
import binascii
import bz2
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MAX_UNPACKED = 16 << 20  # bytes; the whole artifact may have 16,000,000
MAX_CODE = 4 << 20  # bytes of source that are parsed
MAX_DEPTH = 4
_MAX_WINDOW = 64 << 20  # bytes of LZMA dictionary; a header may ask for 4 GiB
_LZMA_NAMES = {n: getattr(lzma, n) for n in dir(lzma) if n.startswith(("FORMAT_", "FILTER_", "PRESET_", "CHECK_"))}


class Bomb(Exception):
    """The expression unpacks to more than `MAX_UNPACKED` bytes, or the script to more than its budget."""


class Opaque(Exception):
    """The expression is not made of literals and known decoders."""


@dataclass
class Budget:
    """What may still be spent on one script, its layers together: layers in layers multiply."""

    steps: int = 20_000  # expressions evaluated
    unpacked: int = 8 * MAX_UNPACKED  # bytes of their values; base 85 is decoded at 5 MB/s
    code: int = MAX_DEPTH * MAX_CODE  # characters of layers parsed
    parsed: set[tuple[str, bool]] = field(default_factory=set)  # layers, and whether they are run

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise Bomb  # b = a + a; c = b + b; ... doubles the work with every name

    def unpack(self, size: int) -> None:
        self.unpacked -= size
        if self.unpacked < 0:
            raise Bomb


def _bounded(data: bytes) -> bytes:
    if len(data) > MAX_UNPACKED:
        raise Bomb
    return data


def _lzma(data: bytes, format: int = lzma.FORMAT_AUTO, memlimit: Any = None, filters: Any = None) -> bytes:
    for step in filters or []:
        if not isinstance(step, dict) or int(step.get("dict_size", 0)) > _MAX_WINDOW:
            raise Bomb
    if format == lzma.FORMAT_RAW:
        machine = lzma.LZMADecompressor(format, None, filters)
    else:
        machine = lzma.LZMADecompressor(format, 2 * _MAX_WINDOW, filters)
    return _bounded(machine.decompress(data, MAX_UNPACKED + 1))


def _zlib(data: bytes, wbits: int = zlib.MAX_WBITS, bufsize: int = 0) -> bytes:
    return _bounded(zlib.decompressobj(wbits).decompress(data, MAX_UNPACKED + 1))


def _gzip(data: bytes) -> bytes:
    return _zlib(data, 31)


def _bz2(data: bytes) -> bytes:
    return _bounded(bz2.BZ2Decompressor().decompress(data, MAX_UNPACKED + 1))


_DECOMPRESS: dict[str, Callable[..., bytes]] = {"lzma": _lzma, "zlib": _zlib, "gzip": _gzip, "bz2": _bz2}
_DECODE: dict[str, Callable[..., bytes]] = {
    name: getattr(base64, name)
    for name in ("b85decode", "a85decode", "b64decode", "standard_b64decode", "urlsafe_b64decode", "b32decode",
                 "b16decode")
}  # fmt: skip
_DECODE["unhexlify"] = binascii.unhexlify
_DECODE["fromhex"] = bytes.fromhex
_BROKEN = (ValueError, TypeError, OverflowError, AssertionError, EOFError, MemoryError, lzma.LZMAError, zlib.error,
           OSError)  # fmt: skip


class Literals:
    """A static evaluator over one module: names bound once to literals, imports and their aliases."""

    def __init__(self, tree: ast.Module, budget: Budget) -> None:
        self.modules: dict[str, str] = {}
        self.names: dict[str, ast.expr] = {}
        self.budget = budget
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for item in node.names:
                    self.modules[item.asname or item.name] = item.name
            elif isinstance(node, ast.ImportFrom):
                for item in node.names:
                    self.modules[item.asname or item.name] = f"{node.module}.{item.name}"
        for statement in tree.body:
            if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                target = statement.targets[0]
                if isinstance(target, ast.Name):
                    self.names[target.id] = statement.value

    def value(self, node: ast.expr, depth: int = 0) -> Any:
        """The value of `node`. Raises Opaque, or Bomb beyond the bounds."""
        self.budget.step()
        if depth > 40:
            raise Opaque
        found = self._value(node, depth + 1)
        if isinstance(found, str | bytes):
            self.budget.unpack(len(found))
        return found

    def _value(self, node: ast.expr, down: int) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name) and node.id in self.names:
            return self.value(self.names[node.id], down)
        if isinstance(node, ast.List | ast.Tuple):
            return [self.value(item, down) for item in node.elts]
        if isinstance(node, ast.Dict) and all(node.keys):
            return self._dict(node, down)
        if isinstance(node, ast.Attribute) and node.attr in _LZMA_NAMES:
            return _LZMA_NAMES[node.attr]
        if isinstance(node, ast.UnaryOp | ast.BinOp):
            return self._operation(node, down)
        if isinstance(node, ast.Call):
            return self._call(node, down)
        raise Opaque

    def _dict(self, node: ast.Dict, depth: int) -> dict[Any, Any]:
        pairs = zip(node.keys, node.values, strict=True)
        try:
            return {self.value(k, depth): self.value(v, depth) for k, v in pairs if k}
        except TypeError as error:  # a list is no key
            raise Opaque from error

    def _operation(self, node: ast.UnaryOp | ast.BinOp, depth: int) -> Any:
        """`-1` and `"a" + "b"`; a product could be a bomb."""
        if isinstance(node, ast.UnaryOp):
            inner = self.value(node.operand, depth)
            if isinstance(node.op, ast.USub) and isinstance(inner, int):
                return -inner
        elif isinstance(node.op, ast.Add):
            left, right = self.value(node.left, depth), self.value(node.right, depth)
            if type(left) is type(right) and isinstance(left, str | bytes):
                if len(left) + len(right) > MAX_UNPACKED:
                    raise Bomb
                return left + right
        raise Opaque

    def full_name(self, node: ast.expr) -> str:
        """`lzma.decompress` for `L.decompress` after `import lzma as L`; "" when it is not a plain name."""
        if isinstance(node, ast.Name):
            return self.modules.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            return f"{self.full_name(node.value)}.{node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "__import__":
            first = node.args[0] if node.args else None
            return str(first.value) if isinstance(first, ast.Constant) else ""
        return ""

    def is_decompress(self, node: ast.Call) -> bool:
        return self.full_name(node.func) in {f"{module}.decompress" for module in _DECOMPRESS}

    def _call(self, node: ast.Call, depth: int) -> Any:
        name = self.full_name(node.func)
        module, _, last = name.rpartition(".")
        try:
            if last == "decompress" and module in _DECOMPRESS:
                return self._decompress(module, self._args(node, depth), self._kwargs(node, depth))
            if last in _DECODE and module in ("base64", "binascii", "bytes"):
                return _DECODE[last](*self._args(node, depth))
            if name == "compile" and node.args:
                return self.value(node.args[0], depth)
            if isinstance(node.func, ast.Attribute) and last in ("decode", "encode", "strip"):
                inner = self.value(node.func.value, depth)
                if last == "decode" and isinstance(inner, bytes):
                    return inner.decode("utf-8", "replace")
                if last == "encode" and isinstance(inner, str):
                    return inner.encode()
                if last == "strip" and isinstance(inner, str | bytes):
                    return inner.strip()
        except _BROKEN as error:
            if "emory" in str(error):
                raise Bomb from error
            raise Opaque from error
        raise Opaque

    def _decompress(self, module: str, args: list[Any], kwargs: dict[str, Any]) -> bytes:
        try:
            return _DECOMPRESS[module](*args, **kwargs)
        except (Bomb, *_BROKEN):
            self.budget.unpack(MAX_UNPACKED)  # as much may have been unpacked until it failed
            raise

    def _args(self, node: ast.Call, depth: int) -> list[Any]:
        return [self.value(argument, depth) for argument in node.args]

    def _kwargs(self, node: ast.Call, depth: int) -> dict[str, Any]:
        if any(item.arg is None for item in node.keywords):
            raise Opaque
        return {str(item.arg): self.value(item.value, depth) for item in node.keywords}
