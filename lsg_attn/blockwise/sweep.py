"""The sweep of the block-wise implementation: over a few heads at a time, and over tiles of their query blocks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..call import Call
from ..compression import Compression, bos_pooling_backward, sum_rows
from ..workspace import Workspace
from .layout import Layout

# Scores computed at a time. On 2 cores with 2 MiB of L2 cache each 2^20 and 2^21 are alike, 2^18 loses 20%; a GPU wants
# more work in each launch.
_CPU_SCORES, _GPU_SCORES = 1 << 21, 1 << 25


@dataclass(frozen=True)
class Part:
    """Some heads of one batch entry; ``rows`` (2 * heads, num_rows, head_dim) hold their keys, then their values.

    Rows of padding are zero, so that the output of a query that sees nothing is 0: a uniform mean of zeros.
    """

    batch: int
    heads: slice
    query: Tensor  # (heads, G+T, head_dim)
    rows: Tensor
    keep: Tensor  # (G+T,) bool
    has_padding: bool
    visible: Tensor  # (heads, blocks, window) bool
    clipped: list[bool]  # for each block, whether something in its window is not visible
    compression: Compression | None

    def of(self, x: Tensor) -> Tensor:
        """The part (heads, G+T, head_dim) of x (batch, heads, G+T, head_dim)."""
        return x[self.batch, self.heads]


@dataclass(frozen=True)
class Tile:
    """Queries [start, stop) of each head, in blocks of ``size`` rows that each see one window of keys.

    ``key, value``: (heads * blocks, window, head_dim). ``visible``: (heads or 1, blocks, window) bool; ``clipped``: the
    runs [start, stop) of blocks in which not all of it is true. ``first_block`` is None where the one block's window is
    the whole sequence. ``later``: (size, columns) bool, which of the window's last columns come later than each query;
    None unless the pattern is causal.
    """

    layout: Layout
    start: int
    stop: int
    size: int
    first_block: int | None
    key: Tensor
    value: Tensor
    visible: Tensor
    clipped: list[tuple[int, int]]
    later: Tensor | None

    def load(self, x: Tensor, out: Tensor) -> Tensor:
        """Copy the tile's queries of x (heads, G+T, head_dim) to out (heads, queries, head_dim), zeros past the end.

        Returns:
            out as (heads * blocks, size, head_dim).
        """
        count = self.stop - self.start
        out[:, :count] = x[:, self.start : self.stop]
        out[:, count:] = 0
        return out.view(-1, self.size, out.shape[-1])

    def store(self, x: Tensor, out: Tensor) -> None:
        """The reverse of :meth:`load`: write x to the tile's queries of out (heads, G+T, head_dim)."""
        rows = x.view(out.shape[0], -1, out.shape[-1])
        out[:, self.start : self.stop] = rows[:, : self.stop - self.start]

    def scatter_add(self, dwindow: Tensor, drows: Tensor) -> None:
        """Add gradients (2, *key.shape) of keys and values to those of the rows their windows were copied from."""
        if self.first_block is None:
            drows[:, self.layout.sequence] += dwindow.flatten(0, 1)
        else:
            _, _, window, head_dim = dwindow.shape
            self.layout.scatter_add(drows, self.first_block, dwindow.view(drows.shape[0], -1, window, head_dim))


class Sweep:
    """The order in which forward and backward go over parts and tiles, and the memory that they use again.

    ``threads``: of the CPU, to share heads out over. The same arguments give the same order.
    """

    def __init__(self, call: Call, compression: Compression | None, threads: int) -> None:
        self.call, self.compression, self.keep = call, compression, call.keep()
        query, pattern = call.query, call.pattern
        self.layout = layout = Layout(pattern, query.shape[-2])
        self.work = Workspace(query)
        self.sum_dtype = torch.promote_types(query.dtype, torch.float32)
        _, heads, length, head_dim = query.shape
        self.scores_of_block = max(pattern.block_size * layout.window, 1)  # in each head
        scores_of_head = max(layout.num_blocks * self.scores_of_block, layout.num_dense * length, 1)
        if query.device.type == "cpu":
            self.budget = max(_CPU_SCORES, threads * self.scores_of_block)
            # Heads are what threads share out best: each then finds its keys and values in its own cache.
            heads_of_part = max(self.budget // scores_of_head, threads)
        else:
            self.budget = _GPU_SCORES
            heads_of_part = self.budget // scores_of_head
        self.head_spans = list(_spans(heads, heads_of_part))
        most = max((stop - start for start, stop in self.head_spans), default=0)
        self.rows = query.new_zeros(2 * most, layout.num_rows, head_dim)

    def parts(self) -> Iterator[Part]:
        """Go over the batch, and over as many heads at a time as the budget of scores allows."""
        for entry in range(self.call.query.shape[0]):
            visible = self._visible(entry)
            keep = self.keep[entry]
            has_padding = not keep.all()
            for chosen in itertools.starmap(slice, self.head_spans):
                compression = None if self.compression is None else self.compression.part(entry, chosen)
                rows = self._fill(entry, chosen, has_padding, compression)
                clipped = (~visible[chosen]).any(2).any(0).tolist()
                query = self.call.query[entry, chosen]
                yield Part(entry, chosen, query, rows, keep, has_padding, visible[chosen], clipped, compression)

    def tiles(self, part: Part) -> Iterator[Tile]:
        """Go over the part's queries: first those that see the whole sequence, then the blocks."""
        layout, first, size = self.layout, self.call.pattern.num_global_tokens, self.call.pattern.block_size
        heads, length, head_dim = part.query.shape
        key, value = part.rows[:, layout.sequence].unflatten(0, (2, heads))
        clipped = [(0, 1)] if part.has_padding else []
        for start, stop in _spans(layout.num_dense, self.budget // max(heads * length, 1)):
            later = self._later(start, stop)
            yield Tile(layout, start, stop, stop - start, None, key, value, part.keep[None, None], clipped, later)
        later = self._later_in_block()
        for block, end in _spans(layout.num_blocks, self.budget // (heads * self.scores_of_block)):
            window = self.work.empty("window", 2 * heads, end - block, layout.window, head_dim)
            key, value = layout.gather(part.rows, block, window).view(2, -1, layout.window, head_dim)
            clipped = _runs(part.clipped[block:end])
            start, stop = first + block * size, min(first + end * size, length)
            yield Tile(layout, start, stop, size, block, key, value, part.visible[:, block:end], clipped, later)

    def load(self, tile: Tile, name: str, x: Tensor) -> Tensor:
        """The tile's queries (heads * blocks, size, head_dim) of x (heads, G+T, head_dim), in the memory ``name``."""
        heads, _, head_dim = x.shape
        return tile.load(x, self.work.empty(name, heads, tile.visible.shape[1] * tile.size, head_dim))

    def finish(self, part: Part, drows: Tensor, dquery: Tensor, dkey: Tensor, dvalue: Tensor) -> None:
        """Bring a part's gradients of compressed keys back to the tokens, and store those of keys and values."""
        layout, compression, heads = self.layout, part.compression, part.query.shape[0]
        if compression is not None:
            dkey_slots, dvalue_slots = drows[:, layout.slots].unflatten(0, (2, heads))
            dkey_tokens, dvalue_tokens = drows[:, layout.tokens].unflatten(0, (2, heads))
            if self.call.rule.has_weight_gradient:
                key, value = part.rows[:, layout.tokens].unflatten(0, (2, heads))
                bos = self.call.pattern.num_global_tokens
                dbos, dkey_weights = bos_pooling_backward(
                    compression, part.query[:, bos], key, value, dkey_slots, dvalue_slots, self.call.scale
                )
                part.of(dquery)[:, bos] += dbos
                dkey_tokens += dkey_weights
            if compression.token is not None:
                layout.give(drows, compression.token)
            else:
                dkey_tokens += compression.transpose(dkey_slots)
                dvalue_tokens += compression.transpose(dvalue_slots)
        sequence = drows[:, layout.sequence]
        if part.has_padding:
            # A query that sees nothing spreads evenly over zero values; its gradient must not reach them.
            sequence.masked_fill_(~part.keep.unsqueeze(-1), 0)
        for grad, rows in zip((dkey, dvalue), sequence.split(heads), strict=True):
            part.of(grad).copy_(rows)

    def _later(self, start: int, stop: int) -> Tensor | None:
        """(stop - start, G+T) bool: which positions are tokens later than each position from ``start`` to ``stop``."""
        if not self.call.pattern.causal:
            return None
        index = torch.arange(self.layout.length, device=self.keep.device)
        return (index >= self.call.pattern.num_global_tokens) & (index > index[start:stop, None])

    def _later_in_block(self) -> Tensor | None:
        """(B, B) bool: which tokens of a block, the last of its window, are later than each token of the block."""
        if not self.call.pattern.causal:
            return None
        index = torch.arange(self.call.pattern.block_size, device=self.keep.device)
        return index > index[:, None]

    def _visible(self, entry: int) -> Tensor:
        """(heads, blocks, window) bool of one batch entry."""
        keep = self.keep.new_zeros(self.call.query.shape[1], self.layout.num_rows)
        keep[:, self.layout.sequence] = self.keep[entry]
        if self.compression is not None:
            keep[:, self.layout.slots] = self.compression.keep[entry]
        return self.layout.visible(keep)

    def _fill(self, entry: int, heads: slice, has_padding: bool, compression: Compression | None) -> Tensor:
        """Copy keys and values of some heads into the rows, compress them there; margins stay zero from the start."""
        layout, count = self.layout, heads.stop - heads.start
        rows = self.rows[: 2 * count]
        sequence = rows[:, layout.sequence]
        for x, target in zip((self.call.key, self.call.value), sequence.split(count), strict=True):
            target.copy_(x[entry, heads])
        if has_padding:
            sequence.masked_fill_(~self.keep[entry].unsqueeze(-1), 0)
        if compression is not None and compression.token is not None:
            layout.take(rows, compression.token)
        elif compression is not None:
            tokens = rows[:, layout.tokens].unflatten(0, (2, count))
            weighted = self.work.empty("weighted", *tokens.shape, dtype=self.sum_dtype)
            torch.mul(tokens, compression.weight.unsqueeze(-1), out=weighted)
            sums = self.work.empty("sums", 2, *compression.keep.shape, tokens.shape[-1], dtype=self.sum_dtype)
            rows[:, layout.slots] = sum_rows(weighted, compression.slot, sums.zero_()).flatten(0, 1)
        return rows


def _spans(total: int, step: int) -> Iterator[tuple[int, int]]:
    """Cut range(total) into spans (start, stop) of ``step`` each, or of 1 where that is 0; the last may be shorter."""
    step = max(step, 1)
    for start in range(0, total, step):
        yield start, min(start + step, total)


def _runs(flags: list[bool]) -> list[tuple[int, int]]:
    """The spans (start, stop) of consecutive true flags."""
    edges = [i for i, (a, b) in enumerate(zip([False, *flags], [*flags, False], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))
