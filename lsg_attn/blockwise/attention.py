"""The PyTorch implementation: block-wise, on any device, with its own backward; the fast path of a CPU.

What costs time on a CPU is not arithmetic but temporaries in fresh memory. So for a few query blocks at a time, the
key and value rows that they see are copied side by side into a small workspace that stays in cache, and two batched
matmuls and a softmax run there. Nothing of size queries x keys is kept: the backward computes the probabilities
again from q and k, by the same steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compression import Compression, Tokens, compress
from ..pattern import LSGPattern
from ..workspace import matmul_out
from .sweep import Sweep, Tile


def blockwise_attention(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor, pattern: LSGPattern, dropout_p: float, scale: float,
    projections: tuple[Tensor, ...] | None, seed: int | None = None,
) -> Tensor:  # fmt: skip
    """Block-wise LSG attention; arguments as :func:`lsg_attn.lsg_attention` checked them, keep: (batch, G+T) bool.

    ``seed``: of the dropout masks; drawn from PyTorch's generator by default.
    """
    call = _call(query, pattern, dropout_p, scale, seed)
    maps = _tensors(_compress(query, key, keep, call, projections))
    out: Tensor = _BlockwiseAttention.apply(query, key, value, keep, call, *maps)  # type: ignore[no-untyped-call]
    return out


def blockwise_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, keep: Tensor, pattern: LSGPattern, dropout_p: float,
    scale: float, projections: tuple[Tensor, ...] | None, seed: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value of :func:`blockwise_attention` with these arguments, from that of out."""
    call = _call(query, pattern, dropout_p, scale, seed)
    return _backward(dout, query, key, value, keep, _compress(query, key, keep, call, projections), call)


@dataclass(frozen=True)
class _Call:
    """What one call computes with, besides tensors."""

    pattern: LSGPattern
    scale: float
    dropout_p: float
    seed: int  # of the dropout masks, which forward and backward draw in the order of the sweep
    threads: int  # which decide that order, and may change before backward


def _call(query: Tensor, pattern: LSGPattern, dropout_p: float, scale: float, seed: int | None) -> _Call:
    if seed is None:
        drawn = int(torch.randint(1 << 62, (), device="cpu")) if dropout_p else 0
        return _Call(pattern, scale, dropout_p, drawn, torch.get_num_threads())
    # Who gives the seed may call again with other threads, and must get the same masks: all heads are one part then.
    return _Call(pattern, scale, dropout_p, seed, query.shape[1] if dropout_p else torch.get_num_threads())


def _compress(
    query: Tensor, key: Tensor, keep: Tensor, call: _Call, projections: tuple[Tensor, ...] | None
) -> Compression | None:
    first = call.pattern.num_global_tokens
    with torch.no_grad():
        tokens = Tokens(query[:, :, first:], key[:, :, first:], keep[:, first:], call.scale, projections)
        return compress(call.pattern, tokens)


def _tensors(compression: Compression | None) -> tuple[Tensor | None, ...]:
    """The map as autograd saves it."""
    if compression is None:
        return ()
    return compression.slot, compression.weight, compression.keep, compression.token


def _compression(tensors: Sequence[Tensor]) -> Compression | None:
    """The reverse of :func:`_tensors`."""
    return Compression(*tensors) if tensors else None


class _BlockwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, keep: Tensor, call: _Call, *maps: Tensor
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, keep, *maps)
        ctx.call = call
        batch, heads, length, head_dim = query.shape
        # (batch, length, heads, head_dim) in memory, as an output projection wants it
        out = query.new_empty(batch, length, heads, head_dim).transpose(1, 2)
        sweep = Sweep(query, key, value, keep, _compression(maps), call.pattern, call.threads)
        probabilities = _Probabilities(call, sweep)
        for part in sweep.parts():
            for tile in sweep.tiles(part):
                probs = probabilities.of(tile, sweep.load(tile, "query", part.query))
                if (mask := probabilities.dropout_mask(probs)) is not None:
                    probs.mul_(mask)
                tile.store(sweep.work.matmul("out", probs, tile.value), part.of(out))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, keep, *maps = ctx.saved_tensors
        grads = _backward(dout, query, key, value, keep, _compression(maps), ctx.call)
        return *grads, *(None for _ in range(2 + len(maps)))


def _backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, keep: Tensor, compression: Compression | None, call: _Call
) -> tuple[Tensor, Tensor, Tensor]:
    dquery, dkey, dvalue = (torch.empty_like(x) for x in (query, key, value))
    sweep = Sweep(query, key, value, keep, compression, call.pattern, call.threads)
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
        sweep.finish(part, drows, dquery, dkey, dvalue, call.scale)
    return dquery, dkey, dvalue


class _Probabilities:
    """The attention probabilities of tiles, and their dropout masks in the order of the sweep."""

    def __init__(self, call: _Call, sweep: Sweep) -> None:
        self._scale, self._kept, self._work = call.scale, 1.0 - call.dropout_p, sweep.work
        self._generator = torch.Generator(sweep.query.device).manual_seed(call.seed) if call.dropout_p else None

    def of(self, tile: Tile, query: Tensor) -> Tensor:
        """The probabilities (heads * blocks, size, window) of the tile's queries, 0 where a key is not visible."""
        scores = self._work.matmul("probs", query, tile.key.mT, self._scale)
        blocks = scores.view(-1, tile.visible.shape[1], *scores.shape[1:])  # (heads, blocks, size, window)
        for start, stop in tile.clipped:
            visible = tile.visible[:, start:stop].unsqueeze(2)
            # the least finite number and not -inf, which would make a row NaN that sees nothing
            bias = torch.zeros_like(visible, dtype=scores.dtype)
            blocks[:, start:stop].add_(bias.masked_fill_(~visible, torch.finfo(scores.dtype).min))
        return torch.softmax(scores, dim=-1, out=scores)

    def dropout_mask(self, probs: Tensor) -> Tensor | None:
        """The next mask, shaped as ``probs``: 0 with probability p, else 1 / (1 - p). None without dropout."""
        if self._generator is None:
            return None
        mask = self._work.empty("mask", *probs.shape)
        return mask.bernoulli_(self._kept, generator=self._generator).div_(self._kept)
