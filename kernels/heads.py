"""What a program works on: its head, and where that head's queries, keys, mask and slots lie."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .primitives import generator_of, mask_of, rows_at, store_rows

# Arguments that differ between batches. They are not specialised, or other batches would compile the kernels again.
SIZES = [
    "seed", "threshold", "mask_batch_stride", "index_stride", "sums_stride", "batch", "length", "num_tokens",
    "num_slots", "num_tiles", "part_size", "num_parts", "first_query", "stop_query", "first_seen", "first_token",
    "whole_tokens", "whole_slots",
]  # fmt: skip
# Rows that no tile of queries has more of.
SUMS_PADDED = tl.constexpr(128)


class Batch(NamedTuple):
    """The arguments of a kernel that say which sequences there are.

    Attributes:
        cu_ptr: where each packed sequence starts and the last one stops, or None where sequences are batch entries.
        num_heads: of a batch entry.
        num_tokens: tokens after the globals, of the longest sequence.
        length: rows of a head of the tensors.
    """

    cu_ptr: Any
    num_heads: Any
    num_tokens: Any
    length: Any


class Section(NamedTuple):
    """The arguments of a kernel that say where the sequence lies in a longer one; None of any other (see V.sectioned).

    Attributes:
        first_query, stop_query: the tokens from the one on and before the other are queries.
        first_seen: the first position that the globals' queries see: not 0 where another section has the globals.
        first_token: the number of the first token in the whole sequence.
        whole_tokens, whole_slots: tokens after the globals, and slots of each head, of the whole sequence.
    """

    first_query: Any
    stop_query: Any
    first_seen: Any
    first_token: Any
    whole_tokens: Any
    whole_slots: Any


class Head(NamedTuple):
    """One head of one sequence.

    Attributes:
        flat, batch, index: its number (int64) among all heads of the tensors, its batch entry, and its number there.
        number, sequence: its number (int64) among the heads of all sequences, and that of its sequence; ``flat`` and
            ``batch`` unless these are packed.
        row: its first row (int64) in the tensors.
        num_tokens: its tokens after the globals; below 0 in an empty sequence.
        length: rows of a head of the tensors.
    """

    flat: Any
    batch: Any
    index: Any
    number: Any
    sequence: Any
    row: Any
    num_tokens: Any
    length: Any


class Keys(NamedTuple):
    """The Rows of keys and of values."""

    k: Any
    v: Any


class Queries(NamedTuple):
    """The Rows of queries and of the gradient of their output, and a pointer to their sums (see :func:`sums_rows`)."""

    q: Any
    dout: Any
    sums_ptr: Any


class QueryTensors(NamedTuple):
    """The arguments of a kernel that :func:`locate_queries` finds a head's Queries in."""

    q_ptr: Any
    dout_ptr: Any
    sums_ptr: Any
    q_strides: Any
    dout_strides: Any
    sums_stride: Any


class KeyTensors(NamedTuple):
    """The arguments of a kernel that :func:`locate_source` finds a head's Source in."""

    k_ptr: Any
    v_ptr: Any
    mask_ptr: Any
    index_ptr: Any
    sparse_k_ptr: Any
    sparse_v_ptr: Any
    scale_log2: Any
    kept_scale: Any
    seed: Any
    threshold: Any
    k_strides: Any
    v_strides: Any
    mask_batch_stride: Any
    mask_stride: Any
    index_stride: Any
    sparse_strides: Any
    num_tokens: Any
    num_slots: Any
    section: Any


class Source(NamedTuple):
    """All that the queries of a head attend to, and by what rule.

    Attributes:
        tokens, slots: Keys of the positions of the sequence, and of the slots; the same where slots are positions.
        mask: the Mask of the batch entry.
        index_ptr: the head's slots in ``index`` (batch, heads, slots) int32, which not every sparsity has: a slot's
            token for "indexed"; below 0 for a slot that is not kept.
        head: the number of the head that "stride" and "block_stride" choose by.
        num_tokens, num_slots: how many tokens and slots the head has, without slots that lie past the sequence.
        generator: the Generator of dropout.
        scale_log2, kept_scale: factors of scores, as exponents of two, and of the probabilities that dropout keeps.
        section: the Section, or 0 where the sequence is whole.
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
    section: Any


@triton.jit
def locate_head(programs, x, NUM_GLOBALS: tl.constexpr):
    """The Head of this program in a Batch ``x``, and its number among the ``programs`` that each head has."""
    return _head_of(tl.program_id(0), programs, x, NUM_GLOBALS)


@triton.jit
def locate_tile(token_programs, global_programs, sequences, x, NUM_GLOBALS: tl.constexpr):
    """The Head of this program, its number among that head's programs for tokens or for globals, and which of the two.

    Those for tokens come first, of all heads of all ``sequences``: they take longest. Those for globals then fill the
    multiprocessors that have no more of them. ``x``: the Batch.
    """
    num_first = sequences * x.num_heads * token_programs
    is_token = tl.program_id(0) < num_first
    program = tl.program_id(0) - tl.where(is_token, 0, num_first)
    head, program = _head_of(program, tl.where(is_token, token_programs, global_programs), x, NUM_GLOBALS)
    return head, program, is_token


@triton.jit
def _head_of(program, programs, x, NUM_GLOBALS: tl.constexpr):
    number = program // programs  # divided in 32 bits, which takes a few instructions, not dozens
    sequence, index, rest = number // x.num_heads, number % x.num_heads, program % programs
    number = number.to(tl.int64)
    if x.cu_ptr is None:
        return Head(number, sequence, index, number, sequence, 0, x.num_tokens, x.length), rest
    else:
        row = tl.load(x.cu_ptr + sequence).to(tl.int64)
        num_tokens = (tl.load(x.cu_ptr + sequence + 1) - row).to(tl.int32) - NUM_GLOBALS
        return Head(index.to(tl.int64), 0 * index, index, number, sequence, row, num_tokens, x.length), rest


@triton.jit
def lies_past(head, position, NUM_GLOBALS: tl.constexpr):
    """Whether what starts at a position of the head's sequence lies past it: a packed one may be shorter than others.

    All does of one that has fewer rows than globals.
    """
    return (head.num_tokens < 0) | (position >= head.num_tokens + NUM_GLOBALS)


@triton.jit
def parts_of(head, part_size, num_parts, NUM_GLOBALS: tl.constexpr):
    """How many of the parts of a sequence that a head's globals are split into it has."""
    return tl.minimum(num_parts, tl.cdiv(head.num_tokens + NUM_GLOBALS, part_size))


@triton.jit
def key_head_of(head, GROUP: tl.constexpr):
    """The Head of keys that a head of queries reads, which GROUP of these share."""
    return Head(
        head.flat // GROUP, head.batch, head.index // GROUP, head.number // GROUP, head.sequence, head.row,
        head.num_tokens, head.length,
    )  # fmt: skip


@triton.jit
def query_head_of(key_head, member, GROUP: tl.constexpr):
    """The Head of queries that is number ``member`` of the GROUP that read a head of keys."""
    if GROUP == 1:
        return key_head
    else:
        return Head(
            key_head.flat * GROUP + member, key_head.batch, key_head.index * GROUP + member,
            key_head.number * GROUP + member, key_head.sequence, key_head.row, key_head.num_tokens, key_head.length,
        )  # fmt: skip


@triton.jit
def head_rows(ptr, strides, head, WIDE: tl.constexpr):
    """The Rows of one head of a (batch, heads, length, head_dim) tensor."""
    return rows_at(ptr + head.row * strides[2], strides, head.batch, head.index, WIDE)


@triton.jit
def row_of(ptr, head, first):
    """A pointer to the row ``first`` of a head in a (batch, heads, length) tensor."""
    return ptr + head.flat * head.length + head.row + first


@triton.jit
def token_of(head, first, NUM_GLOBALS: tl.constexpr):
    """Where the token ``first`` of a head is in a (batch, heads, tokens) tensor, which has no rows of globals.

    Of packed sequences it has rows of all but one sequence's, which are not used.
    """
    return head.flat * (head.length - NUM_GLOBALS) + head.row + first


@triton.jit
def first_slot_of(head, V: tl.constexpr):
    """The row of a head's first slot among those of all sequences.

    A packed sequence's slots start where no sum over the sequences before it need be known: floor(c / B) + i blocks,
    for its first row c and its number i, is past the last block of each of these.
    """
    if V.packed:
        return (head.row // V.block + head.sequence) * V.step
    else:
        return 0


@triton.jit
def slots_of(head, num_slots, V: tl.constexpr):
    """The number of a head's slots, of ``num_slots`` in the longest sequence."""
    if V.packed:
        return tl.cdiv(tl.maximum(head.num_tokens, 0), V.block) * V.step
    else:
        return num_slots


@triton.jit
def slot_keys(k_ptr, k_strides, v_ptr, v_strides, head, V: tl.constexpr):
    """The Keys of a head's slots in two (batch, heads, slots, head_dim) tensors."""
    first = first_slot_of(head, V)
    return Keys(
        rows_at(k_ptr + first * k_strides[2], k_strides, head.batch, head.index, V.is_wide),
        rows_at(v_ptr + first * v_strides[2], v_strides, head.batch, head.index, V.is_wide),
    )


@triton.jit
def index_of(index_ptr, index_stride, head, V: tl.constexpr):
    """A pointer to a head's slots in ``index`` (batch, heads, slots)."""
    return index_ptr + head.flat * index_stride + first_slot_of(head, V)


@triton.jit
def head_keys(k_ptr, k_strides, v_ptr, v_strides, head, WIDE: tl.constexpr):
    """The Keys of one head, or what else is of keys and of values, in two (batch, heads, length, head_dim) tensors."""
    return Keys(head_rows(k_ptr, k_strides, head, WIDE), head_rows(v_ptr, v_strides, head, WIDE))


@triton.jit
def keys_read_by(k_ptr, k_strides, v_ptr, v_strides, head, V: tl.constexpr):
    """The Keys of the positions of the sequence that a head of queries reads."""
    return head_keys(k_ptr, k_strides, v_ptr, v_strides, key_head_of(head, V.group), V.is_wide)


@triton.jit
def store_keys(keys, first, rows, inside, offs_d, k, v, HEAD_DIM: tl.constexpr):
    """Write tiles (rows, BLOCK_D) to the rows of Keys that are ``inside``, in the tensors' dtype."""
    store_rows(keys.k, first, rows, inside, offs_d, k, HEAD_DIM)
    store_rows(keys.v, first, rows, inside, offs_d, v, HEAD_DIM)


@triton.jit
def locate_source(head, x, V: tl.constexpr):
    """The Source of one head of queries, in KeyTensors ``x``."""
    tokens = keys_read_by(x.k_ptr, x.k_strides, x.v_ptr, x.v_strides, head, V)
    slots = tokens
    if V.sparsity == "compressed":
        slots = slot_keys(x.sparse_k_ptr, x.sparse_strides, x.sparse_v_ptr, x.sparse_strides, head, V)
    mask = mask_of(x.mask_ptr, x.mask_batch_stride, x.mask_stride, head.batch, V)
    index_ptr = _index_if_any(x.index_ptr, x.index_stride, head, V)
    number = head.index + V.first_head
    num_slots = _slots_with_token(slots_of(head, x.num_slots, V), head.num_tokens, number, V)
    # a packed sequence has the draws of a padded batch, a section those of the whole sequence
    section, drawn_tokens, drawn_slots = 0, x.num_tokens, x.num_slots
    if V.sectioned:
        section, drawn_tokens, drawn_slots = x.section, x.section.whole_tokens, x.section.whole_slots
    generator = generator_of(x.seed, x.threshold, head.number, drawn_tokens, drawn_slots, V)
    return Source(
        tokens, slots, mask, index_ptr, number, head.num_tokens, num_slots, generator, x.scale_log2, x.kept_scale,
        section,
    )  # fmt: skip


@triton.jit
def _slots_with_token(num_slots, num_tokens, number, V: tl.constexpr):
    """The number of a head's slots, without those of ``stride`` and ``block_stride`` that lie past the sequence."""
    if V.sparsity == "stride":
        return tl.cdiv(num_tokens - number % V.factor, V.factor)
    elif V.sparsity == "block_stride":
        rest = num_tokens % V.block - number % V.factor * V.step
        return num_tokens // V.block * V.step + tl.minimum(tl.maximum(rest, 0), V.step)
    else:
        return num_slots


@triton.jit
def _index_if_any(index_ptr, index_stride, head, V: tl.constexpr):
    if V.sparsity == "indexed" or V.sparsity == "compressed":
        return index_of(index_ptr, index_stride, head, V)
    else:
        return 0  # a function cannot return the None that index_ptr is


@triton.jit
def first_of_tokens(NUM_GLOBALS: tl.constexpr):
    """The row of a head's sums that is the first token's."""
    return (NUM_GLOBALS + SUMS_PADDED - 1) // SUMS_PADDED * SUMS_PADDED


@triton.jit
def sums_rows(num_tokens, NUM_GLOBALS: tl.constexpr):
    """The rows of a head's ``sums``: of each query, the log-sum-exp in base 2 and the delta.

    First come the globals, then the tokens. After both are rows of no query, +inf and 0, which give a query the
    probability 0: more than any tile has, so that no load of sums needs a mask.
    """
    return first_of_tokens(NUM_GLOBALS) + (tl.cdiv(num_tokens, SUMS_PADDED) + 1) * SUMS_PADDED


@triton.jit
def sums_of(sums_ptr, sums_stride, head, NUM_GLOBALS: tl.constexpr, PACKED: tl.constexpr):
    """A pointer to a head's ``sums``.

    Those of packed sequences start as their slots do, at a multiple of SUMS_PADDED: each has its own rows of no query.
    """
    first = 0
    if PACKED:
        PADDED: tl.constexpr = first_of_tokens(NUM_GLOBALS) // SUMS_PADDED + 2
        first = (head.row // SUMS_PADDED + head.sequence * PADDED) * SUMS_PADDED
    return sums_ptr + 2 * (head.flat * sums_stride + first)


@triton.jit
def locate_queries(head, x, V: tl.constexpr):
    """The Queries of one head, in QueryTensors ``x``."""
    return Queries(
        head_rows(x.q_ptr, x.q_strides, head, V.is_wide),
        head_rows(x.dout_ptr, x.dout_strides, head, V.is_wide),
        sums_of(x.sums_ptr, x.sums_stride, head, V.num_globals, V.packed),
    )
