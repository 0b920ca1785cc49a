"""The steps in C++, compiled for the processor: a block of queries at a time in the cache of each thread.

As it is compiled, a step is no sequence of passes over memory: between its products, scores are scaled, masked, turned
into powers and rounded while a row of them is at hand. Its products, oneDNN's, are float32 also for bfloat16.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..call import Call
from ..compression import Compression
from ..pattern import LSGPattern
from . import library
from .layout import Layout
from .sweep import Part, Sweep

_QUERIES = 128  # at most of a block at a time
_PART_ELEMENTS = 1 << 19  # of keys whose heads are taken together


def forward(call: Call, compression: Compression | None, threads: int) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of the scores."""
    batch, heads, length, head_dim = call.query.shape
    # (batch, length, heads, head_dim) in memory, as an output projection wants it
    out = call.query.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    torch.ops.lsg_attn_cpp.advise_huge_pages(out)
    lse = call.query.new_empty(batch, heads, length, dtype=torch.float32)
    sweep = _sweep(call, compression, threads)
    for part in sweep.parts():
        with _written(sweep, "out", part.of(out)) as rows:
            torch.ops.lsg_attn_cpp.forward(*_inputs(sweep, part), rows, part.of(lse))
    return out, lse


def backward(
    call: Call, compression: Compression | None, threads: int, lse: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value; from the same ``threads``, the same bits."""
    dquery, dkey, dvalue = (torch.empty_like(x) for x in (call.query, call.key, call.value))
    for x in (dquery, dkey, dvalue):
        torch.ops.lsg_attn_cpp.advise_huge_pages(x)
    sweep = _sweep(call, compression, threads)
    for part in sweep.parts():
        heads = part.query.shape[0]
        groups = math.ceil(threads / heads)
        drows = sweep.gradients_of_rows(part, groups)
        dout_rows = _rows(sweep, "dout", part.of(dout))
        with _written(sweep, "dquery", part.of(dquery)) as rows:
            torch.ops.lsg_attn_cpp.backward(
                *_inputs(sweep, part), part.of(lse), dout_rows, rows, drows["sequence"], drows.get("slots")
            )
        summed = {name: (x[0] if groups == 1 else x.sum(0)).flatten(0, 1) for name, x in drows.items()}
        sweep.finish(part, summed, dquery, dkey, dvalue)
    return dquery, dkey, dvalue


def _sweep(call: Call, compression: Compression | None, threads: int) -> Sweep:
    is_bfloat16 = call.query.dtype == torch.bfloat16 and library.has_bfloat16_products()
    dtype = torch.bfloat16 if is_bfloat16 else torch.float32
    return Sweep(call, compression, threads, dtype, _PART_ELEMENTS)


def _inputs(sweep: Sweep, part: Part) -> tuple[Tensor | float | int | None, ...]:
    """The arguments that both operators begin with."""
    call, heads = sweep.call, part.query.shape[0]
    blocks, segments = _tables(call.pattern, sweep.layout.length)
    tensors = (_rows(sweep, name, getattr(part, name)) for name in ("query", "key", "value"))
    slots = None if part.slots is None else _rows(sweep, "slot rows", part.slots)
    keep = {name: x.contiguous().expand(heads, -1) for name, x in part.keep.items() if part.hidden[name] != (0, 0)}
    causal_from = call.pattern.num_global_tokens if call.pattern.causal else sweep.layout.length
    return (
        *tensors, slots, keep.get("sequence"), keep.get("slots"), blocks, segments, call.scale, causal_from,
    )  # fmt: skip


def _rows(sweep: Sweep, name: str, x: Tensor) -> Tensor:
    """x (..., rows, head_dim) in the dtype of products, rows in one piece and an even number of elements apart."""
    is_fit = x.stride(-1) == 1 and x.stride(-2) >= x.shape[-1] and (x.stride(-2) % 2 == 0 or x.dtype == torch.float32)
    if is_fit and x.dtype == sweep.work.dtype:
        return x
    return sweep.work.empty(f"{name} rows", *x.shape).copy_(x)


@contextlib.contextmanager
def _written(sweep: Sweep, name: str, x: Tensor) -> Iterator[Tensor]:
    """x, or memory in the dtype of products that is copied to x at the end."""
    if x.dtype == sweep.work.dtype and x.stride(-1) == 1:
        yield x
    else:
        rows = sweep.work.empty(f"{name} rows", *x.shape)
        yield rows
        x.copy_(rows)


@functools.lru_cache(maxsize=64)
def _tables(pattern: LSGPattern, length: int) -> tuple[Tensor, Tensor]:
    """Blocks (n, 4): start, stop, first and last segment of the window; and segments (m, 3): source, start, size."""
    layout = Layout(pattern, length)
    blocks: list[tuple[int, int, int, int]] = []
    segments: list[tuple[int, int, int]] = []

    def add(start: int, stop: int, window: list[tuple[int, int, int]]) -> None:
        first, last = len(segments), len(segments) + len(window)
        segments.extend(window)
        blocks.extend((i, min(i + _QUERIES, stop), first, last) for i in range(start, stop, _QUERIES))

    add(0, layout.num_dense, [(0, 0, length)])
    for block in range(layout.num_blocks):
        window = layout.windows(block, block + 1).segments
        add(*layout.queries(block, block + 1), [(int(x.source == "slots"), x.start, x.size) for x in window])
    # On the CPU also where the caller has another default device.
    return (
        torch.tensor(blocks, dtype=torch.int64, device="cpu").view(-1, 4),
        torch.tensor(segments, dtype=torch.int64, device="cpu").view(-1, 3),
    )
