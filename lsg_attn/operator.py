"""The operator that torch.compile and torch.export see: above the fused and the block-wise code, the device chooses."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops
from .blockwise.attention import blockwise_backward, blockwise_forward
from .call import Call, Section
from .checks import refuse_second_derivative
from .fused.results import Saved, allocate_saved, to_save
from .packing import attend_each, sequences
from .pattern import LSGPattern

_OPTIONS = (
    "float dropout_p, float scale, int block_size, int sparse_block_size, int sparsity_factor, str sparsity_type, "
    "int num_global_tokens, int lsh_num_pre_rounds, int lsh_seed, bool causal, int first_head"
)
_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attention_mask, Tensor? seed, Tensor[]? projections, "
    "Tensor? cu_seqlens, SymInt max_seqlen, SymInt[]? section"
)
_SCHEMA = f"({_INPUTS}, {_OPTIONS}) -> Tensor[]"
_BACKWARD_SCHEMA = f"(Tensor dout, Tensor? dlse, Tensor[] results, {_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"


def operator_attention(call: Call) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp by the operator: by the kernels on a GPU, block-wise on a CPU."""
    out, lse, *_ = ops.attention(*_arguments(call))
    return out, lse


def _arguments(call: Call) -> tuple[Any, ...]:
    """A call as the operator takes it: the reverse of :func:`_call`."""
    pattern = call.pattern
    return (
        call.query,
        call.key,
        call.value,
        call.attention_mask,
        call.seed,
        list(call.projections) or None,  # AOTInductor gives back an empty list as None
        call.cu_seqlens,
        call.max_seqlen,
        None if call.section is None else [int(x) if isinstance(x, bool) else x for x in call.section],
        call.dropout_p,
        call.scale,
        pattern.block_size,
        pattern.sparse_block_size,
        pattern.sparsity_factor,
        pattern.sparsity_type,
        pattern.num_global_tokens,
        pattern.lsh_num_pre_rounds,
        pattern.lsh_seed,
        pattern.causal,
        call.first_head,
    )


def _call(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, seed: Tensor | None,
    projections: list[Tensor] | None, cu_seqlens: Tensor | None, max_seqlen: int, section: list[int] | None,
    dropout_p: float, scale: float, *fields: Any,
) -> Call:  # fmt: skip
    """The operator's arguments as a call."""
    inputs = (query, key, value, attention_mask, seed, tuple(projections or ()))
    *of_pattern, first_head = fields
    pattern, part = _pattern(*of_pattern), None
    if section is not None:
        first_token, num_tokens, start, stop, has_globals = section
        part = Section(first_token, num_tokens, start, stop, bool(has_globals))
    return Call(*inputs, dropout_p, scale, pattern, first_head, cu_seqlens, max_seqlen, part)


_pattern = lru_cache(maxsize=32)(LSGPattern)  # whose checks take as long as a small tensor operator


def _attention(*arguments: Any) -> list[Tensor]:
    """The operator: on a GPU the kernels, returning what is ``Saved``; on a CPU the block-wise code, out and lse."""
    call = _call(*arguments)
    if call.query.is_cuda:
        from .fused.forward import launch_forward  # here, as importing lsg_attn does not import triton

        return list(to_save(call, launch_forward(call)))
    with torch.autocast(call.query.device.type, enabled=False):
        return list(attend_each(blockwise_forward, call))


def _attention_backward(
    dout: Tensor, dlse: Tensor | None, results: list[Tensor], *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value, from those of out and of lse, and what the operator returned."""
    call = _call(*arguments)
    if call.query.is_cuda:
        from .fused.backward import launch_backward

        return launch_backward(call, Saved(*results), dout, dlse)
    with torch.autocast(call.query.device.type, enabled=False):
        if call.cu_seqlens is None:
            return blockwise_backward(call, results[1], dout, dlse)
        return _backward_of_packed(call, results[1], dout, dlse)


def _backward_of_packed(
    call: Call, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of the packed query, key and value; see :func:`blockwise_backward`."""
    dquery, dkey, dvalue = grads = [torch.empty_like(x) for x in (call.query, call.key, call.value)]
    for rows, part in sequences(call):
        dlse_of_part = None if dlse is None else dlse[:, :, rows]
        of_part = blockwise_backward(part, lse[:, :, rows], dout[:, :, rows], dlse_of_part)
        for grad, x in zip(grads, of_part, strict=True):
            grad[:, :, rows] = x
    return dquery, dkey, dvalue


def _attention_fake(*arguments: Any) -> list[Tensor]:
    """Shapes, dtypes and strides of what the operator returns."""
    call = _call(*arguments)
    if call.query.is_cuda:
        return list(allocate_saved(call))
    batch, heads, length, head_dim = call.query.shape
    out = call.query.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    return [out, call.query.new_empty(batch, heads, length, dtype=torch.promote_types(out.dtype, torch.float32))]


def _attention_backward_fake(
    dout: Tensor, dlse: Tensor | None, results: list[Tensor], query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes, dtypes and strides of the gradients."""
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Keep for the backward the operator's inputs and all that it returned."""
    query, key, value, attention_mask, seed, projections, cu_seqlens, *ctx.options = inputs
    ctx.num_projections = len(projections or ())
    ctx.save_for_backward(query, key, value, attention_mask, seed, cu_seqlens, *(projections or ()), *output)
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    """The gradients of the operator's inputs; of all three, as each needs most of what the others do."""
    query, key, value, attention_mask, seed, cu_seqlens, *others = ctx.saved_tensors
    count = ctx.num_projections
    projections, results = others[:count] or None, others[count:]
    none = (None, None, None if projections is None else [None] * count, None, *(None for _ in ctx.options))
    dout, dlse, *_ = grads
    if dout is None and dlse is None:
        return None, None, None, *none
    dout = torch.zeros_like(results[0]) if dout is None else dout
    dquery, dkey, dvalue = ops.attention_backward(
        dout, dlse, results, query, key, value, attention_mask, seed, projections, cu_seqlens, *ctx.options
    )
    return dquery, dkey, dvalue, *none


_operator = torch.library.custom_op(add_op_namespace_prefix("attention"), _attention, mutates_args=(), schema=_SCHEMA)
_operator.register_fake(_attention_fake)
_operator.register_autograd(_differentiate, setup_context=_save)
_backward_operator = torch.library.custom_op(
    add_op_namespace_prefix("attention_backward"), _attention_backward, mutates_args=(), schema=_BACKWARD_SCHEMA
)
_backward_operator.register_fake(_attention_backward_fake)
_backward_operator.register_autograd(lambda ctx, *grads: refuse_second_derivative())
