"""bench.static's keys: a comment changes none, and whatever may compile differently changes one."""

import importlib.util
import itertools
import sys
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import triton

from bench.static import compile as static
from bench.static import key as static_key
from bench.static.calls import Kernel, Label
from bench.static.key import key_of, source_of
from lsg_attn.fused.launch import Launch
from lsg_attn.fused.schedules import Tuning

HELPERS = """
import triton
import triton.language as tl

BIAS = tl.constexpr(2)


@triton.jit
def shifted(x, by: tl.constexpr = 1):
    return x + by


@triton.jit
def deep(x):
    return x + BIAS
"""

KERNEL = """
from typing import NamedTuple

import triton
import triton.language as tl

from . import helpers
from .helpers import deep

FACTOR = tl.constexpr(3)
FORMAT = tl.float32


class Pair(NamedTuple):
    left: tl.tensor
    right: tl.tensor


@triton.jit
def step(x):
    return x * 2


@triton.jit
def other_step(x):
    return x * 5


@triton.jit
def walk(x, STEP: tl.constexpr):
    return STEP(x)


@triton.jit
def kernel(x_ptr, n, SIZE: tl.constexpr, LAST: tl.constexpr):
    offs = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offs, mask=offs < n)
    x = walk(x, STEP=step)
    pair = Pair(deep(x), helpers.shifted(x))
    x = (pair.left + pair.right).to(FORMAT) * FACTOR + helpers.BIAS
    tl.store(x_ptr + offs, LAST(x), mask=offs < n)
"""

_numbers = itertools.count()


@pytest.fixture
def launch_of(tmp_path):
    """A launch of ``kernel`` from a new package with this source."""
    names = []

    def make(kernel=KERNEL, helpers=HELPERS, arguments=None):
        package = f"planted_{next(_numbers)}"
        names.append(package)
        folder = tmp_path / package
        folder.mkdir()
        for name, source in {"__init__": "", "helpers": helpers, "kernels": kernel}.items():
            (folder / f"{name}.py").write_text(source)
        spec = importlib.util.spec_from_file_location(package, folder / "__init__.py")
        sys.modules[package] = importlib.util.module_from_spec(spec)
        module = importlib.import_module(f"{package}.kernels")
        if arguments is None:
            x = torch.empty(64, dtype=torch.float32, device="meta")
            arguments = {"x_ptr": x, "n": 50, "SIZE": 64, "LAST": module.step}
        return Launch(module.kernel, 1, arguments, Tuning(4, 2))

    yield make
    for name in [name for name in sys.modules if name.split(".")[0] in names]:
        del sys.modules[name]


def edited(source, old, new):
    assert source.count(old) == 1
    return source.replace(old, new)


UNCHANGED = {
    "another file": {},
    "comments and blank lines": {
        "kernel": "# a first line\n\n\n" + edited(KERNEL, "    x = walk(", "    # the step\n\n    x = walk(")
    },
    "a kernel's docstring": {"kernel": edited(KERNEL, "    offs = tl", '    """What it does."""\n    offs = tl')},
    "a step's docstring": {"kernel": edited(KERNEL, "    return x * 2", '    """Doubled."""\n    return x * 2')},
    "a callee's docstring and comment": {
        "helpers": edited(HELPERS, "    return x + BIAS", '    """Of two\n    lines."""\n    return x + BIAS  # biased')
    },
    "formatting": {"kernel": edited(KERNEL, "(x_ptr, n, SIZE", "(\n    x_ptr,\n    n,\n    SIZE")},
    "a function that it does not use": {"kernel": edited(KERNEL, "x * 5", "x * 6")},
}

CHANGED = {
    "its body": {"kernel": edited(KERNEL, "tl.arange(0, SIZE)", "tl.arange(0, 2 * SIZE)")},
    "a callee": {"helpers": edited(HELPERS, "x + BIAS", "x - BIAS")},
    "a callee through a module": {"helpers": edited(HELPERS, "x + by", "x - by")},
    "a callee's default": {"helpers": edited(HELPERS, "by: tl.constexpr = 1", "by: tl.constexpr = 4")},
    "its constant": {"kernel": edited(KERNEL, "tl.constexpr(3)", "tl.constexpr(4)")},
    "its dtype": {"kernel": edited(KERNEL, "FORMAT = tl.float32", "FORMAT = tl.float16")},
    "a constant's type": {"kernel": edited(KERNEL, "tl.constexpr(3)", "tl.constexpr(3.0)")},
    "a callee's constant": {"helpers": edited(HELPERS, "tl.constexpr(2)", "tl.constexpr(7)")},
    "a step's body": {"kernel": edited(KERNEL, "return x * 2", "return x * 4")},
    "another step": {"kernel": edited(KERNEL, "STEP=step", "STEP=other_step")},
    "what walks": {"kernel": edited(KERNEL, "return STEP(x)", "return STEP(STEP(x))")},
    "a named tuple's fields": {
        "kernel": edited(
            KERNEL, "    left: tl.tensor\n    right: tl.tensor", "    right: tl.tensor\n    left: tl.tensor"
        )
    },
    "noinline": {"helpers": edited(HELPERS, "@triton.jit\ndef deep", "@triton.jit(noinline=True)\ndef deep")},
}


@pytest.mark.parametrize("change", UNCHANGED.values(), ids=UNCHANGED)
def test_what_does_not_change_a_key(change, launch_of):
    assert key_of(launch_of(**change), "sm_90") == key_of(launch_of(), "sm_90")


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_what_changes_a_key(change, launch_of):
    assert key_of(launch_of(**change), "sm_90") != key_of(launch_of(), "sm_90")


def test_arguments_options_target_and_version_change_a_key(launch_of, monkeypatch):
    launch = launch_of()
    other_step = sys.modules[launch.kernel.__module__].other_step
    half = torch.empty(64, dtype=torch.float16, device="meta")
    changed = [
        replace(launch, arguments={**launch.arguments, **change})
        for change in ({"x_ptr": half}, {"n": 48}, {"n": 1}, {"n": 1 << 40}, {"SIZE": 32}, {"LAST": other_step})
    ]
    changed += [replace(launch, tuning=tuning) for tuning in (Tuning(8, 2), Tuning(4, 3))]
    keys = [key_of(x, "sm_90") for x in (launch, *changed)] + [key_of(launch, "sm_100")]
    monkeypatch.setattr(triton, "__version__", "0.0.0")
    keys.append(key_of(launch, "sm_90"))
    assert len(set(keys)) == len(changed) + 3
    # what a run would not compile again has the same key
    assert key_of(replace(launch, arguments={**launch.arguments, "n": 51}, programs=7), "sm_90") == keys[-1]


def test_the_code_that_reads_binaries_is_part_of_a_key(launch_of, monkeypatch):
    launch = launch_of()
    key = key_of(launch, "sm_90")
    monkeypatch.setattr(static_key, "code_of_figures", lambda: "read otherwise")
    assert key_of(launch, "sm_90") != key


def test_what_a_key_cannot_cover_is_an_error(launch_of):
    source = edited(KERNEL, "FORMAT = tl.float32", "FORMAT = object()")
    with pytest.raises(TypeError, match="covers functions, named tuples and constants, not <object"):
        key_of(launch_of(source), "sm_90")


@pytest.mark.parametrize(
    "change",
    [{}, UNCHANGED["a kernel's docstring"], UNCHANGED["a callee's docstring and comment"], CHANGED["a callee"]],
    ids=["nothing", "docstring", "callee's docstring and comment", "callee's body"],
)
def test_a_comment_does_not_invalidate_a_compiled_result(change, launch_of, tmp_path, monkeypatch):
    """The first result comes from the compiler, and the second from the cache unless the code changed."""

    class Call(NamedTuple):
        launch: Launch

        def launches(self):
            return [("forward", self.launch)]

    def compiled(launch):
        label = Label("kernel", *["none"] * 8, target="sm_90")
        return static.figures_of(key_of(launch, "sm_90"), Kernel(label, Call(launch), 0))

    monkeypatch.setattr(static, "_CACHE", tmp_path / "cache")
    first = compiled(launch_of())
    assert first.registers > 0

    def fail(*_, **__):
        raise RuntimeError("compiled again")

    monkeypatch.setattr(triton, "compile", fail)
    second = compiled(launch_of(**change))
    if change == CHANGED["a callee"]:
        assert second.endswith("RuntimeError: compiled again")
    else:
        assert second == first


class Rows(NamedTuple):
    ptr: torch.Tensor
    strides: tuple[int, int]


class Columns(NamedTuple):
    ptr: torch.Tensor
    steps: tuple[int, int]


TUPLES = """
import triton
import triton.language as tl


@triton.jit
def kernel(rows, n):
    offs = tl.arange(0, 64)
    x = tl.load(rows.ptr + offs * rows.strides[1], mask=offs < n)
    tl.store(rows.ptr + offs * rows.strides[0], x, mask=offs < n)
"""


def test_named_tuples_as_arguments(launch_of):
    x = torch.empty(64, 64, dtype=torch.float32, device="meta")
    launches = [
        launch_of(TUPLES, arguments={"rows": rows, "n": 50})
        for rows in (Rows(x, x.stride()), Columns(x, x.stride()), (x, x.stride()))
    ]
    source = source_of(launches[0])
    assert source.signature == {"rows": Rows("*fp32", ("i32", "constexpr")), "n": "i32"}
    assert source.constants == {(0, 1, 1): 1}
    assert set(source.attrs) == {(0, 0), (0, 1, 0)}
    assert static.compile_and_read(source, "sm_90", launches[0].options).registers > 0
    # the names of fields count
    assert len({key_of(launch, "sm_90") for launch in launches}) == len(launches)
