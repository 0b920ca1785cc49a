"""Tile helpers that the kernels share: addresses, padding, the online softmax and dropout."""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
# Where a row's maximum starts: finite, so that a row that has seen nothing never computes inf - inf.
LEAST = tl.constexpr(-3.0e38)


@triton.jit
def head_ptr(ptr, strides, batch, head):
    """The first element of one head of a (batch, heads, length, head_dim) tensor."""
    return ptr + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def row_ptrs(ptr, strides, rows, offs_d):
    """Pointers (rows, BLOCK_D) to elements of one head; 64-bit, as a row times its stride may pass 2^31."""
    return ptr + rows.to(tl.int64)[:, None] * strides[2] + offs_d.to(tl.int64)[None, :] * strides[3]


@triton.jit
def load_rows(ptr, strides, rows, readable, offs_d, HEAD_DIM: tl.constexpr):
    """Rows of one head as a (rows, BLOCK_D) tile, 0 where not ``readable`` and past head_dim."""
    mask = readable[:, None]
    if offs_d.shape[0] != HEAD_DIM:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    return tl.load(row_ptrs(ptr, strides, rows, offs_d), mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, strides, rows, inside, offs_d, tile, HEAD_DIM: tl.constexpr):
    """Write a (rows, BLOCK_D) tile to the rows of one head that are ``inside``, in the tensor's dtype."""
    mask = inside[:, None]
    if offs_d.shape[0] != HEAD_DIM:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    tl.store(row_ptrs(ptr, strides, rows, offs_d), tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def mask_of(mask_ptr, batch_stride, stride, batch, V: tl.constexpr):
    """Pointer and stride of the mask's row of one batch entry."""
    if V.has_mask:
        return mask_ptr + batch.to(tl.int64) * batch_stride, stride
    else:
        return 0, 0  # as a function can not return the None that mask_ptr is


@triton.jit
def is_kept(mask_row, positions, inside, V: tl.constexpr):
    """Which positions of the sequence are tokens, of those ``inside`` it.

    ``mask_row``: from :func:`mask_of`; the row's first column is position ``V.mask_first``.
    """
    if V.has_mask:
        ptr, stride = mask_row
        column = positions - V.mask_first
        kept = tl.load(ptr + column.to(tl.int64) * stride, mask=inside & (column >= 0), other=1) != 0
        return inside & kept
    else:
        return inside


@triton.jit
def softmax_start(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The softmax of rows that have seen nothing: accumulator, maximum and sum of each row."""
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    return acc, tl.full((BLOCK_M,), LEAST, tl.float32), tl.zeros((BLOCK_M,), tl.float32)


@triton.jit
def softmax_step(state, scores, v, keeps, scale_log2):
    """Take the scores of one tile of keys into the softmax of a tile of queries (arXiv 2307.08691, algorithm 1).

    scores: (BLOCK_M, BLOCK_N), -inf where a key is not visible; v: (BLOCK_N, BLOCK_D); keeps: the probabilities that
    dropout keeps, (BLOCK_M, BLOCK_N), or None. The maximum is of scores before scaling: the scale, which must be
    positive, is part of the exponent's one multiply-add.
    """
    acc, row_max, row_sum = state
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    rescale = tl.exp2((row_max - new_max) * scale_log2)
    shift = tl.maximum(new_max * scale_log2, LEAST)  # a large scale would take LEAST to -inf
    probs = tl.exp2(scores * scale_log2 - shift[:, None])
    row_sum = row_sum * rescale + tl.sum(probs, 1)
    if keeps is not None:
        probs = tl.where(keeps, probs, 0.0)
    acc = tl.dot(probs.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return acc, new_max, row_sum


@triton.jit
def softmax_end(state, scale_log2):
    """The normalised rows and their natural log-sum-exp; 0 and +inf for a row that saw nothing.

    With +inf a backward's ``exp(score - lse)`` is 0 there, where -inf would make it NaN.
    """
    acc, row_max, row_sum = state
    empty = row_sum == 0.0
    lse = (row_max * scale_log2 + tl.log2(row_sum)) * LN2
    return acc / tl.where(empty, 1.0, row_sum)[:, None], tl.where(empty, float("inf"), lse)


@triton.jit
def score_gradients(scores, dprobs, lse_log2, delta, keeps, scale_log2, kept_scale):
    """The probabilities that dropout keeps, unscaled, and the gradients of the scaled scores of a tile.

    p = exp(score - lse) and dscore = p (dp - delta), delta the sum of out * dout (arXiv 2307.08691, algorithm 2).
    dprobs: dout times values; keeps: as for :func:`softmax_step`; lse_log2 and delta broadcast to the tile.
    """
    probs = tl.exp2(scores * scale_log2 - lse_log2)
    kept_probs = probs
    if keeps is not None:
        kept_probs = tl.where(keeps, probs, 0.0)
        dprobs = tl.where(keeps, dprobs * kept_scale, 0.0)
    return kept_probs, probs * (dprobs - delta)


@triton.jit
def generator_of(seed, threshold, batch_head, num_tokens, num_slots, V: tl.constexpr):
    """What dropout draws with in one head: seed, threshold, the head's first counter, counters of a group of rows.

    A group is four queries, of the globals or of the tokens, which start their own; each column of it is a counter.
    """
    groups = (V.num_globals + 3) // 4 + tl.cdiv(num_tokens, 4)
    columns = (V.num_globals + num_tokens + num_slots).to(tl.int64)
    return seed, threshold, batch_head * groups * columns, columns


@triton.jit
def draws_of(generator, group, ROWS: tl.constexpr):
    """What dropout draws with in ROWS rows from ``group`` on: seed, threshold, each group's first counter."""
    seed, threshold, first, columns = generator
    return seed, threshold, first + (group + tl.arange(0, ROWS // 4)) * columns


@triton.jit
def dropout_keeps(draws, columns, ROWS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Which probabilities of a tile (ROWS, columns) are kept, each with probability 1 - threshold / 2^31.

    Philox (Salmon et al., SC 2011) counted by head, group of four query rows, and key column: no draw depends on the
    sizes of tiles. A counter's four words go to the four rows of its group, as tiles start at a multiple of four
    rows but at any key. ``draws``: from :func:`draws_of`. TRANSPOSED: the tile is (columns, ROWS).
    """
    seed, threshold, counters = draws
    COLUMNS: tl.constexpr = columns.shape[0]
    if TRANSPOSED:
        a, b, c, d = tl.randint4x(seed, columns[:, None] + counters[None, :])
        words = tl.join(tl.join(a, b), tl.join(c, d))  # (columns, ROWS // 4, 2, 2)
        words = tl.reshape(tl.permute(words, (0, 1, 3, 2)), (COLUMNS, ROWS))
    else:
        a, b, c, d = tl.randint4x(seed, counters[:, None] + columns[None, :])
        words = tl.join(tl.join(a, b), tl.join(c, d))  # (ROWS // 4, columns, 2, 2)
        words = tl.reshape(tl.permute(words, (0, 3, 2, 1)), (ROWS, COLUMNS))
    return (words.to(tl.uint32, bitcast=True) >> 1).to(tl.int32) >= threshold
