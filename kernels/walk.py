"""The walk over keys that the forward and the gradient of queries share: globals, slots, then local windows.

What is done with a tile of keys is a STEP: a jit function of (state, tile, keys, offs_n, visible, source, KIND, V) that
returns the next state. ``tile``: a named tuple of the tile's queries that has ``q`` (BLOCK_M, BLOCK_D). ``keys``:
Keys (BLOCK_N, BLOCK_D) of the keys ``offs_n``; ``visible``: which of them each query sees, (1 or BLOCK_M, BLOCK_N).
"""

import triton
import triton.language as tl

from .heads import Keys
from .primitives import load_rows
from .windows import (
    KeyRange,
    are_visible,
    find_keys,
    global_keys,
    in_windows,
    slots_seen,
    tokens_seen,
    trim,
)


@triton.jit
def num_tiles(near, far, BLOCK_N: tl.constexpr):
    """Tiles of BLOCK_N that cover the range ``near``, and both."""
    tiles = tl.cdiv(tl.maximum(near.stop - near.start, 0), BLOCK_N)
    return tiles, tiles + tl.cdiv(tl.maximum(far.stop - far.start, 0), BLOCK_N)


@triton.jit
def tile_of(tile, near_tiles, near, far, BLOCK_N: tl.constexpr):
    """The first number in a tile of two ranges, where its range stops, and whether that is ``near``."""
    is_near = tile < near_tiles
    start = tl.where(is_near, near.start, far.start - near_tiles * BLOCK_N) + tile * BLOCK_N
    return start, tl.where(is_near, near.stop, far.stop), is_near


@triton.jit
def _walk(
    state, tile, row_block, near, far, source,
    KIND: tl.constexpr, WINDOWED: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Take the keys of two KeyRanges into ``state``, BLOCK_N at a time.

    WINDOWED: the tile's rows lie in several blocks ``row_block`` (BLOCK_M,), each of which has windows of its own
    within the ranges.
    """
    rows_of = source.tokens if KIND == "token" else source.slots
    offs_d = tl.arange(0, tile.q.shape[1])
    near_tiles, tiles = num_tiles(near, far, BLOCK_N)
    for i in tl.range(0, tiles):
        start, stop, is_near = tile_of(i, near_tiles, near, far, BLOCK_N)
        offs_n = start + tl.arange(0, BLOCK_N)
        rows, readable = find_keys(offs_n, stop, source, KIND, V)
        k = load_rows(rows_of.k, rows, readable, offs_d, V.head_dim)
        v = load_rows(rows_of.v, rows, readable, offs_d, V.head_dim)
        visible = offs_n < stop
        if tl.where(is_near, near.has_gaps, far.has_gaps):
            visible = are_visible(offs_n, rows, readable, source, KIND, V)
        visible = visible[None, :]
        if WINDOWED:
            visible = visible & in_windows(row_block[:, None], offs_n[None, :], KIND, V)
        state = STEP(state, tile, Keys(k, v), offs_n, visible, source, KIND, V)
    return state


@triton.jit
def walk_part(state, tile, start, stop, source, V: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr):
    """Take positions [start, stop), all of which a tile of global queries sees, into ``state``."""
    near = trim(start, stop, source, "token", V)
    return _walk(state, tile, None, near, KeyRange(0, 0, False), source, "token", False, V, BLOCK_N, STEP)


@triton.jit
def walk_keys(
    state, tile, first_row, source,
    V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Take all keys that BLOCK_M tokens from ``first_row`` on see into ``state``."""
    SPARSITY: tl.constexpr = V.sparsity
    WINDOWED: tl.constexpr = V.block % BLOCK_M != 0
    row_block = (first_row + tl.arange(0, BLOCK_M)) // V.block
    first, last = first_row // V.block, (tl.minimum(first_row + BLOCK_M, source.num_tokens) - 1) // V.block
    none = KeyRange(0, 0, False)
    # 1. The globals.
    if V.num_globals > 0:
        BLOCK_GLOBAL_KEYS: tl.constexpr = BLOCK_G if BLOCK_G < BLOCK_N else BLOCK_N
        near = global_keys(V)
        state = _walk(state, tile, None, near, none, source, "token", False, V, BLOCK_GLOBAL_KEYS, STEP)
    # 2. The slots.
    if SPARSITY != "none":
        near, far = slots_seen(first, last, source, V)
        state = _walk(state, tile, row_block, near, far, source, SPARSITY, WINDOWED, V, BLOCK_N, STEP)
    # 3. The local windows.
    near = tokens_seen(first, last, source, V)
    return _walk(state, tile, row_block, near, none, source, "token", WINDOWED, V, BLOCK_N, STEP)
