"""Calls on the meta device: from them bench.static plans what it compiles, and bench.static.model what it counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lsg_attn import LSGPattern
from lsg_attn.call import Call, Section
from lsg_attn.fused.backward import allocate_gradients, plan_backward
from lsg_attn.fused.compress import directions_of
from lsg_attn.fused.forward import plan_forward
from lsg_attn.fused.launch import Launch
from lsg_attn.fused.results import allocate, restore, to_save


def meta_call(
    pattern: LSGPattern, shape: tuple[int, int, int, int], dtype: torch.dtype, has_mask: bool, has_dropout: bool,
    group: int = 1, lengths: Sequence[int] = (), section: Section | None = None,
) -> Call:  # fmt: skip
    """A call on queries of ``shape`` (batch, heads, G+T, head_dim), laid out as a projection returns them.

    ``group``: heads of queries that share a head of keys. ``lengths``: G+T of each packed sequence, in place of the
    shape's batch and length. ``section``: where the call lies in a longer sequence.
    """
    batch, heads, length, head_dim = shape
    rows = (1, sum(lengths)) if lengths else (batch, length)
    query, key, value = (
        torch.empty(*rows, count, head_dim, dtype=dtype, device="meta").transpose(1, 2)
        for count in (heads, heads // group, heads // group)
    )
    tokens = length - pattern.num_global_tokens
    mask = torch.empty(batch, tokens, dtype=torch.bool, device="meta") if has_mask else None
    directions = tuple(torch.empty(heads, head_dim, m // 2, device="meta") for m in pattern.lsh_buckets)
    dropout_p, seed = (0.1, torch.tensor(1 << 60)) if has_dropout else (0.0, None)
    ends = torch.empty(len(lengths) + 1, dtype=torch.int32, device="meta") if lengths else None
    sequences = (ends, max(lengths, default=0), section)
    return Call(query, key, value, mask, seed, directions, dropout_p, head_dim**-0.5, pattern, 0, *sequences)


class Pass(NamedTuple):
    """A forward or a backward: its launches, its input tensors, and the results that are kept after it."""

    launches: list[Launch]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]  # ``Saved`` of a forward, ``Gradients`` of a backward


def meta_passes(call: Call, target: str) -> tuple[Pass, Pass]:
    """The forward of a call, and its backward."""
    results = allocate(call)
    saved, inputs = to_save(call, results), (call.query, call.key, call.value, *directions_of(call))
    inputs += tuple(x for x in (call.attention_mask, call.cu_seqlens) if x is not None)
    dout, gradients = torch.empty_like(results.out), allocate_gradients(call)
    backward = plan_backward(call, restore(call, saved), dout, gradients, target)
    forward = Pass(plan_forward(call, results, target), inputs, saved)
    return forward, Pass(backward, (*inputs, *saved, dout), gradients)
