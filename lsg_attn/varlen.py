"""Attention over sequences of several lengths: packed one after the other, or as jagged nested tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .arguments import checked_call
from .checks import integer, type_name
from .dispatch import answer
from .pattern import LSGPattern


@overload
def lsg_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, pattern: LSGPattern,
    dropout_p: float = ..., scale: float | None = ..., implementation: str = ...,
    lsh_projections: Sequence[Tensor] | None = ..., *, return_lse: Literal[False] = ..., first_head: int | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def lsg_attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, pattern: LSGPattern,
    dropout_p: float = ..., scale: float | None = ..., implementation: str = ...,
    lsh_projections: Sequence[Tensor] | None = ..., *, return_lse: Literal[True], first_head: int | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def lsg_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    pattern: LSGPattern,
    dropout_p: float = 0.0,
    scale: float | None = None,
    implementation: str = "auto",
    lsh_projections: Sequence[Tensor] | None = None,
    *,
    return_lse: bool = False,
    first_head: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`lsg_attention` within each of several sequences, packed one after the other without padding.

    Each sequence has its own global tokens, and its result is the one that it has alone. Arguments are those of
    :func:`lsg_attention` except for these:

    Args:
        query, key, value: (total, heads, head_dim), the rows of all sequences; key and value may have fewer heads.
        cu_seqlens: (n + 1,) int32 or int64 on query's device: sequence i has the rows from ``cu_seqlens[i]`` to
            ``cu_seqlens[i + 1]``, the first G = ``pattern.num_global_tokens`` of which are global. The first value is
            0, the last one total. A sequence is empty or has at least G rows.
        max_seqlen: a length that no sequence exceeds.

    Returns:
        (total, heads, head_dim), of query's dtype. With ``return_lse`` also (total, heads) float32 or float64, see
        :func:`lsg_attention`.

    Raises:
        TypeError: an argument is not of the type named above.
        ValueError: shapes, dtypes or devices do not fit, a number is out of range, or the implementation cannot run.
            The values of ``cu_seqlens`` are checked only on the CPU.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type_name(x)}")
        if x.dim() != 3:
            raise ValueError(f"{name}: expected 3 dimensions (total, heads, head_dim), got shape {tuple(x.shape)}")
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))  # (1, heads, total, head_dim)
    max_seqlen = integer("max_seqlen", max_seqlen, 0)
    call = checked_call(
        q, k, v, pattern, None, dropout_p, scale, lsh_projections, first_head, cu_seqlens, max_seqlen
    )  # fmt: skip
    _check_lengths(cu_seqlens, max_seqlen, query, pattern.num_global_tokens)
    found = answer(call, implementation, return_lse)
    if isinstance(found, Tensor):
        return found[0].transpose(0, 1)
    out, lse = found
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def nested_attention(query: Any, key: Any, value: Any, *options: Any, **named: Any) -> Any:
    """:func:`lsg_attention` of jagged nested tensors (batch, heads, j, head_dim), whose sequences have one mask each.

    The other arguments are those of :func:`lsg_attention_varlen` from ``pattern`` on. What is returned is nested too.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not (isinstance(x, Tensor) and x.is_nested and x.layout == torch.jagged):
            raise ValueError(f"{name}: expected a jagged nested tensor, as some of query, key and value are nested")
        rows: Any = x.transpose(1, 2)  # types of PyTorch do not know the methods of nested tensors
        if x.dim() != 4 or rows.lengths() is not None:
            raise ValueError(f"{name}: expected a nested tensor (batch, heads, j, head_dim) without holes")
    offsets = query.offsets()
    for name, x in (("key", key), ("value", value)):
        if x.offsets() is not offsets and not torch.equal(x.offsets(), offsets):
            raise ValueError(f"{name}: expected query's lengths {offsets.diff()}, got {x.offsets().diff()}")
    longest = int(offsets.diff().max()) if len(offsets) > 1 else 0
    q, k, v = (x.transpose(1, 2).values() for x in (query, key, value))  # (total, heads, head_dim)
    found = lsg_attention_varlen(q, k, v, offsets, longest, *options, **named)

    def nested(x: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(x, offsets, max_seqlen=longest).transpose(1, 2)

    return nested(found) if isinstance(found, Tensor) else tuple(nested(x) for x in found)


def _check_lengths(cu_seqlens: Tensor, max_seqlen: int, query: Tensor, num_globals: int) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens: expected a torch.Tensor, got {type_name(cu_seqlens)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected a dtype out of int32 and int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"cu_seqlens: expected one dimension (n + 1,), got shape {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != query.device:
        raise ValueError(f"cu_seqlens: expected query's device {query.device}, got {cu_seqlens.device}")
    if not cu_seqlens.is_cpu or torch.compiler.is_compiling() or isinstance(cu_seqlens, FakeTensor):
        return  # to look at the values would wait for the device, or there are none
    ends = (int(cu_seqlens[0]), int(cu_seqlens[-1]))
    if ends != (0, len(query)):
        raise ValueError(f"cu_seqlens: expected values from 0 to total = {len(query)}, got {ends[0]} to {ends[1]}")
    lengths = cu_seqlens.diff()
    if (bad := lengths[(lengths != 0) & (lengths < max(num_globals, 1))]).numel():
        raise ValueError(
            f"cu_seqlens: expected sequences of no row or of at least num_global_tokens={num_globals}, "
            f"got one of {int(bad[0])}"
        )
    longest = max(lengths.tolist(), default=0)
    if longest > max_seqlen:
        raise ValueError(f"max_seqlen: expected at least the longest sequence's {longest}, got {max_seqlen}")
