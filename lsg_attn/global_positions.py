"""Global tokens anywhere in a sequence, as Longformer marks them: a gather before the attention, a scatter after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import type_name
from .dispatch import refuse_shared_out
from .functional import lsg_attention
from .masking import check_mask, full_mask
from .pattern import LSGPattern


def with_global_positions(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: LSGPattern,
    global_attention_mask: Tensor,
    attention_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    implementation: str = "auto",
    lsh_projections: Sequence[Tensor] | None = None,
) -> Tensor:
    """:func:`lsg_attention` of T tokens of which those that a mask marks are global, wherever they are.

    A marked token sees all tokens, and all see it. No token moves: a block keeps its tokens, and the compressed keys
    are made of those that are not marked. The marked rows are copied to the front, as the global tokens of the pattern,
    hidden where they were, and their results written back.

    Args:
        query, key, value: (batch, heads, T, head_dim), as in :func:`lsg_attention` without global positions in front.
        pattern: its ``num_global_tokens`` is the most that a sequence may mark; not causal.
        global_attention_mask: (batch, T) bool or integer, nonzero where a token is global.
        attention_mask: (batch, T), as in :func:`lsg_attention`; a marked token of padding is padding.
        dropout_p, scale, implementation, lsh_projections: as in :func:`lsg_attention`.

    Returns:
        (batch, heads, T, head_dim).

    Raises:
        TypeError, ValueError: as :func:`lsg_attention` says; the pattern is causal; or a sequence marks more tokens
            than the pattern has globals. On a GPU the latter is a failed assertion of the device, as nothing waits for
            the count.
    """
    refuse_shared_out("with_global_positions")
    if not isinstance(global_attention_mask, Tensor):
        raise TypeError(f"global_attention_mask: expected a torch.Tensor, got {type_name(global_attention_mask)}")
    if not isinstance(pattern, LSGPattern):
        raise TypeError(f"pattern: expected an LSGPattern, got {type_name(pattern)}")
    if pattern.causal:
        raise ValueError("pattern: expected one that is not causal, as a later global token would reach earlier ones")
    if not isinstance(query, Tensor) or query.dim() != 4:
        raise ValueError("query: expected a tensor (batch, heads, T, head_dim)")
    count, length = pattern.num_global_tokens, query.shape[2]
    if length < count:
        raise ValueError(f"num_global_tokens: expected at most the sequence's length {length}, got {count}")
    check_mask(global_attention_mask, query, 0, "global_attention_mask")
    check_mask(attention_mask, query, 0)
    marked, keep = (full_mask(x, query).expand(len(query), -1) for x in (global_attention_mask, attention_mask))
    _check_count(marked, count)
    # Marked positions first, in order; where a sequence marks fewer, others follow and are hidden.
    index = marked.int().argsort(dim=-1, descending=True, stable=True)[:, :count]  # (batch, G)
    is_global = marked.gather(-1, index)
    mask = torch.cat([is_global & keep.gather(-1, index), keep & ~marked], dim=-1)
    q, k, v = (torch.cat([_rows(x, index), x], dim=2) for x in (query, key, value))
    out: Tensor = lsg_attention(q, k, v, pattern, mask, dropout_p, scale, implementation, lsh_projections)
    of_globals, of_tokens = out[:, :, :count], out[:, :, count:]
    of_globals = torch.where(is_global[:, None, :, None], of_globals, _rows(of_tokens, index))
    return of_tokens.scatter(2, _expanded(index, of_globals), of_globals)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """The rows ``index`` (batch, n) of x (batch, heads, length, head_dim)."""
    return x.gather(2, _expanded(index, x))


def _expanded(index: Tensor, x: Tensor) -> Tensor:
    return index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])


def _check_count(marked: Tensor, count: int) -> None:
    most = marked.sum(-1).max() if marked.numel() else marked.new_zeros((), dtype=torch.int64)
    message = f"global_attention_mask: expected at most num_global_tokens={count} tokens in a sequence"
    if marked.is_cpu and not torch.compiler.is_compiling():
        if most > count:
            raise ValueError(f"{message}, got {int(most)}")
    else:
        torch._assert_async(most <= count, message)
