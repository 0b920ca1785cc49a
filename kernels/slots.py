"""The way back from slots to the tokens that they were made of."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .heads import slot_keys, token_of
from .primitives import is_kept, load_rows

# Slots whose tokens are looked up at once.
_LOOKED_UP = tl.constexpr(64)


class SlotGradients(NamedTuple):
    """The arguments of a kernel that have the gradients of slots, and the tokens' weights and slots where stored."""

    k_ptr: Any
    v_ptr: Any
    strides: Any
    weight_ptr: Any
    slot_ptr: Any


@triton.jit
def _slots_of(tokens, first, last, source, slot_ptr, first_token, V: tl.constexpr):
    """The slot of each of ``tokens``, of which those in the sequence are within [first, last]; -1 where it has none.

    ``first_token``: where those of a head start in ``slot`` (batch, heads, T) int32, if they are stored.
    """
    if V.sparsity == "stride":
        return tl.where(tokens % V.factor == source.head % V.factor, tokens // V.factor, -1)
    elif V.sparsity == "block_stride":
        offset = (tokens % V.block + V.block - source.head * V.step % V.block) % V.block
        return tl.where(offset < V.step, tokens // V.block * V.step + offset, -1)
    elif V.sparsity == "compressed":
        if slot_ptr is None:
            return tokens // V.factor
        else:
            return tl.load(slot_ptr + first_token + tokens, mask=tokens < source.num_tokens, other=-1)
    else:  # the slots of the tokens' chunks say which tokens they have
        CHOSEN: tl.constexpr = V.chunk // V.factor
        slots = tl.full(tokens.shape, -1, tl.int32)
        stop = tl.minimum((last // V.chunk + 1) * CHOSEN, source.num_slots)
        for start in tl.range(first // V.chunk * CHOSEN, stop, _LOOKED_UP):
            offs_n = start + tl.arange(0, _LOOKED_UP)
            chosen = tl.load(source.index_ptr + offs_n, mask=offs_n < stop, other=-1)
            found = tl.where(chosen[None, :] == tokens[:, None], offs_n[None, :], -1)
            slots = tl.maximum(slots, tl.max(found, 1))
        return slots


@triton.jit
def add_slots(
    dk, dv, first_row, head, source, x, V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Add the gradients of a head's slots to those of the BLOCK_M tokens that they were made of, each by its weight.

    ``x``: SlotGradients.
    """
    offs_n, offs_d = first_row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    kept = is_kept(source.mask, V.num_globals, offs_n, offs_n < source.num_tokens, V)
    last = tl.minimum(first_row + BLOCK_M, source.num_tokens) - 1
    first_token = token_of(head, 0, V.num_globals)
    slots = _slots_of(offs_n, first_row, last, source, x.slot_ptr, first_token, V)
    kept = kept & (slots >= 0)
    weight = 1.0
    if V.sparsity == "compressed":
        weight = tl.load(x.weight_ptr + first_token + offs_n, mask=kept, other=0.0)[:, None]
    dslots = slot_keys(x.k_ptr, x.strides, x.v_ptr, x.strides, head, V)
    dk += weight * load_rows(dslots.k, 0, slots, kept, offs_d, V.head_dim)
    dv += weight * load_rows(dslots.v, 0, slots, kept, offs_d, V.head_dim)
    return dk, dv
