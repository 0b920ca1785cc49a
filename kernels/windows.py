"""Who sees whom, tile by tile: the keys that a tile of queries sees, and the queries that see a tile of keys.

A KIND of keys is "token", positions of the sequence, or the V.sparsity of slots. ``source``: the Source of a head.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .primitives import is_kept

# Keys whose visibility is looked up at once where the ends of a range are searched for tokens.
_SCAN = tl.constexpr(512)


class Range(NamedTuple):
    """The keys or queries from ``start`` on and before ``stop``."""

    start: Any
    stop: Any


class KeyRange(NamedTuple):
    """A Range of keys, and whether some between its ends are not visible."""

    start: Any
    stop: Any
    has_gaps: Any


class Places(NamedTuple):
    """Where keys lie: ``rows`` after the row ``first``; and which of them can be read."""

    first: Any
    rows: Any
    readable: Any


@triton.jit
def are_consecutive(KIND: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr):
    """Whether the slots of a tile are a run of tokens: of ``block_stride``, from a multiple of TILE on."""
    return KIND == "block_stride" and V.step % TILE == 0 and V.reach % TILE == 0


@triton.jit
def find_keys(start, offs_n, stop, source, KIND: tl.constexpr, V: tl.constexpr):
    """The Places of keys ``offs_n`` after ``start``, of which those from ``stop`` on cannot be read."""
    inside = offs_n < stop - start
    if KIND == "token" or KIND == "compressed":
        return Places(start, offs_n, inside)
    elif KIND == "indexed":
        tokens = tl.load(source.index_ptr + start + offs_n, mask=inside, other=-1)
        return Places(V.num_globals, tokens, tokens >= 0)
    elif KIND == "stride":
        return Places(V.num_globals + start * V.factor + source.head % V.factor, offs_n * V.factor, inside)
    elif are_consecutive(KIND, V, offs_n.shape[0]):
        first = start + start // V.step * (V.block - V.step) + source.head % V.factor * V.step
        return Places(V.num_globals + first, offs_n, inside)
    else:  # block_stride
        slots = start + offs_n
        tokens = slots // V.step * V.block + source.head % V.factor * V.step + slots % V.step
        return Places(V.num_globals, tokens, inside)


@triton.jit
def are_visible(places, start, offs_n, source, KIND: tl.constexpr, V: tl.constexpr):
    """Which keys that can be read are tokens, or slots that are kept."""
    if KIND == "compressed":
        return tl.load(source.index_ptr + start + offs_n, mask=places.readable, other=-1) >= 0
    elif KIND == "indexed":
        return places.readable
    else:
        return is_kept(source.mask, places.first, places.rows, places.readable, V)


@triton.jit
def look(start, offs_n, stop, source, KIND: tl.constexpr, V: tl.constexpr):
    """Which of keys ``offs_n`` after ``start`` and before ``stop`` are visible."""
    return are_visible(find_keys(start, offs_n, stop, source, KIND, V), start, offs_n, source, KIND, V)


@triton.jit
def _join(first, last, count, other_first, other_last, other_count):
    return tl.minimum(first, other_first), tl.maximum(last, other_last), count + other_count


@triton.jit
def uniform(x):
    """An int32 that is the same in all threads, known as such to the compiler.

    A warp's maximum is: ptxas keeps it in a uniform register, and so the counter of a loop that it bounds.
    """
    return tl.max(tl.zeros((32,), tl.int32) + x, 0)


@triton.jit
def any_of(visible):
    """Whether some of the keys are visible."""
    return uniform(tl.max(visible.to(tl.int32), 0)) > 0


@triton.jit
def trim(start, stop, source, KIND: tl.constexpr, V: tl.constexpr):
    """Keys [start, stop) from the first visible one to the last, and whether some between them are not visible.

    So tiles of padding at either end are never read, and nearly always the others need no look at the mask. Without a
    mask only the slots of the last tokens, too few for a chunk, can be missing, and those of lsh.
    """
    if V.has_mask or KIND == "compressed":
        offs_n = tl.arange(0, _SCAN)
        first, last, count = stop + 0 * offs_n, 0 * offs_n, 0 * offs_n  # (_SCAN,)
        for at in tl.range(start, stop, _SCAN):
            visible = look(at, offs_n, stop, source, KIND, V)
            first = tl.minimum(first, tl.where(visible, at + offs_n, stop))
            last = tl.maximum(last, tl.where(visible, at + offs_n + 1, 0))
            count += visible.to(tl.int32)
        first, last, count = tl.reduce((first, last, count), 0, _join)
        first, last = uniform(first), uniform(last)
        return KeyRange(first, last, uniform(count) < last - first)
    elif KIND == "indexed":
        return KeyRange(start, stop, stop > source.num_tokens // V.chunk * (V.chunk // V.factor))
    else:
        return KeyRange(uniform(start), uniform(stop), False)


@triton.jit
def aligned(keys, KIND: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr):
    """The KeyRange, from a multiple of TILE on where that makes the keys of a tile consecutive: only trim moved it."""
    if V.has_mask and are_consecutive(KIND, V, TILE):
        start = keys.start // TILE * TILE
        return KeyRange(start, keys.stop, keys.has_gaps | (start < keys.start))
    else:
        return keys


@triton.jit
def global_keys(V: tl.constexpr):
    """The KeyRange of the globals."""
    return KeyRange(0, V.num_globals, V.has_mask)


@triton.jit
def positions_of_globals(num_tokens, V: tl.constexpr):
    """How many positions, from the first on, the global queries see."""
    if V.causal:
        return V.num_globals
    else:
        return V.num_globals + num_tokens


@triton.jit
def slots_seen(first, last, source, V: tl.constexpr):
    """The KeyRanges of slots that query blocks [first, last] see left and right of their local windows.

    The windows of several blocks may leave no gap between the two.
    """
    KIND: tl.constexpr = V.sparsity
    left_stop = tl.maximum((last - 1) * V.step, 0)
    left = trim(tl.maximum((first - 1) * V.step - V.reach, 0), left_stop, source, KIND, V)
    if V.causal:
        return left, KeyRange(0, 0, False)
    else:
        right_start = tl.maximum((first + 2) * V.step, left_stop)
        right_stop = tl.minimum((last + 2) * V.step + V.reach, source.num_slots)
        return left, trim(right_start, right_stop, source, KIND, V)


@triton.jit
def tokens_seen(first_row, last_row, source, V: tl.constexpr):
    """The KeyRange of positions that tokens [first_row, last_row] see in their local windows.

    Of a causal pattern only what comes before them; then there is :func:`own_tokens` too.
    """
    G: tl.constexpr = V.num_globals
    start = tl.maximum(first_row // V.block - 1, 0) * V.block
    if V.causal:
        return trim(G + start, G + first_row, source, "token", V)
    else:
        stop = tl.minimum((last_row // V.block + 2) * V.block, source.num_tokens)
        return trim(G + start, G + stop, source, "token", V)


@triton.jit
def own_tokens(first_row, last_row, source, V: tl.constexpr):
    """The KeyRange of tokens [first_row, last_row] themselves, of which each sees those up to it."""
    return trim(V.num_globals + first_row, V.num_globals + last_row + 1, source, "token", V)


@triton.jit
def has_no_query(first_row, section, ROWS: tl.constexpr):
    """Whether none of ROWS tokens from ``first_row`` on is a query of a Section."""
    return (first_row + ROWS <= section.first_query) | (first_row >= section.stop_query)


@triton.jit
def are_queries(first_row, offs_m, source, V: tl.constexpr):
    """Which of the tokens ``offs_m`` after ``first_row`` are queries: all, but in a section."""
    if V.sectioned:
        from_first = offs_m >= source.section.first_query - first_row
        return from_first & (offs_m < source.section.stop_query - first_row)
    else:
        return offs_m < source.num_tokens - first_row


@triton.jit
def stop_of_queries(source, V: tl.constexpr):
    """The token that queries come before."""
    if V.sectioned:
        return source.section.stop_query
    else:
        return source.num_tokens


@triton.jit
def _from_first_query(start, source, V: tl.constexpr):
    """The token ``start``, or the first query where that is later: which is a block's start, as windows' ends are."""
    if V.sectioned:
        return tl.maximum(start, source.section.first_query)
    else:
        return start


@triton.jit
def tokens_that_see_tokens(first_key, last_key, stop_query, source, V: tl.constexpr, TILE: tl.constexpr):
    """The Ranges of queries before ``stop_query`` whose local windows have some of tokens [first_key, last_key].

    They start at a multiple of four, as dropout wants it: where that is not a block's start, tiles look at windows.
    Of a causal pattern the second has the tiles of TILE tokens in which these tokens lie themselves; the first has what
    comes after. Otherwise the second is empty.
    """
    stop = tl.minimum((last_key // V.block + 2) * V.block, stop_query)
    if V.causal:
        own_start = _from_first_query(first_key // TILE * TILE, source, V)
        own_stop = tl.minimum(own_start + tl.cdiv(last_key + 1 - own_start, TILE) * TILE, stop)
        return Range(_from_first_query(own_stop, source, V), stop), Range(own_start, own_stop)
    else:
        start = tl.maximum(first_key // V.block - 1, 0) * V.block
        return Range(_from_first_query(start // 4 * 4, source, V), stop), Range(0, 0)


@triton.jit
def tokens_that_see_slots(first_slot, last_slot, stop_query, source, V: tl.constexpr):
    """The Ranges of queries before ``stop_query``, left and right of slots [first_slot, last_slot], that see any.

    Of a causal pattern, those to the right, and none.
    """
    first, last = first_slot // V.step, last_slot // V.step  # the slots' own blocks
    right_start = _from_first_query((first + 2) * V.block // 4 * 4, source, V)
    # in blocks first: a reach that is no limit would be 2^31 tokens and more
    right_stop = tl.minimum((last_slot + V.reach) // V.step + 2, tl.cdiv(stop_query, V.block))
    right_stop = tl.minimum(right_stop * V.block, stop_query)
    if V.causal:
        return Range(right_start, right_stop), Range(0, 0)
    else:
        start = tl.maximum((first_slot - V.reach) // V.step - 1, 0) * V.block
        stop = tl.minimum(tl.cdiv(tl.maximum(last - 1, 0) * V.block, 4) * 4, stop_query)
        right_start = tl.maximum(right_start, stop)  # the slots of many blocks have no gap between
        return Range(_from_first_query(start // 4 * 4, source, V), stop), Range(right_start, right_stop)


@triton.jit
def in_windows(row_block, offs_n, KIND: tl.constexpr, V: tl.constexpr):
    """Which keys are in the windows of the block of each row, apart from what is later in a causal pattern's blocks.

    row_block and offs_n broadcast to a tile.
    """
    if KIND == "token":
        return tl.abs(row_block - (offs_n - V.num_globals) // V.block) <= 1
    else:
        left = (row_block - 1) * V.step - offs_n  # above 0: left of the local window
        if V.causal:
            return (left > 0) & (left <= V.reach)
        else:
            right = offs_n - (row_block + 2) * V.step  # 0 or more: right of it
            return ((left > 0) & (left <= V.reach)) | ((right >= 0) & (right < V.reach))


@triton.jit
def key_columns(start, offs_n, source, KIND: tl.constexpr, V: tl.constexpr):
    """The columns that dropout counts keys by: positions of the whole sequence, and after them slots.

    They are keys ``offs_n`` after ``start``: tokens, unless that is a global.
    """
    if KIND != "token":
        start += source.generator.slots
    if V.sectioned:
        if KIND == "token":
            start += tl.where(start < V.num_globals, 0, source.section.first_token)
        else:
            start += source.section.first_token // V.block * V.step
    return start + offs_n


@triton.jit
def group_of_token(token, source, V: tl.constexpr):
    """The group of four queries, as dropout counts them, that a token starts. The globals have groups of their own."""
    group = (V.num_globals + 3) // 4 + token // 4
    if V.sectioned:
        group += source.section.first_token // 4
    return group
