"""The forward kernels: local, sparse and global attention in one pass, then the combine of the global queries."""

import triton
import triton.language as tl

from .primitives import (
    LEAST,
    draws_of,
    dropout_keeps,
    generator_of,
    head_ptr,
    load_rows,
    mask_of,
    softmax_end,
    softmax_start,
    softmax_step,
    store_rows,
)
from .windows import (
    global_keys,
    index_of,
    key_columns,
    load_keys,
    locate_keys,
    num_tiles,
    slots_seen,
    tokens_seen,
    trim,
)


@triton.jit
def _attend(
    state, q, row_block, keys, source, draws, scale_log2, near, far,
    KIND: tl.constexpr, WINDOWED: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Take the keys of two ranges, ``near`` and ``far``, into the softmax ``state`` of a tile of queries.

    WINDOWED: the tile's rows lie in several blocks, each of which has windows of its own within the ranges.
    """
    offs_d = tl.arange(0, q.shape[1])
    near_tiles, tiles = num_tiles(near, far, BLOCK_N)
    for tile in tl.range(0, tiles):
        offs_n, k, v, visible = load_keys(
            tile, near_tiles, near, far, row_block, keys, source, offs_d, KIND, WINDOWED, V, BLOCK_N
        )
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        scores = tl.where(visible, scores, float("-inf"))
        keeps = None
        if V.has_dropout:
            keeps = dropout_keeps(draws, key_columns(offs_n, source, KIND, V), q.shape[0], False)
        state = softmax_step(state, scores, v, keeps, scale_log2)
    return state


@triton.jit
def _global_tile(
    first_row, start, stop, q_ptr, q_strides, tokens, source, generator, scale_log2,
    V: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_G global queries over positions [start, stop): their output and log-sum-exp."""
    offs_m, offs_d = first_row + tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    q = load_rows(q_ptr, q_strides, offs_m, offs_m < V.num_globals, offs_d, V.head_dim)  # (BLOCK_G, BLOCK_D)
    draws = draws_of(generator, first_row // 4, BLOCK_G)
    state = softmax_start(BLOCK_G, BLOCK_D)
    near, far = trim(start, stop, source, "token", V), (0, 0, False)
    state = _attend(state, q, None, tokens, source, draws, scale_log2, near, far, "token", False, V, BLOCK_N)
    return softmax_end(state, scale_log2)


@triton.jit
def _token_tile(
    first_row, q_ptr, q_strides, tokens, slots, num_slots, source, generator, scale_log2,
    V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_M tokens from ``first_row`` over all that they see: their output and log-sum-exp."""
    G: tl.constexpr = V.num_globals
    SPARSITY: tl.constexpr = V.sparsity
    WINDOWED: tl.constexpr = V.block % BLOCK_M != 0
    num_tokens = source[3]
    offs_m, offs_d = first_row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q = load_rows(q_ptr, q_strides, G + offs_m, offs_m < num_tokens, offs_d, V.head_dim)  # (BLOCK_M, BLOCK_D)
    draws = draws_of(generator, (G + 3) // 4 + first_row // 4, BLOCK_M)
    row_block = offs_m // V.block
    first, last = first_row // V.block, (tl.minimum(first_row + BLOCK_M, num_tokens) - 1) // V.block
    state = softmax_start(BLOCK_M, BLOCK_D)
    none = (0, 0, False)
    # 1. The globals.
    if G > 0:
        FEW: tl.constexpr = BLOCK_G if BLOCK_G < BLOCK_N else BLOCK_N
        near = global_keys(V)
        state = _attend(state, q, None, tokens, source, draws, scale_log2, near, none, "token", False, V, FEW)
    # 2. The slots.
    if SPARSITY != "none":
        near, far = slots_seen(first, last, num_slots, source, V)
        state = _attend(
            state, q, row_block, slots, source, draws, scale_log2, near, far, SPARSITY, WINDOWED, V, BLOCK_N
        )
    # 3. The local windows.
    near = tokens_seen(first, last, source, V)
    state = _attend(state, q, row_block, tokens, source, draws, scale_log2, near, none, "token", WINDOWED, V, BLOCK_N)
    return softmax_end(state, scale_log2)


# What follows from the length is not specialised, or other lengths would compile the kernel again.
@triton.jit(
    do_not_specialize=["seed", "threshold", "mask_batch_stride", "num_tokens", "num_slots", "part_size", "num_parts"]
)
def _lsg_fwd_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, index_ptr, sparse_k_ptr, sparse_v_ptr,
    out_ptr, lse_ptr, part_ptr, part_lse_ptr,
    scale_log2, kept_scale, seed, threshold,
    q_strides, k_strides, v_strides, mask_batch_stride, mask_stride, sparse_strides, out_strides, part_strides,
    num_heads, num_tokens, num_slots, part_size, num_parts,
    V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of queries: BLOCK_M tokens over all keys they see, or BLOCK_G globals over one part of the sequence.

    Grid: batch * heads * (cdiv(G, BLOCK_G) * num_parts + cdiv(num_tokens, BLOCK_M)); the globals of a head come first.
    Writes the tokens' rows of ``out`` (batch, heads, G+T, head_dim) and ``lse`` (batch, heads, G+T) float32, and the
    globals' ``part`` (batch * heads, num_parts, G, head_dim) and ``part_lse`` (batch * heads, num_parts, G), float32.
    """
    # 1. Locate the head and the tile.
    GLOBAL_TILES: tl.constexpr = (V.num_globals + BLOCK_G - 1) // BLOCK_G
    length = V.num_globals + num_tokens
    global_programs = GLOBAL_TILES * num_parts
    programs = global_programs + tl.cdiv(num_tokens, BLOCK_M)
    batch_head, program = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    batch, head = batch_head // num_heads, (batch_head % num_heads).to(tl.int32)
    q_ptr = head_ptr(q_ptr, q_strides, batch, head)
    tokens, slots = locate_keys(
        k_ptr, v_ptr, sparse_k_ptr, sparse_v_ptr, k_strides, v_strides, sparse_strides, batch, head, V
    )
    mask_row = mask_of(mask_ptr, mask_batch_stride, mask_stride, batch, V)
    source = (mask_row, index_of(index_ptr, batch_head, num_slots, V), head, num_tokens)
    generator = generator_of(seed, threshold, batch_head, num_tokens, num_slots, V)
    offs_d = tl.arange(0, BLOCK_D)

    if program < global_programs:
        # 2. Globals: a part of the softmax, which the next kernel combines with the others.
        part, row = program // GLOBAL_TILES, program % GLOBAL_TILES * BLOCK_G
        start, stop = part * part_size, tl.minimum((part + 1) * part_size, length)
        part_out, part_lse = _global_tile(
            row, start, stop, q_ptr, q_strides, tokens, source, generator, scale_log2,
            V, BLOCK_G, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        offs_g = row + tl.arange(0, BLOCK_G)
        part_ptr = head_ptr(part_ptr, part_strides, batch_head, part)
        store_rows(part_ptr, part_strides, offs_g, offs_g < V.num_globals, offs_d, part_out, V.head_dim)
        part_lse_ptr += (batch_head * num_parts + part) * V.num_globals
        tl.store(part_lse_ptr + offs_g, part_lse, mask=offs_g < V.num_globals)
    else:
        # 3. Tokens: the whole softmax.
        row = (program - global_programs) * BLOCK_M
        out, lse = _token_tile(
            row, q_ptr, q_strides, tokens, slots, num_slots, source, generator, scale_log2,
            V, BLOCK_M, BLOCK_N, BLOCK_G, BLOCK_D,
        )  # fmt: skip
        offs_m = V.num_globals + row + tl.arange(0, BLOCK_M)
        out_ptr = head_ptr(out_ptr, out_strides, batch, head)
        store_rows(out_ptr, out_strides, offs_m, offs_m < length, offs_d, out * kept_scale, V.head_dim)
        tl.store(lse_ptr + batch_head * length + offs_m, lse, mask=offs_m < length)


@triton.jit(do_not_specialize=["length", "num_parts"])
def _lsg_fwd_combine_kernel(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, kept_scale,
    part_strides, out_strides, num_heads, length, num_parts,
    NUM_GLOBALS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One global query of one head: the mean of its parts, each weighted by its share of the softmax.

    Grid: batch * heads * G. Writes that row of ``out`` and ``lse``.
    """
    batch_head, row = (tl.program_id(0) // NUM_GLOBALS).to(tl.int64), tl.program_id(0) % NUM_GLOBALS
    batch, head = batch_head // num_heads, batch_head % num_heads
    offs_d = tl.arange(0, BLOCK_D)
    by_part = (part_strides[0], part_strides[2], part_strides[1], part_strides[3])  # the parts of a row as its rows
    part_ptr = head_ptr(part_ptr, by_part, batch_head, row)
    part_lse_ptr += batch_head * num_parts * NUM_GLOBALS + row
    row_max, row_sum, acc = tl.full((), LEAST, tl.float32), 0.0, tl.zeros((BLOCK_D,), tl.float32)
    for start in tl.range(0, num_parts, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        inside = offs_n < num_parts
        lse = tl.load(part_lse_ptr + offs_n * NUM_GLOBALS, mask=inside, other=float("inf"))
        lse = tl.where(lse == float("inf"), float("-inf"), lse)  # a part that saw nothing has no weight
        parts = load_rows(part_ptr, by_part, offs_n, inside, offs_d, HEAD_DIM)  # (BLOCK_N, BLOCK_D)
        new_max = tl.maximum(row_max, tl.max(lse, 0))
        weight, rescale = tl.exp(lse - new_max), tl.exp(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weight, 0)
        acc = acc * rescale + tl.sum(weight[:, None] * parts, 0)
        row_max = new_max
    empty = row_sum == 0.0
    lse = tl.where(empty, float("inf"), row_max + tl.log(row_sum))
    out = acc / tl.where(empty, 1.0, row_sum) * kept_scale
    out_ptr = head_ptr(out_ptr, out_strides, batch, head) + row.to(tl.int64) * out_strides[2]
    tl.store(out_ptr + offs_d * out_strides[3], out.to(out_ptr.dtype.element_ty), mask=offs_d < HEAD_DIM)
    tl.store(lse_ptr + batch_head * length + row, lse)
