"""The walk over keys that the forward and the gradient of queries share: globals, slots, then local windows.

What is done with a tile of keys is a STEP: a jit function of (state, tile, keys, scores, start, offs_n, source, KIND,
V) that returns the next state. ``tile``: a named tuple of the tile's queries that has ``q`` (BLOCK_M, BLOCK_D).
``keys``: Keys (BLOCK_N, BLOCK_D) of the keys ``offs_n`` after ``start``; ``scores``: (BLOCK_M, BLOCK_N), -inf where a
key is not visible.
"""

import triton
import triton.language as tl

from .heads import Keys
from .primitives import load_rows
from .windows import (
    KeyRange,
    aligned,
    find_keys,
    global_keys,
    in_windows,
    look,
    own_tokens,
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
def _score(q, k, start, offs_n, stop, has_gaps, source, KIND: tl.constexpr, V: tl.constexpr, BRANCH: tl.constexpr):
    """The scores of keys ``offs_n`` after ``start``, -inf where one is not visible.

    Only a tile that has such a key looks for them. BRANCH: it alone selects, which is best where a branch can return
    the tile as the tensor cores left it. Where that takes a way through shared memory, all tiles add a row of zeros.
    """
    hides = has_gaps | (start + offs_n.shape[0] > stop)
    if BRANCH:
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        if hides:
            visible = look(start, offs_n, stop, source, KIND, V)
            scores = tl.where(visible[None, :], scores, float("-inf"))
    else:
        hidden = tl.zeros(offs_n.shape, tl.float32)
        if hides:  # before the product: float32's needs so many registers that few values may pass a branch
            hidden = tl.where(look(start, offs_n, stop, source, KIND, V), 0.0, float("-inf"))
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") + hidden[None, :]
    return scores


@triton.jit
def _walk(
    state, tile, row_block, rows, near, far, source,
    KIND: tl.constexpr, WINDOWED: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr, BRANCH: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Take the keys of two KeyRanges into ``state``, BLOCK_N at a time.

    WINDOWED: the tile's rows lie in several blocks ``row_block`` (BLOCK_M,), each of which has windows of its own
    within the ranges. rows: the tokens (BLOCK_M,) that each see no later one of the keys; or None.
    """
    rows_of = source.tokens if KIND == "token" else source.slots
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, tile.q.shape[1])
    near, far = aligned(near, KIND, V, BLOCK_N), aligned(far, KIND, V, BLOCK_N)
    near_tiles, tiles = num_tiles(near, far, BLOCK_N)
    for i in tl.range(0, tiles):
        start, stop, is_near = tile_of(i, near_tiles, near, far, BLOCK_N)
        places = find_keys(start, offs_n, stop, source, KIND, V)
        k = load_rows(rows_of.k, places.first, places.rows, places.readable, offs_d, V.head_dim)
        v = load_rows(rows_of.v, places.first, places.rows, places.readable, offs_d, V.head_dim)
        has_gaps = tl.where(is_near, near.has_gaps, far.has_gaps)
        scores = _score(tile.q, k, start, offs_n, stop, has_gaps, source, KIND, V, BRANCH)
        if WINDOWED:
            visible = in_windows(row_block[:, None], start + offs_n[None, :], KIND, V)
            scores = tl.where(visible, scores, float("-inf"))
        if rows is not None:
            tokens = start - V.num_globals + offs_n
            scores = tl.where(tokens[None, :] <= rows[:, None], scores, float("-inf"))
        state = STEP(state, tile, Keys(k, v), scores, start, offs_n, source, KIND, V)
    return state


@triton.jit
def walk_part(
    state, tile, start, stop, source, V: tl.constexpr, BLOCK_N: tl.constexpr, BRANCH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Take positions [start, stop), all of which a tile of global queries sees, into ``state``."""
    far = KeyRange(0, 0, False)
    if V.sectioned and V.has_dropout:  # columns of a tile are those of globals or of tokens
        near = trim(start, tl.minimum(stop, V.num_globals), source, "token", V)
        far = trim(tl.maximum(start, V.num_globals), stop, source, "token", V)
    else:
        near = trim(start, stop, source, "token", V)
    return _walk(state, tile, None, None, near, far, source, "token", False, V, BLOCK_N, BRANCH, STEP)


@triton.jit
def walk_keys(
    state, tile, first_row, source,
    V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BRANCH: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Take all keys that BLOCK_M tokens from ``first_row`` on see into ``state``."""
    SPARSITY: tl.constexpr = V.sparsity
    WINDOWED: tl.constexpr = V.block % BLOCK_M != 0
    rows = first_row + tl.arange(0, BLOCK_M)
    row_block, last_row = rows // V.block, tl.minimum(first_row + BLOCK_M, source.num_tokens) - 1
    none = KeyRange(0, 0, False)
    # 1. Which slots and tokens. For float32 not before its globals, whose products would then spill registers.
    IS_FLOAT32: tl.constexpr = tile.q.dtype == tl.float32
    left, right, local = none, none, none
    if not IS_FLOAT32:
        left, right, local = _keys_seen(first_row, last_row, source, V)
    # 2. The globals.
    if V.num_globals > 0:
        BLOCK_GLOBAL_KEYS: tl.constexpr = BLOCK_G if BLOCK_G < BLOCK_N else BLOCK_N
        near = global_keys(V)
        state = _walk(state, tile, None, None, near, none, source, "token", False, V, BLOCK_GLOBAL_KEYS, BRANCH, STEP)
    if IS_FLOAT32:
        left, right, local = _keys_seen(first_row, last_row, source, V)
    # 3. The slots.
    if SPARSITY != "none":
        state = _walk(state, tile, row_block, None, left, right, source, SPARSITY, WINDOWED, V, BLOCK_N, BRANCH, STEP)
    # 4. The local windows; of a causal pattern what comes before the tile's tokens, then these.
    state = _walk(state, tile, row_block, None, local, none, source, "token", WINDOWED, V, BLOCK_N, BRANCH, STEP)
    if V.causal:
        own = own_tokens(first_row, last_row, source, V)
        state = _walk(state, tile, row_block, rows, own, none, source, "token", WINDOWED, V, BLOCK_N, BRANCH, STEP)
    return state


@triton.jit
def _keys_seen(first_row, last_row, source, V: tl.constexpr):
    """The KeyRanges that tokens [first_row, last_row] see: slots left and right of their local windows, and these."""
    SPARSITY: tl.constexpr = V.sparsity
    left, right = KeyRange(0, 0, False), KeyRange(0, 0, False)
    if SPARSITY != "none":
        left, right = slots_seen(first_row // V.block, last_row // V.block, source, V)
    return left, right, tokens_seen(first_row, last_row, source, V)
