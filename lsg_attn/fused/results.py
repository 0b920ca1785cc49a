"""What the kernels of a call write, and what of it a backward needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..call import Call


class Results(NamedTuple):
    """What the kernels of a forward write.

    Slots and T are those of :func:`slot_rows` and :func:`token_rows` where sequences are packed.

    Attributes:
        out: (batch, heads, G+T, head_dim) of query's dtype; (batch, G+T, heads, head_dim) in memory, as an output
            projection wants it.
        lse: (batch, heads, G+T) float32, the natural log-sum-exp of each query's scaled scores; +inf where it saw none.
        slot_index: (batch, heads, slots) int32, the token of each slot (``norm``), or the slot itself (``pooling``,
            ``bos_pooling``, ``lsh``); -1 where it is not kept. Else empty.
        sparse_key, sparse_value: (batch, heads, slots, head_dim), the compressed rows of ``pooling``, ``bos_pooling``
            and ``lsh``. Else empty.
        weight: (batch, heads, T) float32, each token's weight in its slot, for the same types. Else empty.
        slot: (batch, heads, T) int32, each token's slot, for ``lsh``. Else empty.
    """

    out: Tensor
    lse: Tensor
    slot_index: Tensor
    sparse_key: Tensor
    sparse_value: Tensor
    weight: Tensor
    slot: Tensor


class Saved(NamedTuple):
    """The results that a backward needs besides the inputs. What else there is, it makes again.

    Attributes:
        out, lse: as in :class:`Results`.
        choice: the result that took time to choose, the ``saved`` of the pattern's rule. Else empty.
    """

    out: Tensor
    lse: Tensor
    choice: Tensor


def slot_rows(call: Call) -> int:
    """Rows of slots in a head of a call that has slots.

    Of packed sequences, enough that each has its own where ``first_slot_of`` in kernels/heads.py says.
    """
    pattern = call.pattern
    if call.cu_seqlens is None:
        return pattern.num_blocks(call.num_tokens) * pattern.step
    return (call.query.shape[2] // pattern.block_size + call.num_sequences) * pattern.step


def token_rows(call: Call) -> int:
    """Rows of tokens in a head; of packed sequences, with rows of the globals of all but one of them."""
    rows = call.query.shape[2] - call.pattern.num_global_tokens
    return rows if call.cu_seqlens is None else torch.sym_max(rows, 0)


def to_save(call: Call, results: Results) -> Saved:
    """What to keep of the results of ``call``."""
    return Saved(results.out, results.lse, getattr(results, call.pattern.rule.saved or "slot"))


def allocate(call: Call) -> Results:
    """Uninitialised results of ``call``, on its device."""
    return restore(call, allocate_saved(call))


def allocate_saved(call: Call) -> Saved:
    """What is kept of the results of ``call``, uninitialised.

    Its shapes are the same expressions for every length, as a graph for any length needs them: where attention is
    dense, no kernel writes ``choice``.
    """
    batch, heads, length, head_dim = call.query.shape
    saved, new = call.pattern.rule.saved, call.query.new_empty
    chosen = 0 if saved is None else slot_rows(call) if saved == "slot_index" else token_rows(call)
    return Saved(
        out=new(batch, length, heads, head_dim).transpose(1, 2),
        lse=new(batch, heads, length, dtype=torch.float32),
        choice=new(batch, heads, chosen, dtype=torch.int32),
    )


def restore(call: Call, saved: Saved) -> Results:
    """The results of ``call`` that ``saved`` was kept of; the others are uninitialised."""
    batch, heads, _, head_dim = call.query.shape
    saved_as = call.pattern.rule.saved
    slots, tokens = (slot_rows(call), token_rows(call)) if call.rule.lookup == "compressed" else (0, 0)
    new = call.query.new_empty
    return Results(
        out=saved.out,
        lse=saved.lse,
        slot_index=saved.choice if saved_as == "slot_index" else new(batch, heads, slots, dtype=torch.int32),
        sparse_key=new(batch, heads, slots, head_dim),
        sparse_value=new(batch, heads, slots, head_dim),
        weight=new(batch, heads, tokens, dtype=torch.float32),
        slot=saved.choice if saved_as == "slot" else new(batch, heads, 0, dtype=torch.int32),
    )
