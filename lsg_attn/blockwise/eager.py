"""The steps in eager PyTorch: a few query blocks at a time, on any device.

The key and value rows that they see are copied side by side into a small workspace, and two batched matmuls and the
exponentials between them run there, in cache. The backward computes the probabilities again from q, k and the
log-sum-exp.

Probabilities are powers of two of the scores as they are, as finding a row's maximum and subtracting it would take as
long as the powers. Where a sum of them comes out too large or too small, they are computed again with it subtracted.
"""

from __future__ import annotations

import hashlib
import math
import struct

import torch
from torch import Tensor

from ..call import Call
from ..compression import Compression, compress_call
from ..workspace import matmul_out
from .sweep import Part, Sweep, Tile

_LOG2E = 1.0 / math.log(2.0)
# The sums of powers of two that need no maximum: no power overflows, and what underflows is too small to count.
_LEAST_SUM, _MOST_SUM = 2.0**-40, 2.0**40


def compress(call: Call) -> Compression | None:
    """The compression of the call's keys, or None."""
    return compress_call(call)


def forward(call: Call, compression: Compression | None, threads: int) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of the scores; heads are shared out over ``threads``."""
    batch, heads, length, head_dim = call.query.shape
    # (batch, length, heads, head_dim) in memory, as an output projection wants it
    out = call.query.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    sweep = Sweep(call, compression, threads)
    lse = call.query.new_empty(batch, heads, length, dtype=sweep.sum_dtype)
    probabilities = _Probabilities(call, sweep)
    for part in sweep.parts():
        for tile in sweep.tiles(part):
            probs, log_sums = probabilities.of(tile, sweep.load(tile, "query", part.query))
            if (mask := probabilities.dropout_mask(part, tile, probs)) is not None:
                probs.mul_(mask)
            tile.store(sweep.work.matmul("out", probs, tile.value), part.of(out))
            tile.store(log_sums, part.of(lse).unsqueeze(-1))
    return out, lse


def backward(
    call: Call, compression: Compression | None, threads: int, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value; the same ``threads`` as in the forward give the same dropout.

    ``dlse``: the gradient of the log-sum-exp, or None.
    """
    dquery, dkey, dvalue = (torch.empty_like(x) for x in (call.query, call.key, call.value))
    sweep = Sweep(call, compression, threads)
    probabilities = _Probabilities(call, sweep)
    work = sweep.work
    for part in sweep.parts():
        drows = {name: x.flatten(0, 2) for name, x in sweep.gradients_of_rows(part).items()}
        for tile in sweep.tiles(part):
            query_tile = sweep.load(tile, "query", part.query)
            dout_tile = sweep.load(tile, "dout", part.of(dout))
            hint = None
            if work.dtype != sweep.sum_dtype:
                hint = sweep.load(tile, "lse", part.of(lse).unsqueeze(-1), sweep.sum_dtype)
            probs, _ = probabilities.of(tile, query_tile, hint)
            mask = probabilities.dropout_mask(part, tile, probs)
            dprobs = work.matmul("dprobs", dout_tile, tile.value.mT)
            tile.hide(dprobs, 0.0)  # what a hidden value gives may be infinite
            dropped = probs
            if mask is not None:
                dprobs.mul_(mask)
                dropped = mask.mul_(probs)
            dwindow = work.empty("dwindow", 2, *tile.key.shape)  # of key, value
            matmul_out(dwindow[1], dropped.mT, dout_tile)
            # dscores = probs * (dprobs - rowsum(probs * dprobs)), in place
            dscores = torch.ops.aten._softmax_backward_data.out(dprobs, probs, -1, probs.dtype, grad_input=dprobs)
            if dlse is not None:
                dscores.addcmul_(probs, sweep.load(tile, "dlse", part.of(dlse).unsqueeze(-1)))
            matmul_out(dwindow[0], dscores.mT, query_tile, call.scale)
            tile.scatter_add(dwindow, drows)
            tile.store(work.matmul("out", dscores, tile.key, call.scale), part.of(dquery))
        sweep.clear(part.of(dquery))
        sweep.finish(part, drows, dquery, dkey, dvalue)
    return dquery, dkey, dvalue


class _Probabilities:
    """The attention probabilities of tiles, and their dropout masks."""

    def __init__(self, call: Call, sweep: Sweep) -> None:
        self._scale_log2, self._kept = call.scale * _LOG2E, 1.0 - call.dropout_p
        self._work, self._sum_dtype = sweep.work, sweep.sum_dtype
        self._call, self._layout = call, sweep.layout
        self._subtracts = False

    def of(self, tile: Tile, query: Tensor, lse: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The probabilities of the tile's queries, 0 where a key is not visible, and the log-sum-exp of their scores.

        ``lse``: what the same call returned before, a hint by which scores lose less in a 16-bit product.

        Returns:
            (heads * blocks, size, window), and (heads * blocks, size, 1) float32 or float64.
        """
        base = self._base(tile, lse)
        powers = self._scores(tile, query, base)
        shift: Tensor | float = 0.0
        if subtracts := self._subtracts or tile.visible is not None:
            shift = powers.amax(-1, keepdim=True).clamp_min_(torch.finfo(powers.dtype).min)  # finite if none is seen
            powers.sub_(shift)
        sums = powers.exp2_().sum(-1, keepdim=True)
        if not subtracts and not _are_in_range(sums):
            self._subtracts = True  # the next tiles are probably alike
            return self.of(tile, query, lse)
        log_sums = sums.log2().add_(shift).sub_(base).div_(_LOG2E)
        if tile.visible is not None:
            sees_nothing = sums == 0
            log_sums.masked_fill_(sees_nothing, torch.inf)
            sums.masked_fill_(sees_nothing, 1)
        probs = self._work.empty("probs", *powers.shape)
        return torch.div(powers, sums, out=probs), log_sums

    def _base(self, tile: Tile, lse: Tensor | None) -> Tensor | float:
        """What is added to scores before a product rounds them: it makes small those that matter."""
        if lse is None:
            return 0.0
        return (math.log2(tile.key.shape[1]) - lse * _LOG2E).to(self._work.dtype)

    def _scores(self, tile: Tile, query: Tensor, base: Tensor | float) -> Tensor:
        """The scores as powers of two, plus ``base``, in the sums' dtype; -inf where a key is not visible."""
        scores = self._work.empty("probs", *query.shape[:2], tile.key.shape[1])
        if isinstance(base, Tensor):
            torch.baddbmm(base, query, tile.key.mT, alpha=self._scale_log2, out=scores)
        else:
            matmul_out(scores, query, tile.key.mT, self._scale_log2)
        tile.hide(scores, -torch.inf)
        if scores.dtype == self._sum_dtype:
            return scores
        return self._work.empty("powers", *scores.shape, dtype=self._sum_dtype).copy_(scores)

    def dropout_mask(self, part: Part, tile: Tile, probs: Tensor) -> Tensor | None:
        """A tile's mask, shaped as ``probs``: 0 with probability p, else 1 / (1 - p). None without dropout.

        Of each block of queries, or of keys where queries see all, it is drawn by the block's number in the whole
        sequence: so each section of a sequence draws what the sequence does.
        """
        if not self._call.dropout_p:
            return None
        mask, generator = self._work.empty("mask", *probs.shape), torch.Generator(probs.device)
        for piece, *numbers in self._layout.drawn(tile.start, tile.stop, tile.windows):
            of_piece = mask.view(part.query.shape[0], -1, *probs.shape[1:])[piece]  # (heads, rows, columns)
            generator.manual_seed(_mixed(self._call.seed_value(), part.batch, part.heads.start, *numbers))
            of_piece.copy_(self._work.empty("drawn", *of_piece.shape).bernoulli_(self._kept, generator=generator))
        return mask.div_(self._kept)


def _mixed(*numbers: int) -> int:
    """A seed that differs where one of some integers of 64 bits does."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def _are_in_range(sums: Tensor) -> bool:
    least, most = sums.aminmax()
    return least.item() >= _LEAST_SUM and most.item() <= _MOST_SUM
