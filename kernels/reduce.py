"""The small kernels of the backward: the sums over rows before it, of weights in it, and over parts after it."""

import triton
import triton.language as tl

from .heads import (
    SIZES,
    Batch,
    first_of_tokens,
    head_rows,
    key_head_of,
    keys_read_by,
    lies_past,
    locate_head,
    parts_of,
    row_of,
    slot_keys,
    sums_of,
    sums_rows,
    token_of,
)
from .primitives import LN2, Rows, is_kept, load_rows, mask_of, one_row, rows_at


@triton.jit(do_not_specialize=SIZES)
def _lsg_bwd_sums_kernel(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, cu_ptr, sums_ptr,
    out_strides, dout_strides, sums_stride, num_heads, num_tokens, length, first_query, stop_query,
    NUM_GLOBALS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sums of BLOCK_M queries of one head: the log-sum-exp in base 2; and delta, the sum of out * dout less dlse.

    Grid: batch * heads * (sums_rows / BLOCK_M). Writes ``sums`` (batch, heads, sums_rows, 2) float32.
    Of a section, queries are the tokens from ``first_query`` on and before ``stop_query``; else these are None.
    """
    FIRST: tl.constexpr = first_of_tokens(NUM_GLOBALS)
    tiles = sums_rows(num_tokens, NUM_GLOBALS) // BLOCK_M
    head, tile = locate_head(tiles, Batch(cu_ptr, num_heads, num_tokens, length), NUM_GLOBALS)
    first_row, offs_m, offs_d = tile * BLOCK_M, tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    if cu_ptr is not None:
        if (head.num_tokens < 0) | (first_row >= sums_rows(head.num_tokens, NUM_GLOBALS)):
            return
    is_token = first_row >= FIRST
    first = tl.where(is_token, first_row - FIRST + NUM_GLOBALS, first_row)
    inside = offs_m < NUM_GLOBALS + tl.where(is_token, head.num_tokens, 0) - first
    if first_query is not None:
        tokens = first - NUM_GLOBALS + offs_m
        inside = inside & ((tokens < 0) | (tokens >= first_query) & (tokens < stop_query))
    out = load_rows(head_rows(out_ptr, out_strides, head, True), first, offs_m, inside, offs_d, HEAD_DIM)
    dout = load_rows(head_rows(dout_ptr, dout_strides, head, True), first, offs_m, inside, offs_d, HEAD_DIM)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    lse = tl.load(row_of(lse_ptr, head, first) + offs_m, mask=inside, other=float("inf"))
    if dlse_ptr is not None:
        delta -= tl.load(row_of(dlse_ptr, head, first) + offs_m, mask=inside, other=0.0)
    sums_ptr = sums_of(sums_ptr, sums_stride, head, NUM_GLOBALS, cu_ptr is not None) + 2 * first_row
    tl.store(sums_ptr + 2 * offs_m, lse / LN2)
    tl.store(sums_ptr + 2 * offs_m + 1, delta)


@triton.jit(do_not_specialize=SIZES)
def _lsg_bwd_weights_kernel(
    k_ptr, v_ptr, mask_ptr, cu_ptr, sparse_k_ptr, sparse_v_ptr, weight_ptr, dslot_k_ptr, dslot_v_ptr, dscore_ptr,
    bos_part_ptr,
    scale_log2,
    k_strides, v_strides, mask_batch_stride, mask_stride, sparse_strides, slot_strides,
    num_heads, num_tokens, num_slots, length,
    V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of the scores of BLOCK_M tokens with the first token's query; their softmax in a slot is w.

    They are w (dw - the slot's sum of w dw), dw = dslot_k k + dslot_v v. As the slot's rows are the sums of w k and
    w v, that is w (dslot_k (k - its key) + dslot_v (v - its value)).

    Grid: batch * heads * cdiv(num_tokens, BLOCK_M). Writes ``dscore`` (batch, heads, T) float32, without the scores'
    scale, and what these tokens give to the query, ``bos_part`` (batch * heads, cdiv(num_tokens, BLOCK_M), head_dim).
    """
    tiles = tl.cdiv(num_tokens, BLOCK_M)
    head, tile = locate_head(tiles, Batch(cu_ptr, num_heads, num_tokens, length), V.num_globals)
    if V.packed:
        if tile * BLOCK_M >= head.num_tokens:
            return
    mask = mask_of(mask_ptr, mask_batch_stride, mask_stride, head.batch, V)
    offs_n, offs_d = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    slots, inside = offs_n // V.factor, offs_n < head.num_tokens
    kept = is_kept(mask, V.num_globals, offs_n, inside, V)
    # 1. What each weight's gradient is above the mean of its slot's.
    keys = keys_read_by(k_ptr, k_strides, v_ptr, v_strides, head, V)
    k = load_rows(keys.k, V.num_globals, offs_n, kept, offs_d, V.head_dim).to(tl.float32)
    v = load_rows(keys.v, V.num_globals, offs_n, kept, offs_d, V.head_dim).to(tl.float32)
    sparse = slot_keys(sparse_k_ptr, sparse_strides, sparse_v_ptr, sparse_strides, head, V)
    sparse_k = load_rows(sparse.k, 0, slots, kept, offs_d, V.head_dim).to(tl.float32)
    sparse_v = load_rows(sparse.v, 0, slots, kept, offs_d, V.head_dim).to(tl.float32)
    dslots = slot_keys(dslot_k_ptr, slot_strides, dslot_v_ptr, slot_strides, head, V)
    dslot_k = load_rows(dslots.k, 0, slots, kept, offs_d, V.head_dim)
    dslot_v = load_rows(dslots.v, 0, slots, kept, offs_d, V.head_dim)
    excess = tl.sum(dslot_k * (k - sparse_k), 1)
    excess += tl.sum(dslot_v * (v - sparse_v), 1)
    # 2. The scores' gradients, and the query's.
    weight = tl.load(weight_ptr + token_of(head, 0, V.num_globals) + offs_n, mask=kept, other=0.0)
    dscore = excess * weight
    tl.store(dscore_ptr + token_of(head, 0, V.num_globals) + offs_n, dscore, mask=inside)
    bos_part_ptr += (head.number * tiles + tile) * V.head_dim
    bos_part = tl.sum(dscore[:, None] * k, 0) * (scale_log2 * LN2)
    tl.store(bos_part_ptr + offs_d, bos_part, mask=offs_d < V.head_dim)


@triton.jit
def _sum_parts(parts, num_parts, offs_d, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sum (BLOCK_D,) of Rows (num_parts, head_dim), in an order that only their number decides."""
    acc = tl.zeros(offs_d.shape, tl.float32)
    for start in tl.range(0, num_parts, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        acc += tl.sum(load_rows(parts, 0, offs_n, offs_n < num_parts, offs_d, HEAD_DIM), 0)
    return acc


@triton.jit
def _combine_row(
    part_ptr, part_strides, grad_ptr, grad_strides, first, head, row, num_parts, offs_d,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the sum of one row's parts in a head's gradient, those of GROUP heads from number ``first`` on."""
    by_part = (part_strides[0], part_strides[2], part_strides[1], part_strides[3])  # the parts of a row as its rows
    acc = tl.zeros(offs_d.shape, tl.float32)
    for member in tl.range(0, GROUP):
        acc += _sum_parts(rows_at(part_ptr, by_part, first + member, row, True), num_parts, offs_d, HEAD_DIM, BLOCK_N)
    ptrs = one_row(head_rows(grad_ptr, grad_strides, head, True), row, offs_d)
    tl.store(ptrs, acc.to(grad_ptr.dtype.element_ty), mask=offs_d < HEAD_DIM)


@triton.jit(do_not_specialize=SIZES)
def _lsg_bwd_combine_kernel(
    dq_part_ptr, dk_part_ptr, dv_part_ptr, bos_part_ptr, cu_ptr, dq_ptr, dk_ptr, dv_ptr,
    part_strides, dq_strides, dk_strides, dv_strides,
    num_heads, num_tokens, length, part_size, num_parts, num_tiles,
    NUM_GLOBALS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One global of one head: the sums of its parts; or of the first token, what slots' weights give to its query.

    The GROUP heads that read a head of keys each have parts of its gradients: the first of these heads sums them all.

    Grid: batch * heads * G, or with ``bos_part`` (batch * heads, num_tiles, head_dim) batch * heads * (G + 1). Writes
    that row of ``dq``, ``dk`` and ``dv``; or adds to the first token's row of ``dq``.
    """
    HAS_BOS: tl.constexpr = bos_part_ptr is not None
    ROWS: tl.constexpr = NUM_GLOBALS + HAS_BOS
    head, row = locate_head(ROWS, Batch(cu_ptr, num_heads, num_tokens, length), NUM_GLOBALS)
    own_parts, own_tiles = num_parts, num_tiles
    if cu_ptr is not None:
        if lies_past(head, row, NUM_GLOBALS):
            return
        own_parts = parts_of(head, part_size, num_parts, NUM_GLOBALS)
        own_tiles = tl.cdiv(head.num_tokens, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    if row < NUM_GLOBALS:
        first = head.number
        _combine_row(
            dq_part_ptr, part_strides, dq_ptr, dq_strides, first, head, row, own_parts, offs_d, 1, HEAD_DIM, BLOCK_N
        )  # fmt: skip
        if head.index % GROUP == 0:
            keys = key_head_of(head, GROUP)
            _combine_row(
                dk_part_ptr, part_strides, dk_ptr, dk_strides, first, keys, row, own_parts, offs_d,
                GROUP, HEAD_DIM, BLOCK_N,
            )  # fmt: skip
            _combine_row(
                dv_part_ptr, part_strides, dv_ptr, dv_strides, first, keys, row, own_parts, offs_d,
                GROUP, HEAD_DIM, BLOCK_N,
            )  # fmt: skip
    elif HAS_BOS:
        parts = Rows(bos_part_ptr + head.number * num_tiles * HEAD_DIM, HEAD_DIM, 1)
        acc = _sum_parts(parts, own_tiles, offs_d, HEAD_DIM, BLOCK_N)
        ptrs, inside = one_row(head_rows(dq_ptr, dq_strides, head, True), row, offs_d), offs_d < HEAD_DIM
        acc += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
        tl.store(ptrs, acc.to(dq_ptr.dtype.element_ty), mask=inside)
