"""Variant: what the kernels of a call are compiled for."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..call import Call


class Variant(NamedTuple):
    """What kernels are compiled for besides dtypes and tiles; each value is a kernel of its own.

    Attributes:
        sparsity: how a slot's key is found, the ``lookup`` of a :class:`..sparsity.CompressionRule`.
        num_globals, block, step, reach, factor, chunk: G, B, B // f, s, f and min(B, s) of the pattern.
        head_dim: elements of a row; tiles are padded to a power of two.
        has_mask, mask_first: whether there is a mask, and the position of its first column, 0 or G.
        has_dropout: whether probabilities are dropped.
        causal: whether a token sees no later token.
        group: how many heads of queries read one of keys.
        first_head: what the first head counts as, modulo f, where heads choose other tokens; else 0.
        is_wide: whether an offset within a head of a tensor may pass 2^31.
        packed: whether sequences are rows of the tensors, one after the other.
        sectioned: whether the sequence is a section of a longer one.
    """

    sparsity: str
    num_globals: int
    block: int
    step: int
    reach: int
    factor: int
    chunk: int
    head_dim: int
    has_mask: bool
    mask_first: int
    has_dropout: bool
    causal: bool
    group: int
    first_head: int
    is_wide: bool
    packed: bool
    sectioned: bool


# Blocks of this many tokens and reaches of this many slots are longer than any sequence, and what is added to them, not
# multiplied by them, stays below 2^31.
_FAR = 1 << 29
_INT32 = 1 << 31


def variant_of(call: Call, *others: Tensor) -> Variant:
    """What the kernels of ``call``, which may read ``others`` too, are compiled for."""
    pattern, mask = call.pattern, call.attention_mask
    sparse = call.num_slots > 0
    return Variant(
        sparsity=call.rule.lookup,
        num_globals=pattern.num_global_tokens,
        block=min(pattern.block_size, _FAR),
        step=pattern.step if sparse else 0,
        reach=min(pattern.sparse_block_size, _FAR) if sparse else 0,
        factor=pattern.sparsity_factor if sparse else 0,
        chunk=min(pattern.chunk, _FAR) if sparse else 0,
        head_dim=call.query.shape[3],
        has_mask=mask is not None,
        mask_first=call.query.shape[2] - mask.shape[1] if mask is not None else 0,
        has_dropout=call.dropout_p > 0,
        causal=pattern.causal,
        group=call.query.shape[1] // call.key.shape[1],
        first_head=call.first_head % pattern.sparsity_factor if call.rule.varies_by_head else 0,
        is_wide=_is_wide(call, others),
        packed=call.cu_seqlens is not None,
        sectioned=call.section is not None,
    )


def without_scores(variant: Variant) -> Variant:
    """The variant of a kernel that looks at keys but has no scores: which queries see them does not matter to it."""
    return variant._replace(has_dropout=False, causal=False, sectioned=False)


def _is_wide(call: Call, others: tuple[Tensor, ...]) -> bool:
    """Whether an offset within a head of a tensor that the kernels of ``call`` read or write may pass 2^31."""
    mask, (_, heads, length, head_dim) = call.attention_mask, call.query.shape
    spans = [_span(x) for x in (call.query, call.key, call.value, *others)]  # gradients are laid out as these
    spans.append(heads * length * head_dim)  # out is (batch, G+T, heads, head_dim) in memory
    spans += [] if mask is None else [(mask.shape[1] - 1) * mask.stride(1)]
    return max(spans) >= _INT32


def _span(x: Tensor) -> int:
    """The offset of the last element of a head of ``x`` (batch, heads, length, head_dim) from its first."""
    return sum((size - 1) * stride for size, stride in zip(x.shape[2:], x.stride()[2:], strict=True))
