"""The backward kernels: gradients of slots, then in one launch those of queries, keys and values."""

import triton
import triton.language as tl

from .primitives import (
    LN2,
    draws_of,
    dropout_keeps,
    generator_of,
    head_ptr,
    is_kept,
    load_rows,
    mask_of,
    score_gradients,
    store_rows,
)
from .slots import add_slots
from .windows import (
    are_visible,
    find_keys,
    global_keys,
    in_windows,
    index_of,
    key_columns,
    load_keys,
    locate_keys,
    num_tiles,
    slots_seen,
    tile_of,
    tokens_seen,
    tokens_that_see_slots,
    tokens_that_see_tokens,
    trim,
)


@triton.jit
def _locate_queries(
    q_ptr, dout_ptr, lse_ptr, delta_ptr, q_strides, dout_strides, batch_head, num_heads, num_tokens, V: tl.constexpr
):  # fmt: skip
    """One head's queries: their rows, those of dout, log-sum-exps and deltas."""
    batch, head = batch_head // num_heads, batch_head % num_heads
    first = batch_head * (V.num_globals + num_tokens)
    q_ptr, dout_ptr = head_ptr(q_ptr, q_strides, batch, head), head_ptr(dout_ptr, dout_strides, batch, head)
    return q_ptr, dout_ptr, lse_ptr + first, delta_ptr + first, q_strides, dout_strides


@triton.jit
def _load_queries(rows, inside, queries, offs_d, V: tl.constexpr):
    """q and dout (rows, BLOCK_D), the log-sum-exp in base 2 and delta (rows,); a row outside has probabilities 0."""
    q_ptr, dout_ptr, lse_ptr, delta_ptr, q_strides, dout_strides = queries
    q = load_rows(q_ptr, q_strides, rows, inside, offs_d, V.head_dim)
    dout = load_rows(dout_ptr, dout_strides, rows, inside, offs_d, V.head_dim)
    lse = tl.load(lse_ptr + rows, mask=inside, other=float("inf"))
    return q, dout, lse / LN2, tl.load(delta_ptr + rows, mask=inside, other=0.0)


@triton.jit
def _add_dq(
    dq, tile_of_queries, row_block, keys, source, draws, scale_log2, kept_scale, near, far,
    KIND: tl.constexpr, WINDOWED: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add to the gradient dq (BLOCK_M, BLOCK_D) of a tile of queries, but for the scale, what two ranges of keys give.

    WINDOWED: the tile's rows lie in several blocks, each of which has windows of its own within the ranges.
    """
    q, dout, lse_log2, delta = tile_of_queries
    offs_d = tl.arange(0, q.shape[1])
    near_tiles, tiles = num_tiles(near, far, BLOCK_N)
    for tile in tl.range(0, tiles):
        offs_n, k, v, visible = load_keys(
            tile, near_tiles, near, far, row_block, keys, source, offs_d, KIND, WINDOWED, V, BLOCK_N
        )
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        scores = tl.where(visible, scores, float("-inf"))
        dprobs = tl.dot(dout, tl.trans(v), input_precision="ieee")
        keeps = None
        if V.has_dropout:
            keeps = dropout_keeps(draws, key_columns(offs_n, source, KIND, V), q.shape[0], False)
        _, dscores = score_gradients(
            scores, dprobs, lse_log2[:, None], delta[:, None], keeps, scale_log2, kept_scale
        )  # fmt: skip
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def _add_dkv(
    dk, dv, k, v, offs_n, kept, queries, source, generator, scale_log2, kept_scale, near, far,
    QUERIES: tl.constexpr, KIND: tl.constexpr, WINDOWED: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of a tile of keys, but for scales, what two ranges of queries give; (BLOCK_M, BLOCK_D) each.

    QUERIES: the ranges are of "global" queries or of "token"s. WINDOWED: the keys ``offs_n`` are not all seen by the
    same queries. Keys that are not ``kept`` get nothing.
    """
    IS_TOKEN: tl.constexpr = QUERIES == "token"
    FIRST: tl.constexpr = V.num_globals if IS_TOKEN else 0
    FIRST_GROUP: tl.constexpr = (V.num_globals + 3) // 4 if IS_TOKEN else 0
    offs_d = tl.arange(0, k.shape[1])
    near_tiles, tiles = num_tiles(near, far, BLOCK_N)
    for tile in tl.range(0, tiles):
        start, stop, _ = tile_of(tile, near_tiles, near, far, BLOCK_N)
        offs_m = start + tl.arange(0, BLOCK_N)
        q, dout, lse_log2, delta = _load_queries(FIRST + offs_m, offs_m < stop, queries, offs_d, V)
        visible = kept[:, None]
        if WINDOWED:
            visible = visible & in_windows((offs_m // V.block)[None, :], offs_n[:, None], KIND, V)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # (BLOCK_M keys, BLOCK_N queries)
        scores = tl.where(visible, scores, float("-inf"))
        dprobs = tl.dot(v, tl.trans(dout), input_precision="ieee")
        keeps = None
        if V.has_dropout:
            draws = draws_of(generator, FIRST_GROUP + start // 4, BLOCK_N)
            keeps = dropout_keeps(draws, key_columns(offs_n, source, KIND, V), BLOCK_N, True)
        probs, dscores = score_gradients(
            scores, dprobs, lse_log2[None, :], delta[None, :], keeps, scale_log2, kept_scale
        )  # fmt: skip
        dv = tl.dot(probs.to(dout.dtype), dout, dv, input_precision="ieee")
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _dq_of_globals(
    first_row, start, stop, queries, tokens, source, generator, scale_log2, kept_scale,
    V: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What positions [start, stop) give to the gradient of BLOCK_G global queries."""
    offs_m, offs_d = first_row + tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    tile = _load_queries(offs_m, offs_m < V.num_globals, queries, offs_d, V)
    draws = draws_of(generator, first_row // 4, BLOCK_G)
    near, far = trim(start, stop, source, "token", V), (0, 0, False)
    dq = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    dq = _add_dq(dq, tile, None, tokens, source, draws, scale_log2, kept_scale, near, far, "token", False, V, BLOCK_N)
    return dq * (scale_log2 * LN2)


@triton.jit
def _dq_of_tokens(
    first_row, queries, tokens, slots, num_slots, source, generator, scale_log2, kept_scale,
    V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries of BLOCK_M tokens, from the keys that the forward took, in its order."""
    G: tl.constexpr = V.num_globals
    SPARSITY: tl.constexpr = V.sparsity
    WINDOWED: tl.constexpr = V.block % BLOCK_M != 0
    num_tokens = source[3]
    offs_m, offs_d = first_row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    tile = _load_queries(G + offs_m, offs_m < num_tokens, queries, offs_d, V)
    draws = draws_of(generator, (G + 3) // 4 + first_row // 4, BLOCK_M)
    row_block = offs_m // V.block
    first, last = first_row // V.block, (tl.minimum(first_row + BLOCK_M, num_tokens) - 1) // V.block
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    none = (0, 0, False)
    # 1. The globals.
    if G > 0:
        FEW: tl.constexpr = BLOCK_G if BLOCK_G < BLOCK_N else BLOCK_N
        near = global_keys(V)
        dq = _add_dq(dq, tile, None, tokens, source, draws, scale_log2, kept_scale, near, none, "token", False, V, FEW)
    # 2. The slots.
    if SPARSITY != "none":
        near, far = slots_seen(first, last, num_slots, source, V)
        dq = _add_dq(
            dq, tile, row_block, slots, source, draws, scale_log2, kept_scale, near, far, SPARSITY, WINDOWED, V, BLOCK_N
        )  # fmt: skip
    # 3. The local windows.
    near = tokens_seen(first, last, source, V)
    dq = _add_dq(
        dq, tile, row_block, tokens, source, draws, scale_log2, kept_scale, near, none, "token", WINDOWED, V, BLOCK_N
    )  # fmt: skip
    return dq * (scale_log2 * LN2)


@triton.jit
def _load_kv(positions, kept, tokens, offs_d, V: tl.constexpr):
    """Rows of keys and values (rows, BLOCK_D), 0 where they are padding."""
    k_ptr, v_ptr, k_strides, v_strides = tokens
    k = load_rows(k_ptr, k_strides, positions, kept, offs_d, V.head_dim)
    return k, load_rows(v_ptr, v_strides, positions, kept, offs_d, V.head_dim)


@triton.jit
def _dkv_of_globals(
    first_row, start, stop, queries, tokens, source, generator, scale_log2, kept_scale,
    V: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What tokens [start, stop) give to the gradients of BLOCK_G global keys, and what globals do where start is 0."""
    offs_n, offs_d = first_row + tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    kept = is_kept(source[0], offs_n, offs_n < V.num_globals, V)
    k, v = _load_kv(offs_n, kept, tokens, offs_d, V)
    dk, dv, none = tl.zeros((BLOCK_G, BLOCK_D), tl.float32), tl.zeros((BLOCK_G, BLOCK_D), tl.float32), (0, 0)
    FEW: tl.constexpr = BLOCK_G if BLOCK_G < BLOCK_N else BLOCK_N
    near = (0, tl.where(start == 0, V.num_globals, 0))
    dk, dv = _add_dkv(
        dk, dv, k, v, offs_n, kept, queries, source, generator, scale_log2, kept_scale, near, none,
        "global", "token", False, V, FEW,
    )  # fmt: skip
    near = (start, stop)
    dk, dv = _add_dkv(
        dk, dv, k, v, offs_n, kept, queries, source, generator, scale_log2, kept_scale, near, none,
        "token", "token", False, V, BLOCK_N,
    )  # fmt: skip
    return dk * (scale_log2 * LN2), dv * kept_scale


@triton.jit
def _dkv_of_tokens(
    first_row, queries, tokens, source, generator, scale_log2, kept_scale,
    V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of the keys and values of BLOCK_M tokens from queries that see them as they are."""
    G: tl.constexpr = V.num_globals
    WINDOWED: tl.constexpr = V.block % BLOCK_M != 0
    num_tokens = source[3]
    offs_n, offs_d = G + first_row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    kept = is_kept(source[0], offs_n, offs_n < G + num_tokens, V)
    k, v = _load_kv(offs_n, kept, tokens, offs_d, V)
    dk, dv, none = tl.zeros((BLOCK_M, BLOCK_D), tl.float32), tl.zeros((BLOCK_M, BLOCK_D), tl.float32), (0, 0)
    # 1. The global queries.
    if G > 0:
        FEW: tl.constexpr = BLOCK_G if BLOCK_G < BLOCK_N else BLOCK_N
        dk, dv = _add_dkv(
            dk, dv, k, v, offs_n, kept, queries, source, generator, scale_log2, kept_scale, (0, G), none,
            "global", "token", False, V, FEW,
        )  # fmt: skip
    # 2. The tokens, unless all these keys are padding.
    start, stop = tokens_that_see_tokens(first_row, tl.minimum(first_row + BLOCK_M, num_tokens) - 1, num_tokens, V)
    near = (start, tl.where(tl.max(kept.to(tl.int32), 0) > 0, stop, start))
    dk, dv = _add_dkv(
        dk, dv, k, v, offs_n, kept, queries, source, generator, scale_log2, kept_scale, near, none,
        "token", "token", WINDOWED, V, BLOCK_N,
    )  # fmt: skip
    return dk * (scale_log2 * LN2), dv * kept_scale


# What follows from the length is not specialised, or other lengths would compile the kernel again.
@triton.jit(do_not_specialize=["seed", "threshold", "mask_batch_stride", "num_tokens", "num_slots"])
def _lsg_bwd_slots_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, index_ptr, sparse_k_ptr, sparse_v_ptr, dout_ptr, lse_ptr, delta_ptr,
    dslot_k_ptr, dslot_v_ptr,
    scale_log2, kept_scale, seed, threshold,
    q_strides, k_strides, v_strides, mask_batch_stride, mask_stride, sparse_strides, dout_strides, slot_strides,
    num_heads, num_tokens, num_slots,
    V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK_M slots from the queries that see them.

    Grid: batch * heads * cdiv(num_slots, BLOCK_M). Writes ``dslot_k`` and ``dslot_v`` (batch, heads, slots, head_dim)
    float32.
    """
    # 1. Locate the head and the slots.
    tiles = tl.cdiv(num_slots, BLOCK_M)
    batch_head, first_slot = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * BLOCK_M
    batch, head = batch_head // num_heads, (batch_head % num_heads).to(tl.int32)
    queries = _locate_queries(
        q_ptr, dout_ptr, lse_ptr, delta_ptr, q_strides, dout_strides, batch_head, num_heads, num_tokens, V
    )
    _, slots = locate_keys(
        k_ptr, v_ptr, sparse_k_ptr, sparse_v_ptr, k_strides, v_strides, sparse_strides, batch, head, V
    )
    mask_row = mask_of(mask_ptr, mask_batch_stride, mask_stride, batch, V)
    source = (mask_row, index_of(index_ptr, batch_head, num_slots, V), head, num_tokens)
    generator = generator_of(seed, threshold, batch_head, num_tokens, num_slots, V)
    # 2. Their rows.
    SPARSITY: tl.constexpr = V.sparsity
    WINDOWED: tl.constexpr = V.step % BLOCK_M != 0 or V.reach % V.step != 0
    offs_n, offs_d = first_slot + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    rows, readable = find_keys(offs_n, num_slots, source, SPARSITY, V)
    visible = are_visible(offs_n, rows, readable, source, SPARSITY, V)
    k, v = _load_kv(rows, visible, slots, offs_d, V)
    # 3. The queries to their right and left, unless none of these slots is visible.
    num_seen = tl.where(tl.max(visible.to(tl.int32), 0) > 0, num_tokens, 0)
    last_slot = tl.minimum(first_slot + BLOCK_M, num_slots) - 1
    near, far = tokens_that_see_slots(first_slot, last_slot, num_seen, V)
    dk, dv = tl.zeros((BLOCK_M, BLOCK_D), tl.float32), tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dk, dv = _add_dkv(
        dk, dv, k, v, offs_n, visible, queries, source, generator, scale_log2, kept_scale, near, far,
        "token", SPARSITY, WINDOWED, V, BLOCK_N,
    )  # fmt: skip
    # 4. Store.
    dk, dv = dk * (scale_log2 * LN2), dv * kept_scale
    dslot_k_ptr = head_ptr(dslot_k_ptr, slot_strides, batch, head)
    dslot_v_ptr = head_ptr(dslot_v_ptr, slot_strides, batch, head)
    inside = offs_n < num_slots
    store_rows(dslot_k_ptr, slot_strides, offs_n, inside, offs_d, dk, V.head_dim)
    store_rows(dslot_v_ptr, slot_strides, offs_n, inside, offs_d, dv, V.head_dim)


@triton.jit(
    do_not_specialize=["seed", "threshold", "mask_batch_stride", "num_tokens", "num_slots", "part_size", "num_parts"]
)
def _lsg_bwd_dq_dkv_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, index_ptr, sparse_k_ptr, sparse_v_ptr, weight_ptr, slot_ptr,
    dout_ptr, lse_ptr, delta_ptr, dslot_k_ptr, dslot_v_ptr, dscore_ptr,
    dq_ptr, dk_ptr, dv_ptr, dq_part_ptr, dk_part_ptr, dv_part_ptr,
    scale_log2, kept_scale, seed, threshold,
    q_strides, k_strides, v_strides, mask_batch_stride, mask_stride, sparse_strides, dout_strides, slot_strides,
    dq_strides, dk_strides, dv_strides, part_strides,
    num_heads, num_tokens, num_slots, part_size, num_parts,
    V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK_M rows of tokens or BLOCK_G of globals: of queries, or of keys and values.

    BLOCK_N rows of the other side are taken at a time. Grid: batch * heads * (2 cdiv(G, BLOCK_G) * num_parts +
    2 cdiv(num_tokens, BLOCK_M)); of a head come first the globals' queries, then their keys, the tokens' queries, and
    their keys. Writes the tokens' rows of ``dq``, ``dk`` and ``dv`` (batch, heads, G+T, head_dim); of the globals'
    gradients the parts that come from ``part_size`` positions or tokens, ``dq_part``, ``dk_part`` and ``dv_part``
    (batch * heads, num_parts, G, head_dim) float32.
    """
    # 1. Locate the head and the tile.
    G: tl.constexpr = V.num_globals
    GLOBAL_TILES: tl.constexpr = (V.num_globals + BLOCK_G - 1) // BLOCK_G
    global_programs = GLOBAL_TILES * num_parts
    token_programs = tl.cdiv(num_tokens, BLOCK_M)
    programs = 2 * (global_programs + token_programs)
    batch_head, program = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    batch, head = batch_head // num_heads, (batch_head % num_heads).to(tl.int32)
    queries = _locate_queries(
        q_ptr, dout_ptr, lse_ptr, delta_ptr, q_strides, dout_strides, batch_head, num_heads, num_tokens, V
    )
    tokens, slots = locate_keys(
        k_ptr, v_ptr, sparse_k_ptr, sparse_v_ptr, k_strides, v_strides, sparse_strides, batch, head, V
    )
    mask_row = mask_of(mask_ptr, mask_batch_stride, mask_stride, batch, V)
    source = (mask_row, index_of(index_ptr, batch_head, num_slots, V), head, num_tokens)
    generator = generator_of(seed, threshold, batch_head, num_tokens, num_slots, V)
    offs_d = tl.arange(0, BLOCK_D)

    if program < 2 * global_programs:
        # 2. Globals: a part of the sum, which the next kernel adds to the others.
        number = program % global_programs
        part, row = number // GLOBAL_TILES, number % GLOBAL_TILES * BLOCK_G
        offs_g, start = row + tl.arange(0, BLOCK_G), part * part_size
        is_global = offs_g < G
        if program < global_programs:
            dq_part = _dq_of_globals(
                row, start, tl.minimum(start + part_size, G + num_tokens), queries, tokens, source, generator,
                scale_log2, kept_scale, V, BLOCK_G, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            dq_part_ptr = head_ptr(dq_part_ptr, part_strides, batch_head, part)
            store_rows(dq_part_ptr, part_strides, offs_g, is_global, offs_d, dq_part, V.head_dim)
        else:
            dk_part, dv_part = _dkv_of_globals(
                row, start, tl.minimum(start + part_size, num_tokens), queries, tokens, source, generator,
                scale_log2, kept_scale, V, BLOCK_G, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            dk_part_ptr = head_ptr(dk_part_ptr, part_strides, batch_head, part)
            dv_part_ptr = head_ptr(dv_part_ptr, part_strides, batch_head, part)
            store_rows(dk_part_ptr, part_strides, offs_g, is_global, offs_d, dk_part, V.head_dim)
            store_rows(dv_part_ptr, part_strides, offs_g, is_global, offs_d, dv_part, V.head_dim)
    else:
        number = program - 2 * global_programs
        row = number % token_programs * BLOCK_M
        offs_m = row + tl.arange(0, BLOCK_M)
        inside = offs_m < num_tokens
        if number < token_programs:
            # 3. Queries of tokens.
            dq = _dq_of_tokens(
                row, queries, tokens, slots, num_slots, source, generator, scale_log2, kept_scale,
                V, BLOCK_M, BLOCK_N, BLOCK_G, BLOCK_D,
            )  # fmt: skip
            store_rows(
                head_ptr(dq_ptr, dq_strides, batch, head), dq_strides, G + offs_m, inside, offs_d, dq, V.head_dim
            )
        else:
            # 4. Keys and values of tokens: as they are, and as part of slots.
            dk, dv = _dkv_of_tokens(
                row, queries, tokens, source, generator, scale_log2, kept_scale, V, BLOCK_M, BLOCK_N, BLOCK_G, BLOCK_D
            )
            if V.sparsity != "none":
                dslot_k_ptr = head_ptr(dslot_k_ptr, slot_strides, batch, head)
                dslot_v_ptr = head_ptr(dslot_v_ptr, slot_strides, batch, head)
                if V.sparsity == "compressed":
                    weight_ptr += batch_head * num_tokens
                if slot_ptr is not None:
                    slot_ptr += batch_head * num_tokens
                dslots = (dslot_k_ptr, dslot_v_ptr, slot_strides)
                dk, dv = add_slots(
                    dk, dv, row, source, dslots, weight_ptr, slot_ptr, num_slots, V, BLOCK_M, BLOCK_D
                )  # fmt: skip
            if dscore_ptr is not None:
                dscore = tl.load(dscore_ptr + batch_head * num_tokens + offs_m, mask=inside, other=0.0)
                first = tl.full((1,), G, tl.int32)
                query = load_rows(queries[0], q_strides, first, first >= 0, offs_d, V.head_dim)
                dk += dscore[:, None] * query.to(tl.float32)
            store_rows(
                head_ptr(dk_ptr, dk_strides, batch, head), dk_strides, G + offs_m, inside, offs_d, dk, V.head_dim
            )
            store_rows(
                head_ptr(dv_ptr, dv_strides, batch, head), dv_strides, G + offs_m, inside, offs_d, dv, V.head_dim
            )
