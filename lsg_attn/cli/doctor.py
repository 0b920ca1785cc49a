"""`lsg-attn doctor`: what is installed, which implementation runs and why, and whether it computes what it should."""

from __future__ import annotations

import platform
import time
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console

from ..arguments import checked_call
from ..dispatch import choice_of, reasons_against
from ..pattern import SPARSITY_TYPES, LSGPattern
from ..testing import TOLERANCES, assert_close, make_inputs, run_attention, run_reference
from .output import print_table

_PACKAGES = ("lsg-attn", "torch", "triton", "transformers", "einops", "numpy")
# Of the self-check: two blocks and more, so that there are compressed keys, and a last block that is not full.
_CHECKED_TOKENS, _CHECKED_BLOCK, _CHECKED_GLOBALS = 5 * 32 + 7, 32, 2


def run_doctor(
    console: Console, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, pattern: LSGPattern
) -> bool:
    """Print all that decides how a call is answered, and check the answers; whether all of these are right.

    ``shape``: heads, tokens and head_dim of the call.
    """
    rows = [{"package": name, "version": _version(name)} for name in _PACKAGES]
    print_table(console, [{"package": "Python", "version": platform.python_version()}, *rows])
    console.print(f"CPU: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads", markup=False)
    for i in range(torch.cuda.device_count()):
        console.print(f"GPU {i}: {torch.cuda.get_device_name(i)}", markup=False)
    heads, tokens, head_dim = shape
    query = torch.zeros(1, heads, pattern.num_global_tokens + tokens, head_dim, dtype=dtype, device=device)
    call = checked_call(query, query, query, pattern, None, 0.0, None, None, None)
    chosen = choice_of(call)
    console.print(
        f'\nFor {tuple(query.shape)}, {dtype}, {device}, {pattern.sparsity_type!r}, implementation="auto" takes '
        f"{chosen!r}:",
        markup=False,
        highlight=False,
    )
    against = reasons_against(call)
    for name, reasons in against.items():
        console.print(f"  {name!r}: {'; '.join(reasons) or 'can run'}", markup=False, highlight=False)
    return _check(console, [name for name, reasons in against.items() if not reasons], dtype, device)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _check(console: Console, implementations: list[str], dtype: torch.dtype, device: torch.device) -> bool:
    """Compare outputs and gradients of every type with the reference's in float64, and say what came out."""
    start, failures = time.perf_counter(), []
    length = _CHECKED_GLOBALS + _CHECKED_TOKENS
    inputs = make_inputs(1, 4, length, 64, dtype, "right", num_kept=_CHECKED_GLOBALS + 1)
    for sparsity_type in SPARSITY_TYPES:
        pattern = LSGPattern(_CHECKED_BLOCK, _CHECKED_BLOCK, 4, sparsity_type, _CHECKED_GLOBALS)
        expected = run_reference(inputs, pattern)
        for name in implementations:
            got = run_attention(type(inputs)(*(x.to(device) for x in inputs)), pattern, implementation=name)
            for what, x in expected.items():
                try:
                    assert_close(what, got[what].cpu(), x, TOLERANCES[dtype])
                except AssertionError as error:
                    failures.append(f"{name!r}, {sparsity_type}: {error}")
    for failure in failures:
        console.print(failure, markup=False, highlight=False)
    result = "all within the tolerance" if not failures else f"{len(failures)} WRONG"
    console.print(
        f"Self-check of {', '.join(implementations)} against the reference in float64, {len(SPARSITY_TYPES)} types, "
        f"with gradients: {result} ({time.perf_counter() - start:.1f} s)",
        markup=False,
        highlight=False,
    )
    return not failures
