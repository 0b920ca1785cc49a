"""What a program works on: its head, and where that head's queries, keys, mask and slots lie."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .primitives import generator_of, mask_of, rows_at, store_rows


class Head(NamedTuple):
    """One head: its number among all heads of the batch (int64), its batch entry, and its number there (int32)."""

    flat: Any
    batch: Any
    index: Any


class Keys(NamedTuple):
    """The Rows of keys and of values."""

    k: Any
    v: Any


class Queries(NamedTuple):
    """The Rows of queries and of the gradient of their output; pointers to their log-sum-exps and deltas."""

    q: Any
    dout: Any
    lse_ptr: Any
    delta_ptr: Any


class Source(NamedTuple):
    """All that the queries of a head attend to, and by what rule.

    Attributes:
        tokens, slots: Keys of the positions of the sequence, and of the slots; the same where slots are positions.
        mask: the Mask of the batch entry.
        index_ptr: the head's slots in ``index`` (batch, heads, slots) int32, which not every sparsity has: a slot's
            token for "indexed"; below 0 for a slot that is not kept.
        head: the head's number in its batch entry.
        num_tokens, num_slots: how many tokens and slots the head has.
        generator: the Generator of dropout.
        scale_log2, kept_scale: factors of scores, as exponents of two, and of the probabilities that dropout keeps.
    """

    tokens: Any
    slots: Any
    mask: Any
    index_ptr: Any
    head: Any
    num_tokens: Any
    num_slots: Any
    generator: Any
    scale_log2: Any
    kept_scale: Any


@triton.jit
def locate_head(programs, num_heads):
    """The Head of this program, and its number among the ``programs`` that each head has."""
    flat, program = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    return Head(flat, flat // num_heads, (flat % num_heads).to(tl.int32)), program


@triton.jit
def head_rows(ptr, strides, head):
    """The Rows of one head of a (batch, heads, length, head_dim) tensor."""
    return rows_at(ptr, strides, head.batch, head.index)


@triton.jit
def head_keys(k_ptr, k_strides, v_ptr, v_strides, head):
    """The Keys of one head, or what else is of keys and of values."""
    return Keys(head_rows(k_ptr, k_strides, head), head_rows(v_ptr, v_strides, head))


@triton.jit
def store_keys(keys, rows, inside, offs_d, k, v, HEAD_DIM: tl.constexpr):
    """Write tiles (rows, BLOCK_D) to the rows of Keys that are ``inside``, in the tensors' dtype."""
    store_rows(keys.k, rows, inside, offs_d, k, HEAD_DIM)
    store_rows(keys.v, rows, inside, offs_d, v, HEAD_DIM)


@triton.jit
def locate_source(
    head, k_ptr, v_ptr, mask_ptr, index_ptr, sparse_k_ptr, sparse_v_ptr,
    scale_log2, kept_scale, seed, threshold,
    k_strides, v_strides, mask_batch_stride, mask_stride, sparse_strides, num_tokens, num_slots, V: tl.constexpr,
):  # fmt: skip
    """The Source of one head; arguments as the kernels have them."""
    tokens = head_keys(k_ptr, k_strides, v_ptr, v_strides, head)
    slots = tokens
    if V.sparsity == "compressed":
        slots = head_keys(sparse_k_ptr, sparse_strides, sparse_v_ptr, sparse_strides, head)
    mask = mask_of(mask_ptr, mask_batch_stride, mask_stride, head.batch, V)
    index_ptr = _index_of(index_ptr, head, num_slots, V)
    generator = generator_of(seed, threshold, head.flat, num_tokens, num_slots, V)
    return Source(
        tokens, slots, mask, index_ptr, head.index, num_tokens, num_slots, generator, scale_log2, kept_scale
    )  # fmt: skip


@triton.jit
def _index_of(index_ptr, head, num_slots, V: tl.constexpr):
    if V.sparsity == "indexed" or V.sparsity == "compressed":
        return index_ptr + head.flat * num_slots
    else:
        return 0  # a function cannot return the None that index_ptr is


@triton.jit
def locate_queries(
    head, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_strides, dout_strides, num_tokens, V: tl.constexpr
):  # fmt: skip
    """The Queries of one head."""
    first = head.flat * (V.num_globals + num_tokens)
    return Queries(
        head_rows(q_ptr, q_strides, head), head_rows(dout_ptr, dout_strides, head), lse_ptr + first, delta_ptr + first
    )
