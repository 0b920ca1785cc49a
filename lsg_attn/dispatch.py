"""Which implementation answers a call, and the answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .blockwise import limits as cpp_limits
from .blockwise.attention import blockwise_attention
from .call import Call
from .checks import type_name
from .fused import limits as triton_limits
from .operator import operator_attention
from .packing import attend_each
from .reference import reference_attention

IMPLEMENTATIONS = ("auto", "triton", "cpp", "torch", "reference")


Answer = Callable[[Call, str, bool], "Tensor | tuple[Tensor, Tensor]"]
# What answers calls instead of this process alone, the innermost last: not of a thread, as autograd has others.
_others: list[Answer] = []


@contextlib.contextmanager
def answered_by(other: Answer) -> Iterator[None]:
    """While this is entered, ``other`` gives the answers, also in autograd's threads."""
    _others.append(other)
    try:
        yield
    finally:
        _others.remove(other)


def answer(call: Call, implementation: str, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    """The answer to a checked call: :func:`answer_here`, or that of what it is :func:`answered_by`."""
    return (_others[-1] if _others else answer_here)(call, implementation, return_lse)


def refuse_shared_out(name: str) -> None:
    """Check that a function is not called where processes share out the sequence.

    Raises:
        ValueError: it is.
    """
    if _others:
        raise ValueError(f"{name}: expected whole sequences, but within context_parallel each process has a part")


def draw_seed(call: Call) -> Tensor:
    """A seed of dropout from PyTorch's generator, on the CPU: no device is waited for, and a CUDA graph keeps it.

    Processes that share the heads out may draw the same number: each adds its own.
    """
    seed = torch.randint(1 << 62, (), device="cpu")
    return seed + call.first_head if call.first_head else seed


def answer_here(call: Call, implementation: str, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    """The output of a checked call, and with ``return_lse`` its log-sum-exp. A seed is drawn if it has none.

    Raises:
        TypeError: ``implementation`` is not a string, or ``return_lse`` not a bool.
        ValueError: there is no such implementation, or it cannot run.
    """
    check_implementation(implementation)
    if implementation == "auto" and torch.onnx.is_in_onnx_export():
        implementation = "reference"  # of operators that ONNX has
    if not isinstance(return_lse, bool):
        raise TypeError(f"return_lse: expected a bool, got {type_name(return_lse)}")
    if implementation != "reference":
        if torch._C._are_functorch_transforms_active():
            raise ValueError(
                f"implementation={implementation!r} cannot run under transforms of torch.func; use 'reference'"
            )
        implementation = _choose(implementation, call)
    if call.dropout_p and implementation != "reference" and call.seed is None:
        call = replace(call, seed=draw_seed(call))
    out, lse = _attend(implementation, call)
    if not return_lse:
        return out
    return out, lse.masked_fill(lse == torch.inf, -torch.inf)  # inside, +inf makes the probabilities of such a row 0


def check_implementation(implementation: str, name: str = "implementation") -> None:
    """Check what an argument of that name holds; whether the implementation can run depends on the inputs.

    Raises:
        TypeError: it is not a string.
        ValueError: there is no such implementation.
    """
    if not isinstance(implementation, str):
        raise TypeError(f"{name}: expected a str, got {type_name(implementation)}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{name}: expected 'auto', 'triton', 'cpp', 'torch' or 'reference', got {implementation!r}")


def _attend(implementation: str, call: Call) -> tuple[Tensor, Tensor]:
    if implementation == "operator":
        return operator_attention(call)
    with torch.autocast(call.query.device.type, enabled=False):  # the inputs' dtype is what is asked for
        if implementation == "reference":
            return attend_each(reference_attention, call)
        return attend_each(partial(blockwise_attention, implementation=implementation), call)


def _choose(implementation: str, call: Call) -> str:
    """What all but "reference" come to: "operator", "cpp" or "torch"."""
    if implementation == "torch":
        return "operator" if _has_no_data(call.query) else "torch"
    if implementation == "cpp":
        _refuse(implementation, cpp_limits.unsupported_reasons(call))
    else:
        reasons = triton_limits.unsupported_reasons(call)
        if not reasons:
            return "operator"
        if implementation == "triton":
            _refuse(implementation, reasons)
    if not call.query.is_cuda and (torch.compiler.is_compiling() or _has_no_data(call.query)):
        return "operator"  # runs the block-wise code on a CPU; one node of a graph, where that would be many
    if implementation == "cpp":
        return "cpp"
    return "torch" if cpp_limits.unsupported_reasons(call) else "cpp"


def choice_of(call: Call) -> str:
    """The implementation that ``"auto"`` takes for a call with data."""
    chosen = _choose("auto", call)
    return "triton" if chosen == "operator" else chosen


def reasons_against(call: Call) -> dict[str, list[str]]:
    """Of each implementation but the reference, why it cannot run a call; nothing if it can."""
    return {
        "triton": triton_limits.unsupported_reasons(call),
        "cpp": cpp_limits.unsupported_reasons(call),
        "torch": [],
    }


def _has_no_data(x: Tensor) -> bool:
    """Whether there is only a shape to compute."""
    return x.is_meta or isinstance(x, FakeTensor)


def _refuse(implementation: str, reasons: list[str]) -> None:
    if reasons:
        raise ValueError(f"implementation={implementation!r} cannot run: {'; '.join(reasons)}; use 'auto' or 'torch'")
