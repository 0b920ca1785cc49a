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
from ..compression import Compression, compress_call, directions_of, mean_of_clusters, tokens_of
from . import library
from .layout import Layout
from .sweep import Part, Sweep

_QUERIES = 128  # at most of a block at a time
_PART_ELEMENTS = 1 << 19  # of keys whose heads are taken together


def compress(call: Call) -> Compression | None:
    """The compression of the call's keys, or None."""
    if not call.rule.is_hashed:
        return compress_call(call)
    tokens = tokens_of(call)
    directions = [x.contiguous() for x in directions_of(call.pattern, tokens)]
    slot = torch.empty(tokens.shape, dtype=torch.int64)
    for entry, keep in enumerate(tokens.keep):
        key = tokens.key[entry]
        if key.stride(-1) != 1 or key.dtype == torch.float16:
            key = key.to(tokens.dtype).contiguous()
        library.operators().hash_slots(
            key, None if keep.all() else keep.contiguous(), directions, call.pattern.lsh_buckets, call.pattern.chunk,
            slot[entry],
        )  # fmt: skip
    return mean_of_clusters(call.pattern, tokens, slot)


def forward(call: Call, compression: Compression | None, threads: int) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of the scores."""
    batch, heads, length, head_dim = call.query.shape
    # (batch, length, heads, head_dim) in memory, as an output projection wants it
    out = call.query.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    library.operators().advise_huge_pages(out)
    lse = call.query.new_empty(batch, heads, length, dtype=torch.float32)
    sweep = _Sweep(call, compression, threads)
    for part in sweep.parts():
        with _written(sweep, "out", part.of(out)) as rows:
            library.operators().forward(*_inputs(sweep, part), rows, part.of(lse))
    return out, lse


def backward(
    call: Call, compression: Compression | None, threads: int, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value; from the same ``threads``, the same bits.

    ``dlse``: the gradient of the log-sum-exp, or None.
    """
    dquery, dkey, dvalue = (torch.empty_like(x) for x in (call.query, call.key, call.value))
    for x in (dquery, dkey, dvalue):
        library.operators().advise_huge_pages(x)
    sweep = _Sweep(call, compression, threads)
    for part in sweep.parts():
        heads = part.query.shape[0]
        groups = math.ceil(threads / heads)
        drows = sweep.gradients_of_rows(part, groups)
        dlse_rows = None if dlse is None else part.of(dlse).contiguous()
        dout_rows = _rows(sweep, "dout", part.of(dout))
        with _written(sweep, "dquery", part.of(dquery)) as rows:
            library.operators().backward(
                *_inputs(sweep, part), part.of(lse), dout_rows, dlse_rows, rows, drows["sequence"], drows.get("slots")
            )
        sweep.clear(part.of(dquery))
        summed = {name: (x[0] if groups == 1 else x.sum(0)).flatten(0, 1) for name, x in drows.items()}
        sweep.finish(part, summed, dquery, dkey, dvalue)
    return dquery, dkey, dvalue


class _Sweep(Sweep):
    """The sweep over fewer heads at a time, whose slots are summed by the C++."""

    part_elements = _PART_ELEMENTS

    def __init__(self, call: Call, compression: Compression | None, threads: int) -> None:
        is_bfloat16 = call.query.dtype == torch.bfloat16 and library.has_bfloat16_products()
        super().__init__(call, compression, threads, torch.bfloat16 if is_bfloat16 else torch.float32)

    def sum_slots(self, x: Tensor, compression: Compression, out: Tensor) -> None:
        """See :class:`Sweep`."""
        if x.dtype == torch.float16 or x.stride(-1) != 1:
            super().sum_slots(x, compression, out)
        else:
            library.operators().sum_slots(x, compression.slot, compression.weight, out)


def _inputs(sweep: _Sweep, part: Part) -> tuple[Tensor | float | int | None, ...]:
    """The arguments that both operators begin with."""
    call, heads = sweep.call, part.query.shape[0]
    blocks, segments = _tables(sweep.layout)
    tensors = (_rows(sweep, name, getattr(part, name)) for name in ("query", "key", "value"))
    slots = None if part.slots is None else _rows(sweep, "slot rows", part.slots)
    keep = {name: x.contiguous().expand(heads, -1) for name, x in part.keep.items() if part.hidden[name] != (0, 0)}
    causal_from = call.pattern.num_global_tokens if call.pattern.causal else sweep.layout.length
    return (
        *tensors, slots, keep.get("sequence"), keep.get("slots"), blocks, segments, call.scale, causal_from,
    )  # fmt: skip


def _rows(sweep: _Sweep, name: str, x: Tensor) -> Tensor:
    """x (..., rows, head_dim) in the dtype of products, rows in one piece and an even number of elements apart."""
    is_fit = x.stride(-1) == 1 and x.stride(-2) >= x.shape[-1] and (x.stride(-2) % 2 == 0 or x.dtype == torch.float32)
    if is_fit and x.dtype == sweep.work.dtype:
        return x
    return sweep.work.empty(f"{name} rows", *x.shape).copy_(x)


@contextlib.contextmanager
def _written(sweep: _Sweep, name: str, x: Tensor) -> Iterator[Tensor]:
    """x, or memory in the dtype of products that is copied to x at the end."""
    if x.dtype == sweep.work.dtype and x.stride(-1) == 1:
        yield x
    else:
        rows = sweep.work.empty(f"{name} rows", *x.shape)
        yield rows
        x.copy_(rows)


@functools.lru_cache(maxsize=64)
def _tables(layout: Layout) -> tuple[Tensor, Tensor]:
    """Blocks (n, 4): start, stop, first and last segment of the window; and segments (m, 3): source, start, size."""
    blocks: list[tuple[int, int, int, int]] = []
    segments: list[tuple[int, int, int]] = []

    def add(start: int, stop: int, window: list[tuple[int, int, int]]) -> None:
        first, last = len(segments), len(segments) + len(window)
        segments.extend(window)
        blocks.extend((i, min(i + _QUERIES, stop), first, last) for i in range(start, stop, _QUERIES))

    for start, stop, first_key in layout.dense:
        add(start, stop, [(0, first_key, layout.length - first_key)])
    for block in layout.blocks:
        window = layout.windows(block, block + 1).segments
        add(*layout.queries(block, block + 1), [(int(x.source == "slots"), x.start, x.size) for x in window])
    # On the CPU also where the caller has another default device.
    return (
        torch.tensor(blocks, dtype=torch.int64, device="cpu").view(-1, 4),
        torch.tensor(segments, dtype=torch.int64, device="cpu").view(-1, 3),
    )
