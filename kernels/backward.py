"""The backward kernels: gradients of slots, then in one launch those of queries, keys and values."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .heads import (
    SIZES,
    Batch,
    Keys,
    KeyTensors,
    QueryTensors,
    Section,
    first_of_tokens,
    head_keys,
    head_rows,
    lies_past,
    locate_head,
    locate_queries,
    locate_source,
    locate_tile,
    query_head_of,
    slot_keys,
    slots_of,
    store_keys,
    token_of,
)
from .primitives import (
    LN2,
    draws_of,
    dropout_keeps,
    is_kept,
    load_rows,
    one_row,
    rows_at,
    score_gradients,
    store_rows,
)
from .slots import SlotGradients, add_slots
from .walk import num_tiles, tile_of, walk_keys, walk_part
from .windows import (
    Range,
    any_of,
    are_queries,
    are_visible,
    find_keys,
    group_of_token,
    has_no_query,
    in_windows,
    key_columns,
    positions_of_globals,
    stop_of_queries,
    tokens_that_see_slots,
    tokens_that_see_tokens,
    uniform,
)


class _Queries(NamedTuple):
    """A tile of queries: q and dout (rows, BLOCK_D), the log-sum-exp in base 2 and delta (rows,), and their Draws."""

    q: Any
    dout: Any
    lse_log2: Any
    delta: Any
    draws: Any


class _Keys(NamedTuple):
    """A tile of keys: the number of the first, which are hidden as what is added to scores (rows,), k and v."""

    start: Any
    hidden: Any
    k: Any
    v: Any


@triton.jit
def _load_queries(first, offs_m, inside, queries, first_sum, draws, offs_d, V: tl.constexpr):
    """The queries ``offs_m`` after ``first``, whose sums start at ``first_sum``; rows are 0 where not ``inside``."""
    q = load_rows(queries.q, first, offs_m, inside, offs_d, V.head_dim)
    dout = load_rows(queries.dout, first, offs_m, inside, offs_d, V.head_dim)
    sums = tl.load(queries.sums_ptr + 2 * first_sum + (2 * offs_m[:, None] + tl.arange(0, 2)[None, :]))
    lse_log2, delta = tl.split(sums)
    return _Queries(q, dout, lse_log2, delta, draws)


@triton.jit
def _load_keys(start, first, rows, readable, visible, keys, offs_d, V: tl.constexpr):
    """The keys from ``start`` on, which lie ``rows`` after the row ``first``.

    A key that is not visible is not read as 0: on sm_80 that makes the compiler lay out the products otherwise, in
    twice as many instructions.
    """
    k = load_rows(keys.k, first, rows, readable, offs_d, V.head_dim)
    v = load_rows(keys.v, first, rows, readable, offs_d, V.head_dim)
    return _Keys(start, tl.where(visible, 0.0, float("-inf")), k, v)


@triton.jit
def _add_dq(dq, tile, keys, scores, start, offs_n, source, KIND: tl.constexpr, V: tl.constexpr):
    """The STEP of a walk whose state is the gradient of a tile of queries, without the scale of scores."""
    dprobs = tl.dot(tile.dout, tl.trans(keys.v), input_precision="ieee")
    keeps = None
    if V.has_dropout:
        keeps = dropout_keeps(tile.draws, key_columns(start, offs_n, source, KIND, V), tile.q.shape[0], False)
    _, dscores = score_gradients(
        scores, dprobs, tile.lse_log2[:, None], tile.delta[:, None], keeps, source.scale_log2, source.kept_scale
    )
    return tl.dot(dscores.to(keys.k.dtype), keys.k, dq, input_precision="ieee")


@triton.jit
def _add_dkv(
    dk, dv, keys, near, far, queries, source,
    QUERIES: tl.constexpr, KIND: tl.constexpr, WINDOWED: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr,
    DIAGONAL: tl.constexpr = False,
):  # fmt: skip
    """Add to the gradients of a tile of keys, without scales, what two Ranges of queries give; (BLOCK_M, BLOCK_D) each.

    QUERIES: the ranges are of "global" queries or of "token"s. WINDOWED: the keys are not all seen by the same
    queries, or a tile of queries may go beyond its range. DIAGONAL: the queries see no later key.
    """
    IS_TOKEN: tl.constexpr = QUERIES == "token"
    FIRST: tl.constexpr = V.num_globals if IS_TOKEN else 0
    FIRST_SUM: tl.constexpr = first_of_tokens(V.num_globals) if IS_TOKEN else 0
    offs_n = keys.start + tl.arange(0, keys.k.shape[0])
    offs_m, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, keys.k.shape[1])
    near_tiles, tiles = num_tiles(near, far, BLOCK_N)
    for i in tl.range(0, uniform(tiles)):
        start, stop, _ = tile_of(i, near_tiles, near, far, BLOCK_N)
        group = group_of_token(start, source, V) if IS_TOKEN else start // 4
        draws = draws_of(source.generator, group, BLOCK_N)
        tile = _load_queries(FIRST + start, offs_m, offs_m < stop - start, queries, FIRST_SUM + start, draws, offs_d, V)
        scores = tl.dot(keys.k, tl.trans(tile.q), input_precision="ieee")  # (BLOCK_M keys, BLOCK_N queries)
        scores += keys.hidden[:, None]
        if WINDOWED:
            row_block = (start + offs_m) // V.block
            scores = tl.where(in_windows(row_block[None, :], offs_n[:, None], KIND, V), scores, float("-inf"))
        if DIAGONAL:
            tokens = offs_n - V.num_globals
            scores = tl.where(tokens[:, None] <= (start + offs_m)[None, :], scores, float("-inf"))
        dprobs = tl.dot(keys.v, tl.trans(tile.dout), input_precision="ieee")
        keeps = None
        if V.has_dropout:
            columns = key_columns(keys.start, tl.arange(0, keys.k.shape[0]), source, KIND, V)
            keeps = dropout_keeps(tile.draws, columns, BLOCK_N, True)
        probs, dscores = score_gradients(
            scores, dprobs, tile.lse_log2[None, :], tile.delta[None, :], keeps, source.scale_log2, source.kept_scale
        )
        dv = tl.dot(probs.to(tile.dout.dtype), tile.dout, dv, input_precision="ieee")
        dk = tl.dot(dscores.to(tile.q.dtype), tile.q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _with_scales(dk, dv, source):
    """The gradients that :func:`_add_dkv` left without the scales of scores and of kept probabilities."""
    return dk * (source.scale_log2 * LN2), dv * source.kept_scale


@triton.jit
def _dq_of_globals(
    first_row, start, stop, queries, source,
    V: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    """What positions [start, stop) give to the gradient of BLOCK_G global queries."""
    offs_g, offs_d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    draws = draws_of(source.generator, first_row // 4, BLOCK_G)
    tile = _load_queries(first_row, offs_g, offs_g < V.num_globals - first_row, queries, first_row, draws, offs_d, V)
    dq = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    return walk_part(dq, tile, start, stop, source, V, BLOCK_N, BRANCH, _add_dq) * (source.scale_log2 * LN2)


@triton.jit
def _dq_of_tokens(
    first_row, queries, source,
    V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BRANCH: tl.constexpr,
):  # fmt: skip
    """The gradient of the queries of BLOCK_M tokens, from the keys that the forward took, in its order."""
    G: tl.constexpr = V.num_globals
    offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    draws = draws_of(source.generator, group_of_token(first_row, source, V), BLOCK_M)
    inside, first_sum = are_queries(first_row, offs_m, source, V), first_of_tokens(G) + first_row
    tile = _load_queries(G + first_row, offs_m, inside, queries, first_sum, draws, offs_d, V)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dq = walk_keys(dq, tile, first_row, source, V, BLOCK_M, BLOCK_N, BLOCK_G, BRANCH, _add_dq)
    return dq * (source.scale_log2 * LN2)


@triton.jit
def _dkv_of_globals(
    first_row, start, stop, with_globals, queries, source,
    V: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What tokens [start, stop) and, ``with_globals``, globals give to the gradients of BLOCK_G global keys."""
    offs_g, offs_d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    inside = offs_g < V.num_globals - first_row
    kept = is_kept(source.mask, first_row, offs_g, inside, V)
    keys = _load_keys(first_row, first_row, offs_g, inside, kept, source.tokens, offs_d, V)
    dk, dv, none = tl.zeros((BLOCK_G, BLOCK_D), tl.float32), tl.zeros((BLOCK_G, BLOCK_D), tl.float32), Range(0, 0)
    BLOCK_GLOBALS: tl.constexpr = BLOCK_G if BLOCK_G < BLOCK_N else BLOCK_N
    near = Range(0, tl.where(with_globals, V.num_globals, 0))
    dk, dv = _add_dkv(dk, dv, keys, near, none, queries, source, "global", "token", False, V, BLOCK_GLOBALS)
    near = Range(start, stop)
    dk, dv = _add_dkv(dk, dv, keys, near, none, queries, source, "token", "token", False, V, BLOCK_N)
    return _with_scales(dk, dv, source)


@triton.jit
def _dk_of_weights(first_row, dscore_ptr, queries, head, V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """What the first token's query, whose scores weight the tokens of a slot, gives to dk."""
    offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    ptrs = dscore_ptr + token_of(head, first_row, V.num_globals) + offs_m
    dscore = tl.load(ptrs, mask=offs_m < head.num_tokens - first_row, other=0.0)
    query = tl.load(one_row(queries.q, V.num_globals, offs_d), mask=offs_d < V.head_dim, other=0.0)
    return dscore[:, None] * query.to(tl.float32)[None, :]


@triton.jit
def _dkv_of_tokens(
    first_row, key_head, query_tensors, key_tensors, any_source, dscore_ptr,
    V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of the keys and values of BLOCK_M tokens from queries that see them as they are, or weight them.

    Those of all heads that read ``key_head``, in order; ``any_source``: the Source of one of these.
    """
    G: tl.constexpr = V.num_globals
    WINDOWED: tl.constexpr = V.block % BLOCK_M != 0 or V.block % BLOCK_N != 0
    BLOCK_GLOBALS: tl.constexpr = BLOCK_G if BLOCK_G < BLOCK_N else BLOCK_N
    num_tokens, first = any_source.num_tokens, G + first_row
    offs_n, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = offs_n < num_tokens - first_row
    kept = is_kept(any_source.mask, first, offs_n, inside, V)
    keys = _load_keys(first, first, offs_n, inside, kept, any_source.tokens, offs_d, V)
    dk, dv, none = tl.zeros((BLOCK_M, BLOCK_D), tl.float32), tl.zeros((BLOCK_M, BLOCK_D), tl.float32), Range(0, 0)
    last_row = tl.minimum(first_row + BLOCK_M, num_tokens) - 1
    # no token sees keys that are all padding
    stop_query = tl.where(any_of(kept), stop_of_queries(any_source, V), 0)
    others, own = tokens_that_see_tokens(first_row, last_row, stop_query, any_source, V, BLOCK_N)
    for member in tl.range(0, V.group, disable_licm=True):  # addresses that are the same for all would fill registers
        head = query_head_of(key_head, member, V.group)
        queries, source = locate_queries(head, query_tensors, V), locate_source(head, key_tensors, V)
        # 1. The first token's query.
        if dscore_ptr is not None:
            dk += _dk_of_weights(first_row, dscore_ptr, queries, head, V, BLOCK_M, BLOCK_D)
        # 2. The global queries.
        if G > 0 and not V.causal:
            near = Range(0, G)
            dk, dv = _add_dkv(dk, dv, keys, near, none, queries, source, "global", "token", False, V, BLOCK_GLOBALS)
        # 3. The tokens.
        if V.causal:
            dk, dv = _add_dkv(dk, dv, keys, own, none, queries, source, "token", "token", WINDOWED, V, BLOCK_N, True)
        dk, dv = _add_dkv(dk, dv, keys, others, none, queries, source, "token", "token", WINDOWED, V, BLOCK_N)
    return _with_scales(dk, dv, any_source)


@triton.jit(do_not_specialize=SIZES)
def _lsg_bwd_slots_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, cu_ptr, index_ptr, sparse_k_ptr, sparse_v_ptr, dout_ptr, sums_ptr,
    dslot_k_ptr, dslot_v_ptr,
    scale_log2, kept_scale, seed, threshold,
    q_strides, k_strides, v_strides, mask_batch_stride, mask_stride, index_stride, sparse_strides, dout_strides,
    sums_stride, slot_strides,
    num_heads, num_tokens, num_slots, length,
    first_query, stop_query, first_seen, first_token, whole_tokens, whole_slots,
    V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK_M slots from the queries that see them.

    Grid: batch * heads * cdiv(num_slots, BLOCK_M). Writes ``dslot_k`` and ``dslot_v`` (batch, heads, slots, head_dim)
    float32.
    """
    # 1. Locate the head and the slots.
    head, tile = locate_head(tl.cdiv(num_slots, BLOCK_M), Batch(cu_ptr, num_heads, num_tokens, length), V.num_globals)
    first_slot, own_slots = tile * BLOCK_M, slots_of(head, num_slots, V)
    if V.packed:
        if first_slot >= own_slots:
            return
    queries = locate_queries(head, QueryTensors(q_ptr, dout_ptr, sums_ptr, q_strides, dout_strides, sums_stride), V)
    section = Section(first_query, stop_query, first_seen, first_token, whole_tokens, whole_slots)
    tensors = KeyTensors(
        k_ptr, v_ptr, mask_ptr, index_ptr, sparse_k_ptr, sparse_v_ptr, scale_log2, kept_scale, seed, threshold,
        k_strides, v_strides, mask_batch_stride, mask_stride, index_stride, sparse_strides, num_tokens, num_slots,
        section,
    )  # fmt: skip
    source = locate_source(head, tensors, V)
    # 2. Their rows.
    SPARSITY: tl.constexpr = V.sparsity
    WINDOWED: tl.constexpr = V.step % BLOCK_M != 0 or V.reach % V.step != 0 or V.block % BLOCK_N != 0
    offs_n, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    places = find_keys(first_slot, offs_n, source.num_slots, source, SPARSITY, V)
    visible = are_visible(places, first_slot, offs_n, source, SPARSITY, V)
    keys = _load_keys(first_slot, places.first, places.rows, places.readable, visible, source.slots, offs_d, V)
    # 3. The queries to their right and left, unless none of these slots is visible.
    stop_query = tl.where(any_of(visible), stop_of_queries(source, V), 0)
    last_slot = tl.minimum(first_slot + BLOCK_M, own_slots) - 1
    near, far = tokens_that_see_slots(first_slot, last_slot, stop_query, source, V)
    dk, dv = tl.zeros((BLOCK_M, BLOCK_D), tl.float32), tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dk, dv = _add_dkv(dk, dv, keys, near, far, queries, source, "token", SPARSITY, WINDOWED, V, BLOCK_N)
    # 4. Store.
    dk, dv = _with_scales(dk, dv, source)
    dslots = slot_keys(dslot_k_ptr, slot_strides, dslot_v_ptr, slot_strides, head, V)
    store_keys(dslots, first_slot, offs_n, offs_n < own_slots - first_slot, offs_d, dk, dv, V.head_dim)


@triton.jit(do_not_specialize=SIZES)
def _lsg_bwd_dq_dkv_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, cu_ptr, index_ptr, sparse_k_ptr, sparse_v_ptr, weight_ptr, slot_ptr,
    dout_ptr, sums_ptr, dslot_k_ptr, dslot_v_ptr, dscore_ptr,
    dq_ptr, dk_ptr, dv_ptr, dq_part_ptr, dk_part_ptr, dv_part_ptr,
    scale_log2, kept_scale, seed, threshold,
    q_strides, k_strides, v_strides, mask_batch_stride, mask_stride, index_stride, sparse_strides, dout_strides,
    sums_stride, slot_strides, dq_strides, dk_strides, dv_strides, part_strides,
    batch, num_heads, num_tokens, num_slots, length, part_size, num_parts,
    first_query, stop_query, first_seen, first_token, whole_tokens, whole_slots,
    V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BRANCH: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK_M rows of tokens or BLOCK_G of globals: of queries, or of keys and values.

    BLOCK_N rows of the other side are taken at a time. Grid: batch * ((heads + key heads) * cdiv(num_tokens, BLOCK_M) +
    2 heads * cdiv(G, BLOCK_G) * num_parts), as locate_tile orders them; of a head of keys, the heads of queries that
    read it come before itself. Writes the tokens' rows of ``dq`` (batch, heads, G+T, head_dim), ``dk`` and ``dv``
    (batch, key heads, G+T, head_dim); of the globals' gradients the parts that come from ``part_size`` positions or
    tokens and from one head of queries, ``dq_part``, ``dk_part`` and ``dv_part`` (batch * heads, num_parts, G,
    head_dim) float32. Of a section's tokens that are no queries, ``dq`` is 0.
    """
    # 1. Locate the tile and its heads; of tokens' keys, the first head of queries that reads them.
    G: tl.constexpr = V.num_globals
    GLOBAL_TILES: tl.constexpr = (V.num_globals + BLOCK_G - 1) // BLOCK_G
    token_programs, global_programs = tl.cdiv(num_tokens, BLOCK_M), GLOBAL_TILES * num_parts
    key_batch = Batch(cu_ptr, num_heads // V.group, num_tokens, length)
    key_head, program, is_token = locate_tile(
        (V.group + 1) * token_programs, 2 * V.group * global_programs, batch, key_batch, G
    )  # fmt: skip
    if V.packed:
        position = G + program % tl.maximum(token_programs, 1) * BLOCK_M
        if G > 0:
            position = tl.where(is_token, position, program % global_programs // GLOBAL_TILES * part_size)
        if lies_past(key_head, position, G):
            return
    member = program // tl.where(is_token, token_programs, global_programs) % V.group
    head = query_head_of(key_head, member, V.group)
    query_tensors = QueryTensors(q_ptr, dout_ptr, sums_ptr, q_strides, dout_strides, sums_stride)
    section = Section(first_query, stop_query, first_seen, first_token, whole_tokens, whole_slots)
    key_tensors = KeyTensors(
        k_ptr, v_ptr, mask_ptr, index_ptr, sparse_k_ptr, sparse_v_ptr, scale_log2, kept_scale, seed, threshold,
        k_strides, v_strides, mask_batch_stride, mask_stride, index_stride, sparse_strides, num_tokens, num_slots,
        section,
    )  # fmt: skip
    queries, source = locate_queries(head, query_tensors, V), locate_source(head, key_tensors, V)
    num_tokens, offs_d = head.num_tokens, tl.arange(0, BLOCK_D)
    if V.sectioned:
        row = program % tl.maximum(token_programs, 1) * BLOCK_M
        of_queries = is_token & (program < V.group * token_programs)
        if of_queries & has_no_query(row, section, BLOCK_M):
            offs_m = tl.arange(0, BLOCK_M)
            rows, zeros = head_rows(dq_ptr, dq_strides, head, V.is_wide), tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            store_rows(rows, G + row, offs_m, offs_m < num_tokens - row, offs_d, zeros, V.head_dim)
            return

    if is_token:
        row = program % token_programs * BLOCK_M
        offs_m = tl.arange(0, BLOCK_M)
        inside = offs_m < num_tokens - row
        if program < V.group * token_programs:
            # 2. Queries of tokens. In a row that is none all is 0, as its sums and what is read of it are.
            dq = _dq_of_tokens(row, queries, source, V, BLOCK_M, BLOCK_N, BLOCK_G, BLOCK_D, BRANCH)
            rows = head_rows(dq_ptr, dq_strides, head, V.is_wide)
            store_rows(rows, G + row, offs_m, inside, offs_d, dq, V.head_dim)
        else:
            # 3. Keys and values of tokens: as they are, and as part of slots.
            dk, dv = _dkv_of_tokens(
                row, key_head, query_tensors, key_tensors, source, dscore_ptr, V, BLOCK_M, BLOCK_N, BLOCK_G, BLOCK_D
            )  # fmt: skip
            if V.sparsity != "none":
                dslots = SlotGradients(dslot_k_ptr, dslot_v_ptr, slot_strides, weight_ptr, slot_ptr)
                for i in tl.range(0, V.group, disable_licm=True):
                    reader = query_head_of(key_head, i, V.group)
                    slots = locate_source(reader, key_tensors, V)
                    dk, dv = add_slots(dk, dv, row, reader, slots, dslots, V, BLOCK_M, BLOCK_D)
            keys = head_keys(dk_ptr, dk_strides, dv_ptr, dv_strides, key_head, V.is_wide)
            store_keys(keys, G + row, offs_m, inside, offs_d, dk, dv, V.head_dim)
    elif G > 0:
        # 4. Globals: a part of the sum, which the next kernel adds to the others.
        number = program % global_programs
        part, row = number // GLOBAL_TILES, number % GLOBAL_TILES * BLOCK_G
        offs_g, start = tl.arange(0, BLOCK_G), part * part_size
        is_global = offs_g < G - row
        if program < V.group * global_programs:
            stop = tl.minimum(start + part_size, positions_of_globals(num_tokens, V))
            if V.sectioned:
                start = tl.maximum(start, section.first_seen)
            dq = _dq_of_globals(row, start, stop, queries, source, V, BLOCK_G, BLOCK_N, BLOCK_D, BRANCH)
            dq_part = rows_at(dq_part_ptr, part_strides, head.number, part, V.is_wide)
            store_rows(dq_part, row, offs_g, is_global, offs_d, dq, V.head_dim)
        else:
            with_globals = start == 0
            if V.sectioned:
                with_globals = with_globals & (section.first_seen == 0)
                start += section.first_query
            stop = tl.minimum(start + part_size, stop_of_queries(source, V))
            dk, dv = _dkv_of_globals(row, start, stop, with_globals, queries, source, V, BLOCK_G, BLOCK_N, BLOCK_D)
            dk_part = rows_at(dk_part_ptr, part_strides, head.number, part, V.is_wide)
            dv_part = rows_at(dv_part_ptr, part_strides, head.number, part, V.is_wide)
            store_keys(Keys(dk_part, dv_part), row, offs_g, is_global, offs_d, dk, dv, V.head_dim)
