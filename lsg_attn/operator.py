"""The Triton implementation: what it needs to run, and the operator that torch.compile and export see."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from .blockwise.attention import blockwise_attention, blockwise_backward
from .call import Call, Saved, allocate, to_save
from .compression import lsh_directions
from .masking import full_mask
from .pattern import LSGPattern

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LEAST_CAPABILITY = (8, 0)
_MOST_HEAD_DIM = 256
_MOST_GLOBALS = 512
_MOST_HASHED = 128
_OPTIONS = (
    "float dropout_p, float scale, int block_size, int sparse_block_size, int sparsity_factor, str sparsity_type, "
    "int num_global_tokens, int lsh_num_pre_rounds, int lsh_seed"
)
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? attention_mask, Tensor? seed, Tensor[] projections"
_SCHEMA = f"({_INPUTS}, {_OPTIONS}) -> Tensor[]"
_BACKWARD_SCHEMA = f"(Tensor dout, Tensor[] results, {_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"
_HAS_TRITON = find_spec("triton") is not None


def obstacles(query: Tensor, key: Tensor, value: Tensor, pattern: LSGPattern, scale: float) -> list[str]:
    """Why the kernels can not run on these checked arguments; empty if they can."""
    reasons = []
    if not query.is_cuda:
        reasons.append(f"the tensors are on device {query.device}, the kernels need a CUDA or ROCm device")
    elif torch.version.hip is None and torch.cuda.get_device_capability(query.device) < _LEAST_CAPABILITY:
        reasons.append(f"the GPU's compute capability is below {_LEAST_CAPABILITY}")
    if not _HAS_TRITON:
        reasons.append("triton is not installed")
    if query.dtype not in _DTYPES:
        reasons.append(f"the dtype is {query.dtype}, the kernels take float16, bfloat16 and float32")
    if query.shape[-1] > _MOST_HEAD_DIM:
        reasons.append(f"head_dim is {query.shape[-1]}, the kernels take up to {_MOST_HEAD_DIM}")
    if pattern.num_global_tokens > _MOST_GLOBALS:
        reasons.append(f"num_global_tokens is {pattern.num_global_tokens}, the kernels take up to {_MOST_GLOBALS}")
    if pattern.compression == "lsh" and pattern.chunk > _MOST_HASHED:
        chunk = f"min(block_size, sparse_block_size) = {pattern.chunk}"
        reasons.append(f"lsh hashes chunks of {chunk} tokens, the kernels up to {_MOST_HASHED}")
    if scale <= 0:
        reasons.append(f"scale is {scale}, the kernels take one above 0")
    if has_tangent(query, key, value):
        reasons.append("a gradient by forward mode is asked for, the kernels have those of reverse mode")
    return reasons


def has_tangent(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether autograd's forward mode will ask for a gradient of a call with these inputs."""
    return not torch.compiler.is_compiling() and any(unpack_dual(x).tangent is not None for x in (query, key, value))


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, pattern: LSGPattern, dropout_p: float,
    scale: float, projections: tuple[Tensor, ...] | None,
) -> Tensor:  # fmt: skip
    """LSG attention by the operator; arguments as :func:`lsg_attn.lsg_attention` checked them, without obstacles."""
    # On the CPU, so that its value reaches the launch without waiting for the device; a CUDA graph keeps it.
    seed = torch.randint(1 << 62, (), device="cpu") if dropout_p else None
    out: Tensor = torch.ops.lsg_attn.attention(
        query, key, value, attention_mask, seed, list(projections or ()), dropout_p, scale, *_fields(pattern)
    )[0]
    return out


def _fields(pattern: LSGPattern) -> tuple[Any, ...]:
    """The arguments of LSGPattern in order, as the operator takes them."""
    return (
        pattern.block_size,
        pattern.sparse_block_size,
        pattern.sparsity_factor,
        pattern.sparsity_type,
        pattern.num_global_tokens,
        pattern.lsh_num_pre_rounds,
        pattern.lsh_seed,
    )


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, seed: Tensor | None,
    projections: list[Tensor], dropout_p: float, scale: float, *fields: Any,
) -> list[Tensor]:  # fmt: skip
    """The operator: on a GPU the kernels, returning what is ``Saved``; on a CPU the block-wise code, returning out."""
    pattern, draws = LSGPattern(*fields), 0 if seed is None else int(seed)
    if query.is_cuda:
        from .fused.forward import launch_forward  # here, as importing lsg_attn does not import triton

        directions = _directions(pattern, projections, query) if pattern.compression == "lsh" else ()
        call = Call(query, key, value, attention_mask, pattern, dropout_p, draws, scale, directions)
        return list(to_save(call, launch_forward(call)))
    keep, rounds = full_mask(attention_mask, query), tuple(projections) or None
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        return [blockwise_attention(query, key, value, keep, pattern, dropout_p, scale, rounds, draws)]


def _attention_backward(
    dout: Tensor, results: list[Tensor], query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    seed: Tensor | None, projections: list[Tensor], dropout_p: float, scale: float, *fields: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value, from that of out and what the operator returned."""
    pattern, draws = LSGPattern(*fields), 0 if seed is None else int(seed)
    if query.is_cuda:
        from .fused.backward import launch_backward

        call = Call(query, key, value, attention_mask, pattern, dropout_p, draws, scale)
        return launch_backward(call, Saved(*results), dout)
    keep, rounds = full_mask(attention_mask, query), tuple(projections) or None
    with torch.autocast(query.device.type, enabled=False):
        return blockwise_backward(dout, query, key, value, keep, pattern, dropout_p, scale, rounds, draws)


def _attention_fake(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, seed: Tensor | None,
    projections: list[Tensor], dropout_p: float, scale: float, *fields: Any,
) -> list[Tensor]:  # fmt: skip
    """Shapes, dtypes and strides of what the operator returns."""
    call = Call(query, key, value, attention_mask, LSGPattern(*fields), dropout_p, 0, scale)
    results = list(to_save(call, allocate(call)))
    return results if query.is_cuda else results[:1]


def _attention_backward_fake(
    dout: Tensor, results: list[Tensor], query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes, dtypes and strides of the gradients."""
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """Keep for the backward the operator's inputs and all that it returned."""
    query, key, value, attention_mask, seed, projections, *ctx.options = inputs
    ctx.num_projections = len(projections)
    ctx.save_for_backward(query, key, value, attention_mask, seed, *projections, *output)
    ctx.set_materialize_grads(False)  # only out has a gradient: no zeros for the rest


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    """The gradients of the operator's inputs; of all three, as each needs most of what the others do."""
    query, key, value, attention_mask, seed, *others = ctx.saved_tensors
    projections, results = others[: ctx.num_projections], others[ctx.num_projections :]
    none = (None, None, [None] * len(projections), *(None for _ in ctx.options))
    if grads[0] is None:
        return None, None, None, *none
    dquery, dkey, dvalue = torch.ops.lsg_attn.attention_backward(
        grads[0], results, query, key, value, attention_mask, seed, projections, *ctx.options
    )
    return dquery, dkey, dvalue, *none


def _directions(pattern: LSGPattern, projections: list[Tensor], query: Tensor) -> tuple[Tensor, ...]:
    """The hashing directions as the kernel reads them, on query's device."""
    if not projections:
        return _seeded_directions(pattern, query.shape[1], query.shape[3], query.device)
    return tuple(x.to(torch.float32).contiguous() for x in projections)


@lru_cache(maxsize=32)  # the copy waits for the device
def _seeded_directions(pattern: LSGPattern, heads: int, head_dim: int, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(x.to(device) for x in lsh_directions(pattern, heads, head_dim))


_operator = torch.library.custom_op("lsg_attn::attention", _attention, mutates_args=(), schema=_SCHEMA)
_operator.register_fake(_attention_fake)
_operator.register_autograd(_differentiate, setup_context=_save)
torch.library.custom_op(
    "lsg_attn::attention_backward", _attention_backward, mutates_args=(), schema=_BACKWARD_SCHEMA
).register_fake(_attention_backward_fake)
