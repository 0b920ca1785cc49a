"""A call without memory: what bench.static compiles and bench.model counts is planned from it."""

from __future__ import annotations

import torch

from lsg_attn import LSGPattern
from lsg_attn.call import Call


def meta_call(
    pattern: LSGPattern, shape: tuple[int, int, int, int], dtype: torch.dtype, has_mask: bool, has_dropout: bool
) -> Call:
    """A call on queries of ``shape`` (batch, heads, G+T, head_dim), in memory as a projection gives them."""
    batch, heads, length, head_dim = shape
    query, key, value = (
        torch.empty(batch, length, heads, head_dim, dtype=dtype, device="meta").transpose(1, 2) for _ in range(3)
    )
    tokens = length - pattern.num_global_tokens
    mask = torch.empty(batch, tokens, dtype=torch.bool, device="meta") if has_mask else None
    directions = tuple(torch.empty(heads, head_dim, m // 2, device="meta") for m in pattern.lsh_buckets)
    dropout_p, seed = (0.1, 1 << 60) if has_dropout else (0.0, 0)
    return Call(query, key, value, mask, pattern, dropout_p, seed, head_dim**-0.5, directions)
