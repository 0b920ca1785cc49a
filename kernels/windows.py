"""Who sees whom, tile by tile: the keys that a tile of queries sees, and the queries that see a tile of keys.

A KIND of keys is "token", positions of the sequence, or the V.sparsity of slots. A range of keys is (start, stop,
whether it has gaps), one of queries (start, stop). The ``source`` of a head's keys is what tells their rows and which
are visible: (mask row, index, head, num_tokens); see :func:`.primitives.mask_of` and :func:`index_of`.
"""

import triton
import triton.language as tl

from .primitives import head_ptr, is_kept, load_rows

# Keys whose visibility is looked up at once where the ends of a range are searched for tokens.
_SCAN = tl.constexpr(256)


@triton.jit
def locate_keys(
    k_ptr, v_ptr, sparse_k_ptr, sparse_v_ptr, k_strides, v_strides, sparse_strides, batch, head, V: tl.constexpr
):  # fmt: skip
    """One head's rows of tokens, and of slots: keys, values, their strides."""
    tokens = (head_ptr(k_ptr, k_strides, batch, head), head_ptr(v_ptr, v_strides, batch, head), k_strides, v_strides)
    slots = tokens
    if V.sparsity == "compressed":
        sparse_k_ptr = head_ptr(sparse_k_ptr, sparse_strides, batch, head)
        sparse_v_ptr = head_ptr(sparse_v_ptr, sparse_strides, batch, head)
        slots = (sparse_k_ptr, sparse_v_ptr, sparse_strides, sparse_strides)
    return tokens, slots


@triton.jit
def index_of(index_ptr, batch_head, num_slots, V: tl.constexpr):
    """Pointer to one head's slots in ``index`` (batch, heads, slots) int32, which not every sparsity has.

    It is a slot's token for "indexed", and below 0 for a slot that is not kept.
    """
    if V.sparsity == "indexed" or V.sparsity == "compressed":
        return index_ptr + batch_head * num_slots
    else:
        return 0  # as a function can not return the None that index_ptr is


@triton.jit
def find_keys(offs_n, stop, source, KIND: tl.constexpr, V: tl.constexpr):
    """The rows where keys ``offs_n`` lie, and which of them can be read."""
    _, index_ptr, head, num_tokens = source
    inside = offs_n < stop
    if KIND == "token" or KIND == "compressed":
        return offs_n, inside
    elif KIND == "indexed":
        tokens = tl.load(index_ptr + offs_n, mask=inside, other=-1)
        return V.num_globals + tokens, (tokens >= 0) & (tokens < num_tokens)
    else:
        if KIND == "stride":
            tokens = offs_n * V.factor + head % V.factor
        else:  # block_stride
            tokens = offs_n // V.step * V.block + (head * V.step + offs_n % V.step) % V.block
        return V.num_globals + tokens, inside & (tokens < num_tokens)


@triton.jit
def are_visible(offs_n, rows, readable, source, KIND: tl.constexpr, V: tl.constexpr):
    """Which keys that can be read are tokens, or slots that are kept."""
    mask_row, index_ptr, _, _ = source
    if KIND == "compressed":
        return tl.load(index_ptr + offs_n, mask=readable, other=-1) >= 0
    elif KIND == "indexed":
        return readable
    else:
        return is_kept(mask_row, rows, readable, V)


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
        return first, last, count < last - first
    else:
        return start, stop, False


@triton.jit
def global_keys(V: tl.constexpr):
    """The range of the global keys."""
    return 0, V.num_globals, V.has_mask


@triton.jit
def slots_seen(first, last, num_slots, source, V: tl.constexpr):
    """The ranges of slots that query blocks [first, last] see left and right of their local windows.

    Between those of several blocks there may be no gap.
    """
    KIND: tl.constexpr = V.sparsity
    left_stop = tl.maximum((last - 1) * V.step, 0)
    right_start = tl.maximum((first + 2) * V.step, left_stop)
    right_stop = tl.minimum((last + 2) * V.step + V.reach, num_slots)
    left = trim(tl.maximum((first - 1) * V.step - V.reach, 0), left_stop, source, KIND, V)
    return left, trim(right_start, right_stop, source, KIND, V)


@triton.jit
def tokens_seen(first, last, source, V: tl.constexpr):
    """The range of positions that query blocks [first, last] see in their local windows."""
    G: tl.constexpr = V.num_globals
    start, stop = tl.maximum(first - 1, 0) * V.block, tl.minimum((last + 2) * V.block, source[3])
    return trim(G + start, G + stop, source, "token", V)


@triton.jit
def tokens_that_see_tokens(first_key, last_key, num_tokens, V: tl.constexpr):
    """The range of tokens whose local windows have some of tokens [first_key, last_key].

    It starts at a multiple of four, as dropout wants it: where that is not a block's start, tiles look at windows.
    """
    start = tl.maximum(first_key // V.block - 1, 0) * V.block
    return start // 4 * 4, tl.minimum((last_key // V.block + 2) * V.block, num_tokens)


@triton.jit
def tokens_that_see_slots(first_slot, last_slot, num_tokens, V: tl.constexpr):
    """The ranges of tokens left and right of slots [first_slot, last_slot] whose windows have some of them."""
    first, last = first_slot // V.step, last_slot // V.step  # the slots' own blocks
    start = tl.maximum((first_slot - V.reach) // V.step - 1, 0) * V.block
    stop = tl.minimum(tl.cdiv(tl.maximum(last - 1, 0) * V.block, 4) * 4, num_tokens)
    right = tl.maximum((first + 2) * V.block // 4 * 4, stop)  # the slots of many blocks have no gap between
    # in blocks first: a reach that is no limit would be 2^31 tokens and more
    right_stop = tl.minimum((last_slot + V.reach) // V.step + 2, tl.cdiv(num_tokens, V.block))
    return (start // 4 * 4, stop), (right, tl.minimum(right_stop * V.block, num_tokens))


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
        return V.num_globals + source[3] + offs_n


@triton.jit
def num_tiles(near, far, BLOCK_N: tl.constexpr):
    """Tiles of BLOCK_N that cover the range ``near``, and both."""
    tiles = tl.cdiv(tl.maximum(near[1] - near[0], 0), BLOCK_N)
    return tiles, tiles + tl.cdiv(tl.maximum(far[1] - far[0], 0), BLOCK_N)


@triton.jit
def tile_of(tile, near_tiles, near, far, BLOCK_N: tl.constexpr):
    """The numbers in a tile of two ranges, where its range stops, and whether that is ``near``."""
    is_near = tile < near_tiles
    start = tl.where(is_near, near[0], far[0] - near_tiles * BLOCK_N) + tile * BLOCK_N
    return start, tl.where(is_near, near[1], far[1]), is_near


@triton.jit
def load_keys(
    tile, near_tiles, near, far, row_block, keys, source, offs_d,
    KIND: tl.constexpr, WINDOWED: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of the keys of two ranges: ``offs_n``, k and v (BLOCK_N, BLOCK_D), which are visible (1 or M, BLOCK_N).

    WINDOWED: the queries' rows lie in several blocks ``row_block`` (M,), each of which has windows of its own.
    """
    k_ptr, v_ptr, k_strides, v_strides = keys
    start, stop, is_near = tile_of(tile, near_tiles, near, far, BLOCK_N)
    offs_n = start + tl.arange(0, BLOCK_N)
    rows, readable = find_keys(offs_n, stop, source, KIND, V)
    k = load_rows(k_ptr, k_strides, rows, readable, offs_d, V.head_dim)
    v = load_rows(v_ptr, v_strides, rows, readable, offs_d, V.head_dim)
    visible = offs_n < stop
    if tl.where(is_near, near[2], far[2]):
        visible = are_visible(offs_n, rows, readable, source, KIND, V)
    visible = visible[None, :]
    if WINDOWED:
        visible = visible & in_windows(row_block[:, None], offs_n[None, :], KIND, V)
    return offs_n, k, v, visible
