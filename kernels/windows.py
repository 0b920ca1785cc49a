"""Who sees whom, tile by tile: the keys that a tile of queries sees, and the queries that see a tile of keys.

A KIND of keys is "token", positions of the sequence, or the V.sparsity of slots. ``source``: the Source of a head.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .primitives import is_kept

# Keys whose visibility is looked up at once where the ends of a range are searched for tokens.
_SCAN = tl.constexpr(256)


class Range(NamedTuple):
    """The keys or queries from ``start`` on and before ``stop``."""

    start: Any
    stop: Any


class KeyRange(NamedTuple):
    """A Range of keys, and whether some between its ends are not visible."""

    start: Any
    stop: Any
    has_gaps: Any


@triton.jit
def find_keys(offs_n, stop, source, KIND: tl.constexpr, V: tl.constexpr):
    """The rows where keys ``offs_n`` lie, and which of them can be read."""
    inside = offs_n < stop
    if KIND == "token" or KIND == "compressed":
        return offs_n, inside
    elif KIND == "indexed":
        tokens = tl.load(source.index_ptr + offs_n, mask=inside, other=-1)
        return V.num_globals + tokens, (tokens >= 0) & (tokens < source.num_tokens)
    else:
        if KIND == "stride":
            tokens = offs_n * V.factor + source.head % V.factor
        else:  # block_stride
            tokens = offs_n // V.step * V.block + (source.head * V.step + offs_n % V.step) % V.block
        return V.num_globals + tokens, inside & (tokens < source.num_tokens)


@triton.jit
def are_visible(offs_n, rows, readable, source, KIND: tl.constexpr, V: tl.constexpr):
    """Which keys that can be read are tokens, or slots that are kept."""
    if KIND == "compressed":
        return tl.load(source.index_ptr + offs_n, mask=readable, other=-1) >= 0
    elif KIND == "indexed":
        return readable
    else:
        return is_kept(source.mask, rows, readable, V)


@triton.jit
def trim(start, stop, source, KIND: tl.constexpr, V: tl.constexpr):
    """Keys [start, stop) from the first visible one to the last, and whether some between them are not visible.

    So tiles of padding at either end are never read, and nearly always the others need no look at the mask.
    """
    if V.has_mask or KIND != "token":
        first, last, count = stop, 0, 0
        for at in tl.range(start, stop, _SCAN):
            offs_n = at + tl.arange(0, _SCAN)
            rows, readable = find_keys(offs_n, stop, source, KIND, V)
            visible = are_visible(offs_n, rows, readable, source, KIND, V)
            first = tl.minimum(first, tl.min(tl.where(visible, offs_n, stop), 0))
            last = tl.maximum(last, tl.max(tl.where(visible, offs_n + 1, 0), 0))
            count += tl.sum(visible.to(tl.int32), 0)
        return KeyRange(first, last, count < last - first)
    else:
        return KeyRange(start, stop, False)


@triton.jit
def global_keys(V: tl.constexpr):
    """The KeyRange of the globals."""
    return KeyRange(0, V.num_globals, V.has_mask)


@triton.jit
def slots_seen(first, last, source, V: tl.constexpr):
    """The KeyRanges of slots that query blocks [first, last] see left and right of their local windows.

    The windows of several blocks may leave no gap between the two.
    """
    KIND: tl.constexpr = V.sparsity
    left_stop = tl.maximum((last - 1) * V.step, 0)
    right_start = tl.maximum((first + 2) * V.step, left_stop)
    right_stop = tl.minimum((last + 2) * V.step + V.reach, source.num_slots)
    left = trim(tl.maximum((first - 1) * V.step - V.reach, 0), left_stop, source, KIND, V)
    return left, trim(right_start, right_stop, source, KIND, V)


@triton.jit
def tokens_seen(first, last, source, V: tl.constexpr):
    """The KeyRange of positions that query blocks [first, last] see in their local windows."""
    G: tl.constexpr = V.num_globals
    start, stop = tl.maximum(first - 1, 0) * V.block, tl.minimum((last + 2) * V.block, source.num_tokens)
    return trim(G + start, G + stop, source, "token", V)


@triton.jit
def tokens_that_see_tokens(first_key, last_key, num_tokens, V: tl.constexpr):
    """The Range of tokens whose local windows have some of tokens [first_key, last_key].

    It starts at a multiple of four, as dropout wants it: where that is not a block's start, tiles look at windows.
    """
    start = tl.maximum(first_key // V.block - 1, 0) * V.block
    return Range(start // 4 * 4, tl.minimum((last_key // V.block + 2) * V.block, num_tokens))


@triton.jit
def tokens_that_see_slots(first_slot, last_slot, num_tokens, V: tl.constexpr):
    """The Ranges of tokens left and right of slots [first_slot, last_slot] whose windows have some of them."""
    first, last = first_slot // V.step, last_slot // V.step  # the slots' own blocks
    start = tl.maximum((first_slot - V.reach) // V.step - 1, 0) * V.block
    stop = tl.minimum(tl.cdiv(tl.maximum(last - 1, 0) * V.block, 4) * 4, num_tokens)
    right = tl.maximum((first + 2) * V.block // 4 * 4, stop)  # the slots of many blocks have no gap between
    # in blocks first: a reach that is no limit would be 2^31 tokens and more
    right_stop = tl.minimum((last_slot + V.reach) // V.step + 2, tl.cdiv(num_tokens, V.block))
    return Range(start // 4 * 4, stop), Range(right, tl.minimum(right_stop * V.block, num_tokens))


@triton.jit
def in_windows(row_block, offs_n, KIND: tl.constexpr, V: tl.constexpr):
    """Which keys are in the windows of the block of each row; row_block and offs_n broadcast to a tile."""
    if KIND == "token":
        return tl.abs(row_block - (offs_n - V.num_globals) // V.block) <= 1
    else:
        left = (row_block - 1) * V.step - offs_n  # above 0: left of the local window
        right = offs_n - (row_block + 2) * V.step  # 0 or more: right of it
        return ((left > 0) & (left <= V.reach)) | ((right >= 0) & (right < V.reach))


@triton.jit
def key_columns(offs_n, source, KIND: tl.constexpr, V: tl.constexpr):
    """The columns that dropout counts keys by: positions of the sequence, and after them slots."""
    if KIND == "token":
        return offs_n
    else:
        return V.num_globals + source.num_tokens + offs_n
