"""Tile helpers that the kernels share: rows of tensors, padding, the online softmax and dropout."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
# Where a row's maximum starts: finite, so that a row that has seen nothing never computes inf - inf.
MIN_SCORE = tl.constexpr(-3.0e38)


class Rows(NamedTuple):
    """The rows x[i, j] of a 4-D tensor x, such as those of one head: a pointer to the first, and the two strides."""

    ptr: Any
    stride: Any
    column_stride: Any


class Mask(NamedTuple):
    """The mask of one batch entry: a pointer to its first column, and the stride; both 0 where there is no mask."""

    ptr: Any
    stride: Any


class Softmax(NamedTuple):
    """The online softmax of a tile of queries: acc (BLOCK_M, BLOCK_D), row_max and row_sum (BLOCK_M,), float32."""

    acc: Any
    row_max: Any
    row_sum: Any


class Generator(NamedTuple):
    """What dropout draws with in one head.

    ``first``: the head's first counter; ``columns``: the counters of a group of four rows; ``slots``: the column of the
    first slot.
    """

    seed: Any
    threshold: Any
    first: Any
    columns: Any
    slots: Any


class Draws(NamedTuple):
    """What dropout draws with in a tile: ``counters`` (groups of four rows,) int64, each group's first counter."""

    seed: Any
    threshold: Any
    counters: Any


@triton.jit
def rows_at(ptr, strides, i, j, WIDE: tl.constexpr):
    """The Rows x[i, j] of the tensor x at ``ptr``. WIDE: their offsets from x[i, j] may pass 2^31."""
    ptr += i.to(tl.int64) * strides[0] + j.to(tl.int64) * strides[1]
    return Rows(ptr, _widened(strides[2], WIDE), _widened(strides[3], WIDE))


@triton.jit
def _widened(stride, WIDE: tl.constexpr):
    """The stride, in 64 bits if WIDE; what is multiplied by it then has 64 bits too."""
    if WIDE:
        return tl.cast(stride, tl.int64)
    else:
        return stride


@triton.jit
def row_ptrs(x, first, rows, offs_d):
    """Pointers (rows, BLOCK_D) to elements of Rows, ``rows`` after the row ``first``.

    What is the same for a whole tile is added to the pointer first, so that a loop adds no more than that.
    """
    return (x.ptr + first * x.stride) + (rows[:, None] * x.stride + offs_d[None, :] * x.column_stride)


@triton.jit
def one_row(x, row, offs_d):
    """Pointers (BLOCK_D,) to one row of Rows."""
    return x.ptr + row * x.stride + offs_d * x.column_stride


@triton.jit
def load_rows(x, first, rows, readable, offs_d, HEAD_DIM: tl.constexpr):
    """A (rows, BLOCK_D) tile of Rows, 0 where not ``readable`` and past head_dim; addresses as for row_ptrs."""
    mask = readable[:, None]
    if offs_d.shape[0] != HEAD_DIM:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    return tl.load(row_ptrs(x, first, rows, offs_d), mask=mask, other=0.0)


@triton.jit
def store_rows(x, first, rows, inside, offs_d, tile, HEAD_DIM: tl.constexpr):
    """Write a (rows, BLOCK_D) tile to the Rows that are ``inside``, in their dtype; addresses as for row_ptrs."""
    mask = inside[:, None]
    if offs_d.shape[0] != HEAD_DIM:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    tl.store(row_ptrs(x, first, rows, offs_d), tile.to(x.ptr.dtype.element_ty), mask=mask)


@triton.jit
def mask_of(mask_ptr, batch_stride, stride, batch, V: tl.constexpr):
    """The Mask of one batch entry."""
    if V.has_mask:
        return Mask(mask_ptr + batch.to(tl.int64) * batch_stride, _widened(stride, V.is_wide))
    else:
        return Mask(0, 0)  # a function cannot return the None that mask_ptr is


@triton.jit
def is_kept(mask, first, rows, inside, V: tl.constexpr):
    """Which of the positions ``rows`` after ``first`` are tokens, of those ``inside`` the sequence.

    Column 0 of the mask is position ``V.mask_first``.
    """
    if V.has_mask:
        column = first - V.mask_first
        ptrs = (mask.ptr + column * mask.stride) + rows * mask.stride
        return inside & (tl.load(ptrs, mask=inside & (rows >= -column), other=1) != 0)
    else:
        return inside


@triton.jit
def softmax_start(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The Softmax of queries that have seen nothing."""
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    return Softmax(acc, tl.full((BLOCK_M,), MIN_SCORE, tl.float32), tl.zeros((BLOCK_M,), tl.float32))


@triton.jit
def softmax_step(state, scores, v, keeps, scale_log2):
    """Take the scores of one tile of keys into the Softmax of a tile of queries (arXiv 2307.08691, algorithm 1).

    scores: (BLOCK_M, BLOCK_N), -inf where a key is not visible; v: (BLOCK_N, BLOCK_D); keeps: the probabilities that
    dropout keeps, (BLOCK_M, BLOCK_N), or None. The maximum is of scores before scaling: the scale, which must be
    positive, is part of the exponent's one multiply-add.
    """
    new_max = tl.maximum(state.row_max, tl.max(scores, 1))
    rescale = tl.exp2((state.row_max - new_max) * scale_log2)
    shift = tl.maximum(new_max * scale_log2, MIN_SCORE)  # a large scale would take MIN_SCORE to -inf
    probs = tl.exp2(scores * scale_log2 - shift[:, None])
    row_sum = state.row_sum * rescale + tl.sum(probs, 1)
    if keeps is not None:
        probs = tl.where(keeps, probs, 0.0)
    acc = tl.dot(probs.to(v.dtype), v, state.acc * rescale[:, None], input_precision="ieee")
    return Softmax(acc, new_max, row_sum)


@triton.jit
def softmax_end(state, scale_log2, factor):
    """The normalised rows times ``factor``, and their natural log-sum-exp; 0 and +inf for a row that saw nothing.

    With +inf a backward's ``exp(score - lse)`` is 0 there, where -inf would make it NaN.
    """
    empty = state.row_sum == 0.0
    lse = (state.row_max * scale_log2 + tl.log2(state.row_sum)) * LN2
    return state.acc * (factor / tl.where(empty, 1.0, state.row_sum))[:, None], tl.where(empty, float("inf"), lse)


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
def generator_of(seed, threshold, head, num_tokens, num_slots, V: tl.constexpr):
    """The Generator of the head of that number, where a sequence has up to ``num_tokens`` and ``num_slots``.

    A group is four queries, of the globals or of the tokens, which start their own; each column of it is a counter.
    """
    groups = (V.num_globals + 3) // 4 + tl.cdiv(num_tokens, 4)
    columns = (V.num_globals + num_tokens + num_slots).to(tl.int64)
    return Generator(seed, threshold, head * groups * columns, columns, V.num_globals + num_tokens)


@triton.jit
def draws_of(generator, group, ROWS: tl.constexpr):
    """The Draws of ROWS rows from ``group`` on."""
    counters = generator.first + (group + tl.arange(0, ROWS // 4)) * generator.columns
    return Draws(generator.seed, generator.threshold, counters)


@triton.jit
def dropout_keeps(draws, columns, ROWS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Which probabilities of a tile (ROWS, columns) are kept, each with probability 1 - threshold / 2^31.

    Philox (Salmon et al., SC 2011) counted by head, group of four query rows, and key column: no draw depends on the
    sizes of tiles. A counter's four words go to the four rows of its group, as tiles start at a multiple of four
    rows but at any key. TRANSPOSED: the tile is (columns, ROWS).
    """
    COLUMNS: tl.constexpr = columns.shape[0]
    if TRANSPOSED:
        a, b, c, d = tl.randint4x(draws.seed, columns[:, None] + draws.counters[None, :])
        words = tl.join(tl.join(a, b), tl.join(c, d))  # (columns, ROWS // 4, 2, 2)
        words = tl.reshape(tl.permute(words, (0, 1, 3, 2)), (COLUMNS, ROWS))
    else:
        a, b, c, d = tl.randint4x(draws.seed, draws.counters[:, None] + columns[None, :])
        words = tl.join(tl.join(a, b), tl.join(c, d))  # (ROWS // 4, columns, 2, 2)
        words = tl.reshape(tl.permute(words, (0, 3, 2, 1)), (ROWS, COLUMNS))
    return (words.to(tl.uint32, bitcast=True) >> 1).to(tl.int32) >= draws.threshold
