"""The arguments of the functions, checked, as a Call."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .call import Call
from .checks import integer, number, probability, type_name
from .masking import check_mask
from .pattern import LSGPattern

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def checked_call(
    query: Tensor, key: Tensor, value: Tensor, pattern: LSGPattern, attention_mask: Tensor | None, dropout_p: float,
    scale: float | None, lsh_projections: Sequence[Tensor] | None, first_head: int | None,
    cu_seqlens: Tensor | None = None, max_seqlen: int = 0,
) -> Call:  # fmt: skip
    """The call that the arguments of ``lsg_attention`` ask for, without its seed.

    Raises:
        TypeError, ValueError: as ``lsg_attention`` says.
    """
    _check_tensors(query, key, value)
    _, heads, length, head_dim = query.shape
    if not isinstance(pattern, LSGPattern):
        raise TypeError(f"pattern: expected an LSGPattern, got {type_name(pattern)}")
    if cu_seqlens is None and pattern.num_global_tokens > length:
        raise ValueError(
            f"num_global_tokens: expected at most the sequence's length {length}, got {pattern.num_global_tokens}"
        )
    check_mask(attention_mask, query, pattern.num_global_tokens)
    if attention_mask is not None and attention_mask.shape[0] != query.shape[0]:
        attention_mask = attention_mask.expand(len(query), -1)
    dropout_p = probability("dropout_p", dropout_p)
    scale = 1.0 / math.sqrt(head_dim) if scale is None else number("scale", scale)
    projections = _projections(lsh_projections, pattern, heads, head_dim, query.device)
    if first_head is not None:
        first_head = integer("first_head", first_head, 0)
        if pattern.rule.is_hashed and not projections:
            raise ValueError(
                "lsh_projections: expected tensors where first_head is given, as the draws depend on the number of all "
                "heads; lsg_attn.compression.lsh_directions makes those of all heads"
            )
    inputs = (query, key, value, attention_mask, None, projections)
    call = Call(*inputs, dropout_p, scale, pattern, first_head or 0, cu_seqlens, max_seqlen)
    # A graph may be for any length: it does not ask whether this one has slots.
    is_uncovered = first_head is None and pattern.rule.varies_by_head and pattern.sparsity_factor > heads
    if is_uncovered and (torch.compiler.is_compiling() or call.num_slots):
        warnings.warn(
            f"sparsity_type={pattern.sparsity_type!r} covers all tokens only with at least sparsity_factor="
            f"{pattern.sparsity_factor} heads; there are {heads}",
            stacklevel=3,
        )
    return call


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type_name(x)}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}: expected a dtype out of {DTYPES}, got {x.dtype}")
        if x.is_nested or x.layout != torch.strided:
            raise ValueError(f"{name}: expected a dense tensor, got {'a nested one' if x.is_nested else x.layout}")
        if hasattr(x, "placements"):
            raise ValueError(
                f"{name}: expected a tensor of this process, got a DTensor; pass {name}.to_local(), and first_head "
                "where its heads are shared out"
            )
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions (batch, heads, G+T, head_dim), got shape {tuple(x.shape)}")
        for what in ("dtype", "device"):
            expected, got = getattr(query, what), getattr(x, what)
            if got != expected:
                raise ValueError(f"{name}: expected query's {what} {expected}, got {got}")
        if x.shape[1] == 0 or x.shape[-1] == 0:
            raise ValueError(
                f"{name}: expected at least one head and a head_dim of at least 1, got shape {tuple(x.shape)}"
            )
    batch, heads, length, head_dim = query.shape
    if key.shape != (batch, key.shape[1], length, head_dim) or heads % key.shape[1]:
        raise ValueError(
            f"key: expected query's shape {tuple(query.shape)}, or a number of heads that divides {heads}, "
            f"got {tuple(key.shape)}"
        )
    if value.shape != key.shape:
        raise ValueError(f"value: expected key's shape {tuple(key.shape)}, got {tuple(value.shape)}")


def _projections(
    projections: Sequence[Tensor] | None, pattern: LSGPattern, heads: int, head_dim: int, device: torch.device
) -> tuple[Tensor, ...]:
    if projections is None:
        return ()
    if not pattern.rule.is_hashed:
        raise ValueError(f"lsh_projections: expected None, as this pattern compresses by {pattern.compression!r}")
    shapes = [(heads, head_dim, buckets // 2) for buckets in pattern.lsh_buckets]
    if not isinstance(projections, (list, tuple)):
        raise TypeError(f"lsh_projections: expected a list or tuple, got {type_name(projections)}")
    for x in projections:
        if not isinstance(x, Tensor):
            raise TypeError(f"lsh_projections: expected tensors, got {type_name(x)}")
        if x.dtype not in DTYPES:
            raise TypeError(f"lsh_projections: expected a dtype out of {DTYPES}, got {x.dtype}")
        if x.device != device:
            raise ValueError(f"lsh_projections: expected query's device {device}, got {x.device}")
    got = [tuple(x.shape) for x in projections]
    if got != shapes:
        raise ValueError(f"lsh_projections: expected shapes {shapes}, got {got}")
    return tuple(projections)
