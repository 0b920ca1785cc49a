"""The key of a compiled kernel: everything that decides its figures, and nothing else.

Comments, docstrings, formatting, line numbers and the files that functions are in do not change a key.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import symtable
from collections.abc import Iterator
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from triton.compiler import ASTSource
from triton.runtime.jit import JITCallable

from bench.static import figures
from lsg_attn.fused.launch import Launch


def key_of(launch: Launch, target: str) -> str:
    """The key, 16 hexadecimal digits, of a launch's kernel compiled for ``target``."""
    source = source_of(launch)
    parts = (source.fn, source.signature, source.constants, source.attrs, launch.options, target, triton.__version__)
    return _digest(_describe(parts), code_of_figures())[:16]


def source_of(launch: Launch) -> ASTSource:
    """The compiler's input for a launch, specialised as a run would be; tensors count as 16-byte aligned."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def specialize(value: Any, path: tuple[int, ...], is_specialized: bool) -> Any:
        if value is None or (is_specialized and isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            types = (specialize(x, (*path, i), True) for i, x in enumerate(value))
            return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, torch.Tensor) or (is_specialized and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return "*" + _TYPES[value.dtype]
        return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"

    for i, param in enumerate(launch.kernel.params):
        value = launch.arguments[param.name]
        if param.is_constexpr:
            constants[i,] = value
            signature[param.name] = "constexpr"
        else:
            signature[param.name] = specialize(value, (i,), not param.do_not_specialize)
    return ASTSource(launch.kernel, signature, constants, attributes)


_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.bool: "i1",
}


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@functools.cache
def code_of_figures() -> str:
    """The code that reads binaries."""
    return _code(ast.parse(Path(figures.__file__).read_text(encoding="utf-8")))


@functools.cache
def _digest_of_function(function: JITCallable) -> str:
    """The digest of a jit function: its code, its defaults, and every global it uses, functions that it calls too."""
    code = _code(function.parse())
    defaults = [parameter.default for parameter in inspect.signature(function.fn).parameters.values()]
    used = _globals_used(code, function.get_capture_scope())
    return _digest(code, _describe(defaults), _describe(used), str(getattr(function, "noinline", False)))


def _code(tree: ast.Module) -> str:
    """The code of a tree, without comments and docstrings. The tree loses its docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _globals_used(code: str, scope: dict[str, Any]) -> dict[str, Any]:
    """What a function's code takes from outside it, by name; what it takes from a module, by dotted name."""
    module = symtable.symtable(code, "<kernel>", "exec")
    names = {name for function in module.get_children() for name in _global_names(function)}
    found = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Name, ast.Attribute)):
            name = ast.unparse(node)
            root, *attributes = name.split(".")
            value = scope.get(root) if root in names else None
            for attribute in attributes:
                value = getattr(value, attribute, None) if isinstance(value, ModuleType) else None
            if value is not None and not isinstance(value, ModuleType):
                found[name] = value
    return found


def _global_names(table: symtable.SymbolTable) -> Iterator[str]:
    """The names that a scope, and the scopes in it, do not define."""
    yield from (symbol.get_name() for symbol in table.get_symbols() if symbol.is_global())
    for child in table.get_children():
        yield from _global_names(child)


def _describe(value: Any) -> str:
    """A value as text that is the same in every process and differs between values that may compile differently."""
    if isinstance(value, (JITCallable, FunctionType, BuiltinFunctionType, type)) and _is_library(value):
        return f"{value.__module__}.{value.__name__}"
    if isinstance(value, JITCallable):
        return _digest_of_function(value)
    if isinstance(value, tl.constexpr):
        return f"constexpr({_describe(value.value)})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_describe(k)}: {_describe(x)}' for k, x in value.items())}}}"
    if isinstance(value, (tuple, list)):
        fields = getattr(value, "_fields", "")
        return f"{type(value).__name__}{fields}[{', '.join(map(_describe, value))}]"
    if isinstance(value, type) and hasattr(value, "_fields") and hasattr(value, "_field_defaults"):
        return f"{value.__name__}{value._fields}{_describe(value._field_defaults)}"
    if value is None or value is inspect.Parameter.empty or isinstance(value, (bool, int, float, str, tl.dtype)):
        return repr(value)
    raise TypeError(f"a kernel's key covers functions, named tuples and constants, not {value!r}")


def _is_library(value: Any) -> bool:
    """Whether a function or a class comes with Triton, whose version is in each key, or with Python."""
    return value.__module__.split(".")[0] in ("triton", "math", "builtins")
