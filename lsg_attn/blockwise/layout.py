"""Layout of the block-wise implementation: which rows of the sequence and of the slots the windows of blocks are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import Section
from ..pattern import LSGPattern


class Segment(NamedTuple):
    """A piece of the windows of consecutive blocks: of block i of them, ``size`` rows from ``start + i * stride`` on.

    ``source``: where the rows lie, in the "sequence" (globals first) or in the "slots".
    """

    source: str
    start: int
    stride: int
    size: int


@dataclass(frozen=True)
class Windows:
    """The windows of ``blocks`` consecutive blocks, cut into segments in the order of their columns.

    They are windows of whole tensors: a source is (n, rows, width), with any strides.
    """

    blocks: int
    segments: Sequence[Segment]

    @property
    def size(self) -> int:
        """Rows in the window of one block."""
        return sum(segment.size for segment in self.segments)

    def gather(self, sources: Mapping[str, Tensor], out: Tensor) -> Tensor:
        """Copy the windows to out (n, blocks, size, width), in its dtype."""
        views = [_view(sources[segment.source], segment, self.blocks) for segment in self.segments]
        return torch.cat(views, dim=2, out=out)

    def scatter_add(self, sources: Mapping[str, Tensor], x: Tensor) -> None:
        """Add x (n, blocks, size, width) to the rows that :meth:`gather` copies it from."""
        for segment, columns in zip(self.segments, self._columns, strict=True):
            part, rows = x[:, :, columns], sources[segment.source]
            if segment.stride == 0:
                rows[:, segment.start : segment.start + segment.size] += part.sum(1, dtype=rows.dtype)
                continue
            # Windows overlap; pieces no longer than a stride do not, and can be added for all blocks at once.
            for i, piece in enumerate(part.split(segment.stride if self.blocks > 1 else segment.size, dim=2)):
                target = segment._replace(start=segment.start + i * segment.stride, size=piece.shape[2])
                _view(rows, target, self.blocks).add_(piece)

    def meet(self, source: str, start: int, stop: int) -> bool:
        """Whether some window may have some of the rows [start, stop) of a source."""
        return any(
            segment.source == source
            and start < segment.start + (self.blocks - 1) * segment.stride + segment.size
            and segment.start < stop
            for segment in self.segments
        )

    @cached_property
    def _columns(self) -> tuple[slice, ...]:
        """The columns of a window that each segment fills."""
        stops = accumulate(segment.size for segment in self.segments)
        return tuple(slice(stop - segment.size, stop) for segment, stop in zip(self.segments, stops, strict=True))


class Dense(NamedTuple):
    """Queries [start, stop) that see all rows of the sequence from ``first_key`` on."""

    start: int
    stop: int
    first_key: int


@dataclass(frozen=True)
class Layout:
    """The windows of a pattern in a sequence of ``length`` = G+T tokens, or in such a section of a longer one."""

    pattern: LSGPattern
    length: int
    section: Section | None = None

    @cached_property
    def num_tokens(self) -> int:
        """T."""
        return self.length - self.pattern.num_global_tokens

    @cached_property
    def num_slots(self) -> int:
        """Compressed keys of a head."""
        return self.pattern.num_slots(self.num_tokens)

    @cached_property
    def blocks(self) -> range:
        """The blocks of queries with windows; none where attention is dense."""
        return range(0) if self._is_dense else self._query_blocks

    @cached_property
    def dense(self) -> list[Dense]:
        """The queries that see the whole sequence: the globals, and where attention is dense each block."""
        count = self.pattern.num_global_tokens
        first_key = 0 if self.section is None or self.section.has_globals else count
        blocks = self._query_blocks if self._is_dense else range(0)
        return [
            *([Dense(0, count, first_key)] if count else []),
            *(Dense(*self.queries(block, block + 1), 0) for block in blocks),
        ]

    @cached_property
    def _is_dense(self) -> bool:
        return self.pattern.is_dense(self.num_tokens if self.section is None else self.section.num_tokens)

    @cached_property
    def _query_blocks(self) -> range:
        section = self.section
        start, stop = (0, self.num_tokens) if section is None else (section.start, section.stop)
        return range(start // self.pattern.block_size, self.pattern.num_blocks(stop))

    @cached_property
    def largest_window(self) -> int:
        """Rows in the window of a block that has no end of the sequence near it."""
        return self.pattern.num_global_tokens + sum(size for _, _, size in self._pieces(0))

    def queries(self, first: int, stop: int) -> tuple[int, int]:
        """The positions [start, stop) of the queries in blocks [first, stop)."""
        start, size = self.pattern.num_global_tokens, self.pattern.block_size
        return start + first * size, min(start + stop * size, self.length)

    def drawn(self, start: int, stop: int, windows: Windows | None) -> Iterator[tuple[tuple[Any, ...], int, int]]:
        """The pieces of the scores of queries [start, stop) that dropout draws by themselves.

        ``windows``: theirs, or None where they see the whole sequence.

        Yields:
            The piece's index in (heads, blocks, size, window); then the numbers, in the whole sequence, of its first
            query, and of the block that its keys are: -1 for the globals, -2 for a whole window.
        """
        count, size = self.pattern.num_global_tokens, self.pattern.block_size
        moved = 0 if self.section is None else self.section.first_token
        row = start if start < count else start + moved
        if windows is not None:
            yield from (((slice(None), i), row + i * size, -2) for i in range(windows.blocks))
            return
        if count:
            yield (slice(None), 0, slice(None), slice(count)), row, -1
        for first in range(count, self.length, size):
            yield (slice(None), 0, slice(None), slice(first, first + size)), row, (moved + first - count) // size

    def spans(self, step: int) -> Iterator[tuple[int, int]]:
        """Cut the blocks into runs [first, stop) for :meth:`windows`: of ``step`` where it can be, else shorter."""
        block = self.blocks.start
        while block < self.blocks.stop:
            stop, limit = block + 1, min(block + step, self.blocks.stop)
            if self._is_whole(block):
                while stop < limit and self._is_whole(stop):
                    stop += 1
            yield block, stop
            block = stop

    def windows(self, first: int, stop: int) -> Windows:
        """The windows of blocks [first, stop), of several blocks only where no end of the sequence cuts any."""
        ends = {"sequence": (self.pattern.num_global_tokens, self.length), "slots": (0, self.num_slots)}
        strides = {"sequence": self.pattern.block_size, "slots": self.pattern.step}
        segments = [Segment("sequence", 0, 0, self.pattern.num_global_tokens)]
        for source, start, size in self._pieces(first):
            low, high = ends[source]
            begin, end = max(start, low), min(start + size, high)
            segments.append(Segment(source, begin, strides[source], end - begin))
        return Windows(stop - first, tuple(segment for segment in segments if segment.size > 0))

    def _pieces(self, block: int) -> list[tuple[str, int, int]]:
        """Source, start and size of what a block sees besides the globals, which may extend past either end."""
        pattern = self.pattern
        start, stop = pattern.local_window(block)
        sparse = pattern.sparse_windows(block, self._reach) if self.num_slots else ()
        return [
            *(("slots", left, right - left) for left, right in sparse),
            ("sequence", pattern.num_global_tokens + start, stop - start),
        ]

    def _is_whole(self, block: int) -> bool:
        """Whether no end of the sequence cuts a block or its window."""
        start, stop = self.queries(block, block + 1)
        is_full = stop - start == self.pattern.block_size
        return is_full and self.windows(block, block + 1).size == self.largest_window

    @cached_property
    def _reach(self) -> int:
        return self.pattern.reach(self.num_tokens)


def _view(rows: Tensor, segment: Segment, blocks: int) -> Tensor:
    """A view (n, blocks, segment.size, width) of the segment's rows, which may overlap."""
    n, _, width = rows.shape
    row = rows.stride(1)
    return rows.as_strided(
        (n, blocks, segment.size, width),
        (rows.stride(0), segment.stride * row, row, rows.stride(2)),
        rows.storage_offset() + segment.start * row,
    )
