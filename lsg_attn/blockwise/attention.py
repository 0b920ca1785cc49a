"""The block-wise implementations, "cpp" and "torch": autograd above their steps, forward and backward.

Both go over a few heads and query blocks at a time, and keep nothing of size queries x keys: the backward computes the
probabilities again from q, k and the log-sum-exp.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..call import Call
from ..checks import refuse_second_derivative
from ..compression import Compression
from . import compiled, eager
from .limits import unsupported_reasons

_STEPS = {"cpp": compiled, "torch": eager}


def blockwise_attention(call: Call, implementation: str) -> tuple[Tensor, Tensor]:
    """Block-wise LSG attention and its scores' log-sum-exp, both differentiable once, by "cpp" or "torch".

    Returns:
        out (batch, heads, G+T, head_dim), and lse (batch, heads, G+T) float32 or float64, +inf where a query sees
        nothing.
    """
    call = replace(call, attention_mask=call.keep())  # a copy: the caller may write to its mask before the backward
    inputs = (call.query, call.key, call.value, call.attention_mask, call.seed)
    options = (call.dropout_p, call.scale, call.pattern, call.first_head, None, 0, call.section)
    steps = _STEPS[implementation]
    how = (steps, _threads(call), _compress(steps, call))
    out, lse = _BlockwiseAttention.apply(*inputs, options, *how)  # type: ignore[no-untyped-call]
    return out, lse


def blockwise_forward(call: Call) -> tuple[Tensor, Tensor]:
    """:func:`blockwise_attention` without autograd, by "cpp" if it can; :func:`blockwise_backward` has gradients."""
    steps = _steps_of(call)
    out, lse = steps.forward(call, _compress(steps, call), _threads(call))
    return out, lse


def blockwise_backward(
    call: Call, lse: Tensor, dout: Tensor, dlse: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value of :func:`blockwise_forward`, from its lse and the gradients of both."""
    steps = _steps_of(call)
    dquery, dkey, dvalue = steps.backward(call, _compress(steps, call), _threads(call), lse, dout, dlse)
    return dquery, dkey, dvalue


def _steps_of(call: Call) -> ModuleType:
    return eager if unsupported_reasons(call) else compiled


def _threads(call: Call) -> int:
    """Threads to share heads out over. With dropout it is all heads, in one part.

    The number of threads decides the order of the draws, and may change between a forward and its backward.
    """
    return call.query.shape[1] if call.dropout_p else torch.get_num_threads()


def _compress(steps: ModuleType, call: Call) -> Compression | None:
    with torch.no_grad():
        compression: Compression | None = steps.compress(call)
        return compression


class _BlockwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, seed: Tensor | None,
        options: tuple[Any, ...], steps: ModuleType, threads: int, compression: Compression | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """``options``: the arguments of Call after its tensors; ``threads``: the backward needs the same number."""
        ctx.options, ctx.steps, ctx.threads, ctx.compression = options, steps, threads, compression
        out, lse = steps.forward(Call(query, key, value, attention_mask, seed, (), *options), compression, threads)
        ctx.save_for_backward(query, key, value, attention_mask, seed, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, attention_mask, seed, lse = ctx.saved_tensors
        dout = torch.zeros_like(query) if dout is None else dout
        call = Call(query, key, value, attention_mask, seed, (), *ctx.options)
        with torch.no_grad():
            grads = ctx.steps.backward(call, ctx.compression, ctx.threads, lse, dout, dlse)
        if torch.is_grad_enabled():  # with create_graph=True
            grads = _OnlyOnce.apply(grads, query, key, value, dout, dlse)  # type: ignore[no-untyped-call]
        return *grads, *(None for _ in range(6))


class _OnlyOnce(torch.autograd.Function):
    """Hands gradients on, and refuses to differentiate them."""

    @staticmethod
    def forward(ctx: Any, grads: tuple[Tensor, ...], *_: Tensor | None) -> tuple[Tensor, ...]:
        return grads

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        refuse_second_derivative()
