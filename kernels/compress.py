"""The compress kernels: rank tokens by norm, pool groups, or cluster chunks, one launch before the attention kernel."""

import triton
import triton.language as tl

from .heads import (
    SIZES,
    Batch,
    head_rows,
    index_of,
    key_head_of,
    keys_read_by,
    locate_head,
    slot_keys,
    slots_of,
    store_keys,
    token_of,
)
from .primitives import MIN_SCORE, is_kept, load_rows, mask_of, one_row, store_rows

# Columns of head_dim at a time, where whole rows of a chunk would not fit into registers.
_NORM_COLUMNS = tl.constexpr(64)
_LSH_COLUMNS = tl.constexpr(16)
_POOLING_EPS = tl.constexpr(1e-6)
_LSH_EPS = tl.constexpr(1e-8)


@triton.jit
def _squared_norms(k, tokens, kept, V: tl.constexpr):
    """Squared norms of keys in float32; -1 for padding, and inf for NaN so that any two norms compare."""
    norms = tl.zeros(tokens.shape, tl.float32)
    G: tl.constexpr = V.num_globals
    for column in tl.range(0, V.head_dim, _NORM_COLUMNS):
        offs_d = column + tl.arange(0, _NORM_COLUMNS)
        columns = load_rows(k, G, tokens, kept, offs_d, V.head_dim).to(tl.float32)
        norms += tl.sum(columns * columns, 1)
    norms = tl.where(norms == norms, norms, float("inf"))
    return tl.where(kept, norms, -1.0)


@triton.jit(do_not_specialize=SIZES)
def _lsg_norm_kernel(
    k_ptr, mask_ptr, cu_ptr, index_ptr,
    k_strides, mask_batch_stride, mask_stride, index_stride, num_heads, num_tokens, num_slots, length,
    V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Rank BLOCK_C tokens of a chunk by norm: no sort, a rank is the number of tokens of the chunk that beat one.

    Grid: batch * heads * chunks * cdiv(V.chunk, BLOCK_C). Each token of rank below V.chunk // f writes its own element
    of ``index`` (batch, heads, slots) int32, in ascending order of norm: the token, or -1 if it is padding.
    """
    G: tl.constexpr = V.num_globals
    TILES: tl.constexpr = (V.chunk + BLOCK_C - 1) // BLOCK_C
    CHUNK: tl.constexpr = V.chunk  # triton 3.6 takes no field of a tuple as the end of a static range
    CHOSEN: tl.constexpr = V.chunk // V.factor
    head, tile = locate_head(num_slots // CHOSEN * TILES, Batch(cu_ptr, num_heads, num_tokens, length), G)
    chunk = tile // TILES
    if V.packed:
        if chunk * CHOSEN >= slots_of(head, num_slots, V):
            return
    mask = mask_of(mask_ptr, mask_batch_stride, mask_stride, head.batch, V)
    k = head_rows(k_ptr, k_strides, key_head_of(head, V.group), V.is_wide)
    offs_m = tile % TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    tokens = chunk * V.chunk + offs_m
    kept = is_kept(mask, G, tokens, (offs_m < V.chunk) & (tokens < head.num_tokens), V)
    norms = _squared_norms(k, tokens, kept, V)
    rank = tl.zeros((BLOCK_C,), tl.int32)
    for start in tl.static_range(0, CHUNK, BLOCK_C):
        offs_n = start + tl.arange(0, BLOCK_C)
        other_norms = norms
        if TILES > 1:
            others = chunk * V.chunk + offs_n
            inside = (offs_n < V.chunk) & (others < head.num_tokens)
            other_kept = is_kept(mask, G, others, inside, V)
            other_norms = _squared_norms(k, others, other_kept, V)
        larger = other_norms[None, :] > norms[:, None]
        earlier = (other_norms[None, :] == norms[:, None]) & (offs_n[None, :] < offs_m[:, None])
        rank += tl.sum(((larger | earlier) & (offs_n < V.chunk)[None, :]).to(tl.int32), 1)
    slots = chunk * CHOSEN + CHOSEN - 1 - rank
    index_ptr = index_of(index_ptr, index_stride, head, V)
    tl.store(index_ptr + slots, tl.where(kept, tokens, -1), mask=(offs_m < V.chunk) & (rank < CHOSEN))


@triton.jit(do_not_specialize=SIZES)
def _lsg_pool_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, cu_ptr, index_ptr, sparse_k_ptr, sparse_v_ptr, weight_ptr,
    scale_log2,
    q_strides, k_strides, v_strides, mask_batch_stride, mask_stride, index_stride, sparse_strides,
    num_heads, num_tokens, num_slots, length,
    V: tl.constexpr, BY_QUERY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pool BLOCK_N groups of f tokens: their mean, or BY_QUERY, weighted by the first token's softmax over them.

    Grid: batch * heads * cdiv(slots, BLOCK_N). Writes ``sparse_k`` and ``sparse_v`` (batch, heads, slots, head_dim),
    ``index`` (batch, heads, slots) int32 (the slot, or -1 if all of it is padding) and ``weight`` (batch, heads, T).
    """
    G: tl.constexpr = V.num_globals
    head, tile = locate_head(tl.cdiv(num_slots, BLOCK_N), Batch(cu_ptr, num_heads, num_tokens, length), G)
    own_slots = slots_of(head, num_slots, V)
    if V.packed:
        if tile * BLOCK_N >= own_slots:
            return
    mask = mask_of(mask_ptr, mask_batch_stride, mask_stride, head.batch, V)
    keys = keys_read_by(k_ptr, k_strides, v_ptr, v_strides, head, V)
    offs_n, offs_d = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    inside = offs_n < own_slots
    if BY_QUERY:
        ptrs = one_row(head_rows(q_ptr, q_strides, head, V.is_wide), G, offs_d)
        q = tl.load(ptrs, mask=offs_d < V.head_dim, other=0.0).to(tl.float32)[None, :] * scale_log2
    # 1. How many tokens each group has; of their scores, the maximum and the sum of exponentials.
    count, total = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    top = tl.full((BLOCK_N,), MIN_SCORE, tl.float32)
    for member in tl.range(0, V.factor):
        tokens = offs_n * V.factor + member
        kept = is_kept(mask, G, tokens, inside & (tokens < head.num_tokens), V)
        count += kept.to(tl.float32)
        if BY_QUERY:
            k = load_rows(keys.k, G, tokens, kept, offs_d, V.head_dim).to(tl.float32)
            score = tl.where(kept, tl.sum(q * k, 1), float("-inf"))
            new_top = tl.maximum(top, score)
            total = total * tl.exp2(top - new_top) + tl.exp2(score - new_top)
            top = new_top
    # 2. Weights, and the weighted sums.
    sparse_k, sparse_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for member in tl.range(0, V.factor):
        tokens = offs_n * V.factor + member
        exists = inside & (tokens < head.num_tokens)
        kept = is_kept(mask, G, tokens, exists, V)
        k = load_rows(keys.k, G, tokens, kept, offs_d, V.head_dim).to(tl.float32)
        v = load_rows(keys.v, G, tokens, kept, offs_d, V.head_dim).to(tl.float32)
        if BY_QUERY:
            weight = tl.where(kept, tl.exp2(tl.sum(q * k, 1) - top) / total, 0.0)
        else:
            weight = kept.to(tl.float32) / (count + _POOLING_EPS)
        tl.store(weight_ptr + token_of(head, 0, G) + tokens, weight, mask=exists)
        sparse_k += weight[:, None] * k
        sparse_v += weight[:, None] * v
    slots = slot_keys(sparse_k_ptr, sparse_strides, sparse_v_ptr, sparse_strides, head, V)
    store_keys(slots, 0, offs_n, inside, offs_d, sparse_k, sparse_v, V.head_dim)
    index_ptr = index_of(index_ptr, index_stride, head, V)
    tl.store(index_ptr + offs_n, tl.where(count > 0.0, offs_n, -1), mask=inside)


@triton.jit
def _one_hot_dot(choice, x):
    """A 0/1 matrix times x: the sums are exact except for float32's rounding.

    Tensor cores multiply 16-bit numbers. A float32 is the sum of three bfloat16, and their products with 0 and 1 are
    exact.
    """
    if x.dtype == tl.float32:
        choice = choice.to(tl.bfloat16)
        high = x.to(tl.bfloat16)
        rest = x - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(choice, low, tl.dot(choice, middle, tl.dot(choice, high)))
    else:
        return tl.dot(choice.to(x.dtype), x)


@triton.jit
def _hash(
    k, tokens, kept, direction_ptr, head, cluster,
    CLUSTERED: tl.constexpr, HALF: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """The bucket of each token in a round into 2 HALF (or one more) buckets: the argmax of [p, -p].

    p is the projection, on a head's directions (head_dim, HALF), of the token, or where CLUSTERED of its cluster's sum.
    """
    if HALF == 0:
        return tl.zeros_like(cluster)
    else:
        G: tl.constexpr = V.num_globals
        BLOCK_H: tl.constexpr = 16 if HALF < 16 else triton.next_power_of_2(HALF)
        offs_h = tl.arange(0, BLOCK_H)
        products = tl.zeros((tokens.shape[0], BLOCK_H), tl.float32)
        direction_ptr += head * (V.head_dim * HALF)
        for column in tl.range(0, V.head_dim, _LSH_COLUMNS):
            offs_d = column + tl.arange(0, _LSH_COLUMNS)
            columns = load_rows(k, G, tokens, kept, offs_d, V.head_dim).to(tl.float32)
            inside = (offs_d < V.head_dim)[:, None] & (offs_h < HALF)[None, :]
            direction = tl.load(direction_ptr + offs_d[:, None] * HALF + offs_h[None, :], mask=inside, other=0.0)
            products = tl.dot(columns, direction, products, input_precision="ieee")
        if CLUSTERED:
            products = _one_hot_dot(cluster[:, None] == cluster[None, :], products)
        products = tl.where(products == products, products, 0.0)  # NaN would let the maximum be anywhere
        best = tl.argmax(tl.where((offs_h < HALF)[None, :], tl.abs(products), -1.0), 1)
        chosen = tl.sum(tl.where(offs_h[None, :] == best[:, None], products, 0.0), 1)
        return best + HALF * (chosen < 0.0).to(tl.int32)


@triton.jit(do_not_specialize=SIZES)
def _lsg_lsh_kernel(
    k_ptr, v_ptr, mask_ptr, cu_ptr, direction_ptrs, index_ptr, sparse_k_ptr, sparse_v_ptr, slot_ptr, weight_ptr,
    k_strides, v_strides, mask_batch_stride, mask_stride, index_stride, sparse_strides,
    num_heads, num_tokens, num_slots, length,
    V: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Cluster one chunk of tokens by hashing rounds, or as ``slot`` says where there are no directions; average each.

    A round hashes the sums of the last round's buckets. Projecting is linear, so a sum's projection is the sum of its
    tokens' projections, and each token can carry that of its own cluster: no bucket is ever stored.
    ``directions``: of each round (heads, head_dim, buckets // 2) float32, contiguous.

    Grid: batch * heads * chunks. Writes ``sparse_k`` and ``sparse_v`` (batch, heads, slots, head_dim), ``index``
    (batch, heads, slots) int32 (the slot, or -1 if it has no token), and of each token ``weight`` (batch, heads, T)
    float32 and with directions ``slot`` (batch, heads, T) int32.
    """
    G: tl.constexpr = V.num_globals
    CLUSTERS: tl.constexpr = V.chunk // V.factor
    head, chunk = locate_head(num_slots // CLUSTERS, Batch(cu_ptr, num_heads, num_tokens, length), G)
    if V.packed:
        if chunk * CLUSTERS >= slots_of(head, num_slots, V):
            return
    mask = mask_of(mask_ptr, mask_batch_stride, mask_stride, head.batch, V)
    keys = keys_read_by(k_ptr, k_strides, v_ptr, v_strides, head, V)
    offs_c = tl.arange(0, BLOCK_C)
    tokens = chunk * V.chunk + offs_c
    exists = (offs_c < V.chunk) & (tokens < head.num_tokens)
    kept = is_kept(mask, G, tokens, exists, V)
    # 1. Hash, round by round, unless that was done.
    cluster = tl.zeros((BLOCK_C,), tl.int32)
    slot_ptr += token_of(head, 0, G) + tokens
    if direction_ptrs is None:
        cluster = tl.load(slot_ptr, mask=exists, other=0) - chunk * CLUSTERS
    else:
        for i in tl.static_range(len(direction_ptrs)):
            cluster = _hash(
                keys.k, tokens, kept, direction_ptrs[i], head.index, cluster,
                CLUSTERED=i > 0, HALF=(V.chunk if i + 1 < len(direction_ptrs) else CLUSTERS) // 2, V=V,
            )  # fmt: skip
        tl.store(slot_ptr, chunk * CLUSTERS + cluster, mask=exists)
    # 2. Each token's weight.
    same = (cluster[:, None] == cluster[None, :]) & kept[None, :]
    weight = kept.to(tl.float32) / (tl.sum(same.to(tl.float32), 1) + _LSH_EPS)
    tl.store(weight_ptr + token_of(head, 0, G) + tokens, weight, mask=exists)
    # 3. Average the tokens of each slot.
    offs_n = tl.arange(0, BLOCK_N)
    slots, inside = chunk * CLUSTERS + offs_n, offs_n < CLUSTERS
    member = (offs_n[:, None] == cluster[None, :]) & kept[None, :]  # (BLOCK_N, BLOCK_C)
    count = tl.sum(member.to(tl.float32), 1)
    share = (1.0 / (count + _LSH_EPS))[:, None]
    sparse = slot_keys(sparse_k_ptr, sparse_strides, sparse_v_ptr, sparse_strides, head, V)
    for column in tl.range(0, V.head_dim, _LSH_COLUMNS):
        offs_d = column + tl.arange(0, _LSH_COLUMNS)
        k = load_rows(keys.k, G, tokens, kept, offs_d, V.head_dim)
        store_rows(sparse.k, 0, slots, inside, offs_d, _one_hot_dot(member, k) * share, V.head_dim)
        v = load_rows(keys.v, G, tokens, kept, offs_d, V.head_dim)
        store_rows(sparse.v, 0, slots, inside, offs_d, _one_hot_dot(member, v) * share, V.head_dim)
    index_ptr = index_of(index_ptr, index_stride, head, V)
    tl.store(index_ptr + slots, tl.where(count > 0.0, slots, -1), mask=inside)
