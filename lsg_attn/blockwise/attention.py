"""The PyTorch implementation: block-wise, on any device, with its own backward; the fast path of a CPU.

What costs time on a CPU is not arithmetic but temporaries in fresh memory. So for a few query blocks at a time, the
key and value rows that they see are copied side by side into a small workspace that stays in cache, and two batched
matmuls and a softmax run there. Nothing of size queries x keys is kept: the backward computes the probabilities
again from q and k, by the same steps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..call import Call
from ..compression import Compression, compress_call
from ..workspace import matmul_out
from .sweep import Sweep, Tile


def blockwise_attention(call: Call) -> Tensor:
    """Block-wise LSG attention, differentiable once."""
    call = replace(call, attention_mask=call.keep())  # a copy: the caller may write to its mask before the backward
    maps = _tensors(_compress(call))
    inputs = (call.query, call.key, call.value, call.attention_mask, call.seed)
    options = (call.dropout_p, call.scale, call.pattern)
    out: Tensor = _BlockwiseAttention.apply(*inputs, options, torch.get_num_threads(), *maps)  # type: ignore[no-untyped-call]
    return out


def blockwise_forward(call: Call) -> Tensor:
    """The output of :func:`blockwise_attention`, without autograd; :func:`blockwise_backward` has its gradients."""
    return _forward(call, _compress(call), _threads(call))


def blockwise_backward(call: Call, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value of :func:`blockwise_forward`, from the gradient of its output."""
    return _backward(call, _compress(call), _threads(call), dout)


def _threads(call: Call) -> int:
    """Threads to share heads out over. With dropout it is all heads, in one part.

    The number of threads decides the order of the draws, and may change between a forward and its backward.
    """
    return call.query.shape[1] if call.dropout_p else torch.get_num_threads()


def _compress(call: Call) -> Compression | None:
    with torch.no_grad():
        return compress_call(call)


def _tensors(compression: Compression | None) -> tuple[Tensor | None, ...]:
    """The map as autograd saves it."""
    if compression is None:
        return ()
    return compression.slot, compression.weight, compression.keep, compression.token


class _BlockwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, seed: Tensor | None,
        options: tuple[Any, ...], threads: int, *maps: Tensor,
    ) -> Tensor:  # fmt: skip
        """``options``: the arguments of Call after its tensors; ``threads``: the backward needs the same number."""
        ctx.save_for_backward(query, key, value, attention_mask, seed, *maps)
        ctx.options, ctx.threads = options, threads
        call = Call(query, key, value, attention_mask, seed, (), *options)
        return _forward(call, Compression(*maps) if maps else None, threads)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, attention_mask, seed, *maps = ctx.saved_tensors
        call = Call(query, key, value, attention_mask, seed, (), *ctx.options)
        grads = _backward(call, Compression(*maps) if maps else None, ctx.threads, dout)
        return *grads, *(None for _ in range(4 + len(maps)))


def _forward(call: Call, compression: Compression | None, threads: int) -> Tensor:
    batch, heads, length, head_dim = call.query.shape
    # (batch, length, heads, head_dim) in memory, as an output projection wants it
    out = call.query.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    sweep = Sweep(call, compression, threads)
    probabilities = _Probabilities(call, sweep)
    for part in sweep.parts():
        for tile in sweep.tiles(part):
            probs = probabilities.of(tile, sweep.load(tile, "query", part.query))
            if (mask := probabilities.dropout_mask(probs)) is not None:
                probs.mul_(mask)
            tile.store(sweep.work.matmul("out", probs, tile.value), part.of(out))
    return out


def _backward(
    call: Call, compression: Compression | None, threads: int, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dquery, dkey, dvalue = (torch.empty_like(x) for x in (call.query, call.key, call.value))
    sweep = Sweep(call, compression, threads)
    probabilities = _Probabilities(call, sweep)
    work = sweep.work
    for part in sweep.parts():
        drows = work.empty("drows", *part.rows.shape, dtype=sweep.sum_dtype).zero_()
        for tile in sweep.tiles(part):
            query_tile = sweep.load(tile, "query", part.query)
            dout_tile = sweep.load(tile, "dout", part.of(dout))
            probs = probabilities.of(tile, query_tile)
            mask = probabilities.dropout_mask(probs)
            dprobs = work.matmul("dprobs", dout_tile, tile.value.mT)
            dropped = probs
            if mask is not None:
                dprobs.mul_(mask)
                dropped = mask.mul_(probs)
            dwindow = work.empty("dwindow", 2, *tile.key.shape)  # of key, value
            matmul_out(dwindow[1], dropped.mT, dout_tile)
            # dscores = probs * (dprobs - rowsum(probs * dprobs)), in place
            dscores = torch.ops.aten._softmax_backward_data.out(dprobs, probs, -1, probs.dtype, grad_input=dprobs)
            matmul_out(dwindow[0], dscores.mT, query_tile, call.scale)
            tile.scatter_add(dwindow, drows)
            tile.store(work.matmul("out", dscores, tile.key, call.scale), part.of(dquery))
        sweep.finish(part, drows, dquery, dkey, dvalue)
    return dquery, dkey, dvalue


class _Probabilities:
    """The attention probabilities of tiles, and their dropout masks in the order of the sweep."""

    def __init__(self, call: Call, sweep: Sweep) -> None:
        self._scale, self._kept, self._work = call.scale, 1.0 - call.dropout_p, sweep.work
        self._generator = torch.Generator(call.query.device).manual_seed(call.seed_value()) if call.dropout_p else None

    def of(self, tile: Tile, query: Tensor) -> Tensor:
        """The probabilities (heads * blocks, size, window) of the tile's queries, 0 where a key is not visible."""
        scores = self._work.matmul("probs", query, tile.key.mT, self._scale)
        blocks = scores.view(-1, tile.visible.shape[1], *scores.shape[1:])  # (heads, blocks, size, window)
        for start, stop in tile.clipped:
            visible = tile.visible[:, start:stop].unsqueeze(2)
            # the least finite number and not -inf, which would make a row NaN that sees nothing
            bias = torch.zeros_like(visible, dtype=scores.dtype)
            blocks[:, start:stop].add_(bias.masked_fill_(~visible, torch.finfo(scores.dtype).min))
        if tile.later is None:
            return torch.softmax(scores, dim=-1, out=scores)
        own = scores[..., -tile.later.shape[1] :].masked_fill_(tile.later, torch.finfo(scores.dtype).min)
        torch.softmax(scores, dim=-1, out=scores)
        own.masked_fill_(tile.later, 0)  # again, as a query that sees nothing spreads evenly, and not only over zeros
        return scores

    def dropout_mask(self, probs: Tensor) -> Tensor | None:
        """The next mask, shaped as ``probs``: 0 with probability p, else 1 / (1 - p). None without dropout."""
        if self._generator is None:
            return None
        mask = self._work.empty("mask", *probs.shape)
        return mask.bernoulli_(self._kept, generator=self._generator).div_(self._kept)
