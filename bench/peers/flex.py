"""PyTorch's FlexAttention, compiled, with the LSG pattern as its mask over [tokens, compressed, globals].

Tokens come first, so that the pattern's blocks of local keys are flex's own blocks, all full. The global queries, which
see every token, go to dense attention: in flex they would form one block that takes as long as hundreds of others. This
library's PyTorch code makes the compressed keys and is compiled together with flex.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.cases import FORWARD, TYPES_FORWARD, TimedCase
from bench.peers.base import Attend, AttentionPeer
from bench.peers.lsg import LSGPeer
from lsg_attn.compression import Compression, Tokens, compress


class FlexAttention(LSGPeer, AttentionPeer):
    """``flex_attention`` and the compression of its keys, under ``torch.compile``."""

    name, label, color = "flex", "FlexAttention, same mask", "#9467bd"
    groups = (TYPES_FORWARD,)

    def unsupported_reason(self, case: TimedCase) -> str | None:
        """Limits of the mask written here, and of PyTorch."""
        if case.pattern.is_dense(case.tokens) or case.tokens % case.pattern.block_size:
            return f"the mask is written for whole blocks of {case.pattern.block_size}, and more than two"
        if case.pattern.compression == "lsh":
            return "lsh leaves clusters empty, which its mask would have to know from the data"
        if case.device == "cpu" and case.step != FORWARD:
            return "FlexAttention has no backward on a CPU"
        return None

    def prepare(self, case: TimedCase) -> Attend:
        """Make the block mask, and a function that compiles at its first call."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        pattern, tokens = case.pattern, case.tokens
        slots, num_globals = pattern.num_slots(tokens), pattern.num_global_tokens

        def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            block: Any = query // pattern.block_size  # the windows are arithmetic that works on tensors too
            slot = key - tokens
            local = _within(key, pattern.local_window(block))
            sparse = _any_within(slot, pattern.sparse_windows(block))
            return torch.where(key < tokens, local, torch.where(slot < slots, sparse, slot >= slots))

        torch._dynamo.reset()  # or it would stop compiling after a few shapes
        masks: Any = torch.compile(create_block_mask) if case.device == "cuda" else create_block_mask
        # of queries and keys: with keys' of 64 windows of slots are whole blocks too, but a GPU's kernel may need 128
        blocks = (128, 128) if case.device == "cuda" else (128, 64)
        shape = None, None, tokens, tokens + slots + num_globals
        mask = masks(sees, *shape, device=case.device, BLOCK_SIZE=blocks)
        keep = torch.ones(case.batch, tokens, dtype=torch.bool, device=case.device)
        scale = case.size.head_dim**-0.5
        first, rest = slice(num_globals), slice(num_globals, None)

        def of_tokens(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            compression = compress(pattern, Tokens(query, key[:, :, rest], keep, scale))
            key, value = (
                torch.cat([x[:, :, rest], *_slots(compression, x[:, :, rest]), x[:, :, first]], dim=2)
                for x in (key, value)
            )
            out: Tensor = flex_attention(query, key, value, block_mask=mask)
            return out

        compiled: Attend = torch.compile(of_tokens, dynamic=False)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # sliced outside: code that torch 2.13 compiles for a CPU reads such a slice from the tensor's beginning
            of_globals = scaled_dot_product_attention(query[:, :, first], key, value)
            return torch.cat([of_globals, compiled(query[:, :, rest], key, value)], dim=2)

        return attend


def _slots(compression: Compression | None, x: Tensor) -> list[Tensor]:
    """The compressed rows, if any. Whole blocks without padding leave no slot of a choice empty."""
    if compression is None:
        return []
    if compression.token is None:
        return [compression.apply(x)]
    return [x.gather(2, compression.token.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))]


def _within(x: Tensor, window: tuple[Any, Any]) -> Tensor:
    inside: Tensor = (x >= window[0]) & (x < window[1])
    return inside


def _any_within(x: Tensor, windows: tuple[tuple[Any, Any], tuple[Any, Any]]) -> Tensor:
    return _within(x, windows[0]) | _within(x, windows[1])
