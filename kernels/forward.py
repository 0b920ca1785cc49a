"""The forward kernels: local, sparse and global attention in one pass, then the combine of the global queries."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .heads import (
    SIZES,
    Batch,
    KeyTensors,
    Section,
    head_rows,
    lies_past,
    locate_head,
    locate_source,
    locate_tile,
    parts_of,
    row_of,
)
from .primitives import (
    MIN_SCORE,
    draws_of,
    dropout_keeps,
    load_rows,
    one_row,
    rows_at,
    softmax_end,
    softmax_start,
    softmax_step,
    store_rows,
)
from .walk import walk_keys, walk_part
from .windows import are_queries, group_of_token, has_no_query, key_columns, positions_of_globals


class _Queries(NamedTuple):
    """A tile of queries (BLOCK_M, BLOCK_D) and their Draws."""

    q: Any
    draws: Any


@triton.jit
def _attend(state, tile, keys, scores, start, offs_n, source, KIND: tl.constexpr, V: tl.constexpr):
    """The STEP of a walk whose state is a Softmax."""
    keeps = None
    if V.has_dropout:
        keeps = dropout_keeps(tile.draws, key_columns(start, offs_n, source, KIND, V), tile.q.shape[0], False)
    return softmax_step(state, scores, keys.v, keeps, source.scale_log2)


@triton.jit
def _global_tile(
    first_row, start, stop, q, source,
    V: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    """BLOCK_G global queries over positions [start, stop): their output and log-sum-exp."""
    offs_g, offs_d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    q = load_rows(q, first_row, offs_g, offs_g < V.num_globals - first_row, offs_d, V.head_dim)  # (BLOCK_G, BLOCK_D)
    tile = _Queries(q, draws_of(source.generator, first_row // 4, BLOCK_G))
    state = walk_part(softmax_start(BLOCK_G, BLOCK_D), tile, start, stop, source, V, BLOCK_N, BRANCH, _attend)
    return softmax_end(state, source.scale_log2, 1.0)


@triton.jit
def _token_tile(
    first_row, q, source,
    V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BRANCH: tl.constexpr,
):  # fmt: skip
    """BLOCK_M tokens from ``first_row`` on over all that they see: their output and log-sum-exp."""
    G: tl.constexpr = V.num_globals
    offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = are_queries(first_row, offs_m, source, V)
    q = load_rows(q, G + first_row, offs_m, inside, offs_d, V.head_dim)  # (BLOCK_M, BLOCK_D)
    tile = _Queries(q, draws_of(source.generator, group_of_token(first_row, source, V), BLOCK_M))
    state = softmax_start(BLOCK_M, BLOCK_D)
    state = walk_keys(state, tile, first_row, source, V, BLOCK_M, BLOCK_N, BLOCK_G, BRANCH, _attend)
    return softmax_end(state, source.scale_log2, source.kept_scale)


@triton.jit(do_not_specialize=SIZES)
def _lsg_fwd_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, cu_ptr, index_ptr, sparse_k_ptr, sparse_v_ptr,
    out_ptr, lse_ptr, part_ptr, part_lse_ptr,
    scale_log2, kept_scale, seed, threshold,
    q_strides, k_strides, v_strides, mask_batch_stride, mask_stride, index_stride, sparse_strides, out_strides,
    part_strides,
    batch, num_heads, num_tokens, num_slots, length, part_size, num_parts,
    first_query, stop_query, first_seen, first_token, whole_tokens, whole_slots,
    V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BRANCH: tl.constexpr,
):  # fmt: skip
    """One tile of queries: BLOCK_M tokens over all keys they see, or BLOCK_G globals over one part of the sequence.

    Grid: batch * heads * (cdiv(num_tokens, BLOCK_M) + cdiv(G, BLOCK_G) * num_parts), as locate_tile orders them.
    Writes the tokens' rows of ``out`` (batch, heads, G+T, head_dim) and ``lse`` (batch, heads, G+T) float32, and the
    globals' ``part`` (batch * heads, num_parts, G, head_dim) and ``part_lse`` (batch * heads, num_parts, G), float32.
    Packed sequences: ``batch`` is how many there are, each has programs as the longest one, and those past it return.
    So do those of a section's tokens that are no queries, whose rows are not written.
    """
    # 1. Locate the head and the tile.
    GLOBAL_TILES: tl.constexpr = (V.num_globals + BLOCK_G - 1) // BLOCK_G
    sequences = Batch(cu_ptr, num_heads, num_tokens, length)
    head, program, is_token = locate_tile(
        tl.cdiv(num_tokens, BLOCK_M), GLOBAL_TILES * num_parts, batch, sequences, V.num_globals
    )  # fmt: skip
    if V.packed:
        position = V.num_globals + program * BLOCK_M
        if V.num_globals > 0:
            position = tl.where(is_token, position, program // GLOBAL_TILES * part_size)
        if lies_past(head, position, V.num_globals):
            return
    section = Section(first_query, stop_query, first_seen, first_token, whole_tokens, whole_slots)
    if V.sectioned:
        if is_token & has_no_query(program * BLOCK_M, section, BLOCK_M):
            return
    q = head_rows(q_ptr, q_strides, head, V.is_wide)
    tensors = KeyTensors(
        k_ptr, v_ptr, mask_ptr, index_ptr, sparse_k_ptr, sparse_v_ptr, scale_log2, kept_scale, seed, threshold,
        k_strides, v_strides, mask_batch_stride, mask_stride, index_stride, sparse_strides, num_tokens, num_slots,
        section,
    )  # fmt: skip
    source = locate_source(head, tensors, V)
    offs_d = tl.arange(0, BLOCK_D)

    if is_token:
        # 2. Tokens: the whole softmax.
        row = program * BLOCK_M
        out, lse = _token_tile(row, q, source, V, BLOCK_M, BLOCK_N, BLOCK_G, BLOCK_D, BRANCH)
        offs_m, first = tl.arange(0, BLOCK_M), V.num_globals + row
        inside = are_queries(row, offs_m, source, V)
        rows = head_rows(out_ptr, out_strides, head, V.is_wide)
        store_rows(rows, first, offs_m, inside, offs_d, out, V.head_dim)
        tl.store(row_of(lse_ptr, head, first) + offs_m, lse, mask=inside)
    elif V.num_globals > 0:
        # 3. Globals: a part of the softmax, which the next kernel combines with the others.
        part, row = program // GLOBAL_TILES, program % GLOBAL_TILES * BLOCK_G
        start, stop = part * part_size, tl.minimum((part + 1) * part_size, positions_of_globals(head.num_tokens, V))
        if V.sectioned:
            start = tl.maximum(start, section.first_seen)
        part_out, part_lse = _global_tile(row, start, stop, q, source, V, BLOCK_G, BLOCK_N, BLOCK_D, BRANCH)
        offs_g = tl.arange(0, BLOCK_G)
        is_global = offs_g < V.num_globals - row
        parts = rows_at(part_ptr, part_strides, head.number, part, V.is_wide)
        store_rows(parts, row, offs_g, is_global, offs_d, part_out, V.head_dim)
        part_lse_ptr += (head.number * num_parts + part) * V.num_globals + row
        tl.store(part_lse_ptr + offs_g, part_lse, mask=is_global)


@triton.jit(do_not_specialize=SIZES)
def _lsg_fwd_combine_kernel(
    part_ptr, part_lse_ptr, cu_ptr, out_ptr, lse_ptr, kept_scale,
    part_strides, out_strides, num_heads, num_tokens, length, part_size, num_parts,
    NUM_GLOBALS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One global query of one head: the mean of its parts, each weighted by its share of the softmax.

    Grid: batch * heads * G. Writes that row of ``out`` and ``lse``.
    """
    head, row = locate_head(NUM_GLOBALS, Batch(cu_ptr, num_heads, num_tokens, length), NUM_GLOBALS)
    own_parts = num_parts
    if cu_ptr is not None:
        if lies_past(head, row, NUM_GLOBALS):
            return
        own_parts = parts_of(head, part_size, num_parts, NUM_GLOBALS)
    offs_d = tl.arange(0, BLOCK_D)
    by_part = (part_strides[0], part_strides[2], part_strides[1], part_strides[3])  # the parts of a row as its rows
    rows = rows_at(part_ptr, by_part, head.number, row, True)
    part_lse_ptr += head.number * num_parts * NUM_GLOBALS + row
    row_max, row_sum, acc = tl.full((), MIN_SCORE, tl.float32), 0.0, tl.zeros((BLOCK_D,), tl.float32)
    for start in tl.range(0, own_parts, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        inside = offs_n < own_parts
        lse = tl.load(part_lse_ptr + offs_n * NUM_GLOBALS, mask=inside, other=float("inf"))
        lse = tl.where(lse == float("inf"), float("-inf"), lse)  # a part that saw nothing has no weight
        parts = load_rows(rows, start, tl.arange(0, BLOCK_N), inside, offs_d, HEAD_DIM)  # (BLOCK_N, BLOCK_D)
        new_max = tl.maximum(row_max, tl.max(lse, 0))
        weight, rescale = tl.exp(lse - new_max), tl.exp(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weight, 0)
        acc = acc * rescale + tl.sum(weight[:, None] * parts, 0)
        row_max = new_max
    empty = row_sum == 0.0
    lse = tl.where(empty, float("inf"), row_max + tl.log(row_sum))
    out = acc / tl.where(empty, 1.0, row_sum) * kept_scale
    rows = head_rows(out_ptr, out_strides, head, True)
    tl.store(one_row(rows, row, offs_d), out.to(out_ptr.dtype.element_ty), mask=offs_d < HEAD_DIM)
    tl.store(row_of(lse_ptr, head, row), lse)
