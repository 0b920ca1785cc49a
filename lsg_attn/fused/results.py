"""What the kernels of a call write, and what of it a backward needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..call import Call


class Results(NamedTuple):
    """What the kernels of a forward write.

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
        choice: the result that took time to choose, the ``saved`` of the call's rule. Else empty.
    """

    out: Tensor
    lse: Tensor
    choice: Tensor


def to_save(call: Call, results: Results) -> Saved:
    """What to keep of the results of ``call``."""
    return Saved(results.out, results.lse, getattr(results, call.rule.saved or "slot"))


def allocate(call: Call) -> Results:
    """Uninitialised results of ``call``, on its device."""
    batch, heads, length, head_dim = call.query.shape
    chosen = {"slot_index": call.num_slots, "slot": call.num_tokens, None: 0}[call.rule.saved]
    new = call.query.new_empty
    saved = Saved(
        out=new(batch, length, heads, head_dim).transpose(1, 2),
        lse=new(batch, heads, length, dtype=torch.float32),
        choice=new(batch, heads, chosen, dtype=torch.int32),
    )
    return restore(call, saved)


def restore(call: Call, saved: Saved) -> Results:
    """The results of ``call`` that ``saved`` was kept of; the others are uninitialised."""
    batch, heads, _, head_dim = call.query.shape
    slots, tokens = (call.num_slots, call.num_tokens) if call.rule.lookup == "compressed" else (0, 0)
    new = call.query.new_empty
    return Results(
        out=saved.out,
        lse=saved.lse,
        slot_index=saved.choice if call.rule.saved == "slot_index" else new(batch, heads, slots, dtype=torch.int32),
        sparse_key=new(batch, heads, slots, head_dim),
        sparse_value=new(batch, heads, slots, head_dim),
        weight=new(batch, heads, tokens, dtype=torch.float32),
        slot=saved.choice if call.rule.saved == "slot" else new(batch, heads, 0, dtype=torch.int32),
    )
