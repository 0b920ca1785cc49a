"""The oracle: LSG attention as one dense masked softmax, differentiated by autograd. Right first, slow always."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .call import Call, Section
from .compression import Compression, compress_call, slots_of
from .pattern import LSGPattern


def reference_attention(call: Call) -> tuple[Tensor, Tensor]:
    """Dense LSG attention and its scores' log-sum-exp, as blockwise_attention has them.

    Dropout draws from PyTorch's generator.
    """
    call = with_all_heads(call)
    scores, visible, compression = scores_of(call)
    value = call.value
    if compression is not None:
        value = torch.cat([value, compression.apply(value[:, :, call.pattern.num_global_tokens :])], dim=-2)
    out = torch.dropout(probabilities(scores, visible), call.dropout_p, train=True) @ value
    lse = scores.to(torch.promote_types(scores.dtype, torch.float32)).logsumexp(dim=-1)
    return out, lse.masked_fill(~visible.any(-1), torch.inf)


def scores_of(call: Call, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Compression | None]:
    """The scores of a call with all heads, and what they are of.

    ``rows``: (rows,) int64 on the CPU, the positions of the queries, by default all.

    Returns:
        (batch, heads, rows, G+T+N) of the tokens and then the compressed keys, the least finite number where a key is
        not visible; which ones are, broadcastable to them; and the compression, or None.
    """
    query, key, pattern = call.query, call.key, call.pattern
    first, length, device = pattern.num_global_tokens, key.shape[-2], key.device
    visible = visible_tokens(pattern, length, rows).to(device) & call.keep()[:, None, None, :]
    compression = compress_call(call)
    if compression is not None:
        slots = visible_slots(pattern, length, rows).to(device) & compression.keep.unsqueeze(-2)
        visible = torch.cat([visible.expand(*slots.shape[:-1], -1), slots], dim=-1)
        key = torch.cat([key, compression.apply(key[:, :, first:])], dim=-2)
    if call.section is not None:
        visible = visible & _seen_in(call.section, length, visible.shape[-1], first).to(device)
    query = query if rows is None else query[:, :, rows.to(device)]
    scores = query * call.scale @ key.mT
    return scores.masked_fill(~visible, torch.finfo(query.dtype).min), visible, compression


def probabilities(scores: Tensor, visible: Tensor) -> Tensor:
    """The softmax of scores; 0 in a row that sees nothing, which else were uniform."""
    return scores.softmax(dim=-1) * visible


def with_all_heads(call: Call) -> Call:
    """The call with a copy of a key head for each head of the query that reads it."""
    group = call.query.shape[1] // call.key.shape[1]
    if group == 1:
        return call
    return replace(call, key=call.key.repeat_interleave(group, 1), value=call.value.repeat_interleave(group, 1))


def visible_tokens(pattern: LSGPattern, length: int, rows: Tensor | None = None) -> Tensor:
    """(rows, length) bool: which of the G+T tokens (columns) each query sees as they are.

    ``rows``: (rows,) int64, the positions of the queries, by default all.
    """
    rows = (torch.arange(length) if rows is None else rows).unsqueeze(-1)
    first, columns = pattern.num_global_tokens, torch.arange(length)
    start, stop = pattern.local_window(_blocks_of(pattern, rows))
    is_near = (columns - first >= start) & (columns - first < stop)  # of 2 blocks or fewer, all are
    visible = (rows < first) | (columns < first) | is_near
    return visible & ((columns < first) | (columns <= rows)) if pattern.causal else visible


def visible_slots(pattern: LSGPattern, length: int, rows: Tensor | None = None) -> Tensor:
    """(rows, N) bool: which compressed keys (columns) each query sees; ``rows`` as in :func:`visible_tokens`."""
    rows = (torch.arange(length) if rows is None else rows).unsqueeze(-1)
    first = pattern.num_global_tokens
    columns = torch.arange(slots_of(pattern, length - first))
    left, right = pattern.sparse_windows(_blocks_of(pattern, rows))
    in_windows = ((columns >= left[0]) & (columns < left[1])) | ((columns >= right[0]) & (columns < right[1]))
    return (rows >= first) & in_windows


def visible_in_slots(slots: Tensor, compression: Compression, head: int) -> Tensor:
    """(queries, T) bool: which tokens have a weight in a compressed key that a query sees, in a batch's first entry.

    ``slots``: (queries, N), rows of :func:`visible_slots`.
    """
    return slots[:, compression.slot[0, head]] & (compression.weight[0, head] > 0)


def _seen_in(section: Section, length: int, columns: int, num_globals: int) -> Tensor:
    """(length, columns) bool: false in a row that is no query of the section, and where globals do not see globals."""
    rows, columns_ = torch.arange(length)[:, None], torch.arange(columns)
    token = rows - num_globals
    is_query = (token < 0) | ((token >= section.start) & (token < section.stop))
    return is_query & (section.has_globals | (token >= 0) | (columns_ >= num_globals))


def _blocks_of(pattern: LSGPattern, rows: Tensor) -> Tensor:
    """The block of each row, of no meaning for globals."""
    return (rows - pattern.num_global_tokens).div(pattern.block_size, rounding_mode="floor")
