"""Layout of the block-wise implementation: where tokens, compressed keys and the windows of blocks lie in memory.

A head's tokens and compressed keys lie in one buffer of rows with zeros around both, so that every window of the
pattern lies inside. The windows of consecutive blocks are then equally spaced, and one strided copy moves them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ..pattern import LSGPattern


class _Segment(NamedTuple):
    """A piece of every block's window: for block i, ``size`` rows from ``start + i * stride`` on."""

    start: int
    stride: int
    size: int


@dataclass(frozen=True)
class Layout:
    """Where tokens, compressed keys and windows lie in the rows of a sequence of ``length`` = G+T tokens."""

    pattern: LSGPattern
    length: int

    @cached_property
    def num_blocks(self) -> int:
        """Query blocks; none where attention is dense: every query then sees the whole sequence."""
        return 0 if self.pattern.is_dense(self._num_tokens) else self.pattern.num_blocks(self._num_tokens)

    @cached_property
    def num_dense(self) -> int:
        """Leading queries that see the whole sequence: the globals, or everybody."""
        return self.pattern.num_global_tokens if self.num_blocks else self.length

    @cached_property
    def num_rows(self) -> int:
        """Rows of the buffer."""
        end: int = self.slots.stop
        return end + self._margin

    @cached_property
    def sequence(self) -> slice:
        """The rows of the whole sequence, globals first."""
        # block 0's local window starts one block before the first token
        front = max(self.pattern.block_size - self.pattern.num_global_tokens, 0) if self.num_blocks else 0
        return slice(front, front + self.length)

    @cached_property
    def tokens(self) -> slice:
        """The rows of the T tokens after the globals."""
        return slice(self.sequence.start + self.pattern.num_global_tokens, self.sequence.stop)

    @cached_property
    def slots(self) -> slice:
        """The rows of the compressed keys."""
        # the last block may be short of tokens, and its window holds one block more
        end = self.tokens.start + (self.num_blocks + 1) * self.pattern.block_size if self.num_blocks else self.length
        return slice(end + self._margin, end + self._margin + self.pattern.num_slots(self._num_tokens))

    @cached_property
    def window(self) -> int:
        """Rows in the window of one block, invisible ones included."""
        return sum(segment.size for segment in self._segments)

    def gather(self, rows: Tensor, first: int, out: Tensor) -> Tensor:
        """Copy windows from rows (n, num_rows, width) to out (n, blocks, window, width), of blocks from ``first`` on.

        ``rows`` is contiguous.
        """
        for segment, columns in zip(self._segments, self._columns, strict=True):
            out[:, :, columns].copy_(_windows(rows, segment, first, out.shape[1]))
        return out

    def scatter_add(self, rows: Tensor, first: int, src: Tensor) -> None:
        """Add src (n, blocks, window, width) to the rows that :meth:`gather` copies it from."""
        blocks = src.shape[1]
        for segment, columns in zip(self._segments, self._columns, strict=True):
            part = src[:, :, columns]
            if segment.stride == 0:
                rows[:, segment.start : segment.start + segment.size] += part.sum(1, dtype=rows.dtype)
                continue
            # Windows overlap; pieces no longer than a stride do not, and can be added for all blocks at once.
            for i, piece in enumerate(part.split(segment.stride, dim=2)):
                target = segment._replace(start=segment.start + i * segment.stride, size=piece.shape[2])
                _windows(rows, target, first, blocks).add_(piece)

    def take(self, rows: Tensor, token: Tensor) -> None:
        """Copy the rows of the tokens ``token`` (m, N) to the slots; rows (n, num_rows, width), n a multiple of m."""
        taken = rows.flatten(0, 1).index_select(0, self._flat(rows, token))
        rows[:, self.slots] = taken.view(rows.shape[0], -1, rows.shape[-1])

    def give(self, rows: Tensor, token: Tensor) -> None:
        """Add the rows of the slots to those of the tokens that :meth:`take` copies them from."""
        rows.flatten(0, 1).index_add_(0, self._flat(rows, token), rows[:, self.slots].flatten(0, 1))

    def _flat(self, rows: Tensor, token: Tensor) -> Tensor:
        n, num_rows, _ = rows.shape
        first = torch.arange(0, n * num_rows, num_rows, device=rows.device).view(-1, token.shape[0], 1)
        index: Tensor = first + (token + self.tokens.start)
        return index.flatten()

    def visible(self, keep: Tensor) -> Tensor:
        """(n, blocks, window) bool, which rows of its window a block sees, from keep (n, num_rows) bool."""
        visible = keep.new_empty(keep.shape[0], self.num_blocks, self.window)
        if self.num_blocks:
            self.gather(keep.unsqueeze(-1), 0, visible.unsqueeze(-1))
            local = self._columns[-1].start  # what precedes block 0 is global, and seen as such
            visible[:, 0, local : local + self.pattern.block_size] = False
        return visible

    @cached_property
    def _num_tokens(self) -> int:
        return self.length - self.pattern.num_global_tokens

    @cached_property
    def _reach(self) -> int:
        return self.pattern.reach(self._num_tokens)

    @cached_property
    def _margin(self) -> int:
        """Zeros on each side of the slots, for the first block's left window and the last one's right window."""
        (start, _), _ = self.pattern.sparse_windows(0, self._reach)
        return -start if self._reach else 0

    @cached_property
    def _segments(self) -> tuple[_Segment, ...]:
        """The window of a block: globals, compressed keys to its left and to its right, local tokens."""
        if not self.num_blocks:
            return ()
        pattern = self.pattern
        (start, stop), sparse = pattern.local_window(0), pattern.sparse_windows(0, self._reach)
        segments = (
            _Segment(self.sequence.start, 0, pattern.num_global_tokens),
            *(_Segment(self.slots.start + left, pattern.step, right - left) for left, right in sparse),
            _Segment(self.tokens.start + start, pattern.block_size, stop - start),
        )
        return tuple(segment for segment in segments if segment.size)

    @cached_property
    def _columns(self) -> tuple[slice, ...]:
        """The columns of a window that each segment fills."""
        stops = accumulate(segment.size for segment in self._segments)
        return tuple(slice(stop - segment.size, stop) for segment, stop in zip(self._segments, stops, strict=True))


def _windows(rows: Tensor, segment: _Segment, first: int, blocks: int) -> Tensor:
    """A view (n, blocks, segment.size, width) of the segment's windows, which may overlap."""
    n, num_rows, width = rows.shape
    return rows.as_strided(
        (n, blocks, segment.size, width),
        (num_rows * width, segment.stride * width, width, 1),
        rows.storage_offset() + (segment.start + first * segment.stride) * width,
    )
