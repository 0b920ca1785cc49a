"""One call as the kernels see it: its arguments, its results, and the constexpr that both sides share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .pattern import LSGPattern


@dataclass(frozen=True)
class Call:
    """The checked arguments of one call. Tensors may be on the meta device, to plan and compile without a GPU.

    Attributes:
        query, key, value: (batch, heads, G+T, head_dim).
        attention_mask: (batch, T) or (batch, G+T), nonzero for a token; or None.
        pattern: who sees whom.
        dropout_p, seed: the probability of dropping, and the seed of the draws.
        scale: of the scores, above 0.
        directions: of each ``lsh`` round, (heads, head_dim, buckets // 2) float32, contiguous.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attention_mask: Tensor | None
    pattern: LSGPattern
    dropout_p: float
    seed: int
    scale: float
    directions: tuple[Tensor, ...] = ()

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.query.shape[2] - self.pattern.num_global_tokens

    @property
    def num_slots(self) -> int:
        """Compressed keys of each head."""
        return self.pattern.num_slots(self.num_tokens)

    @property
    def compression(self) -> str:
        """The compression that takes place, ``"none"`` where there are no slots."""
        return self.pattern.compression if self.num_slots else "none"


class Variant(NamedTuple):
    """What kernels are compiled for besides dtypes and tiles; each value is a kernel of its own.

    Attributes:
        sparsity: how a slot's key is found: ``"none"``; ``"stride"`` and ``"block_stride"``, a row of the keys by
            arithmetic; ``"indexed"``, a row of the keys by index; ``"compressed"``, a row of its own.
        num_globals, block, step, reach, factor, chunk: G, B, B // f, s, f and min(B, s) of the pattern.
        head_dim: elements of a row; tiles are padded to a power of two.
        has_mask, mask_first: whether there is a mask, and the position of its first column, 0 or G.
        has_dropout: whether probabilities are dropped.
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


# The Variant.sparsity of each compression.
_SPARSITY = {
    "none": "none",
    "identity": "stride",  # every first token
    "stride": "stride",
    "block_stride": "block_stride",
    "norm": "indexed",
    "pooling": "compressed",
    "bos_pooling": "compressed",
    "lsh": "compressed",
}


# Blocks of this many tokens and reaches of this many slots are longer than any sequence, and what is added to them, not
# multiplied by them, stays below 2^31.
_FAR = 1 << 29


def variant_of(call: Call) -> Variant:
    """What the kernels of ``call`` are compiled for."""
    pattern, mask = call.pattern, call.attention_mask
    sparse = call.num_slots > 0
    return Variant(
        sparsity=_SPARSITY[call.compression],
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
    )


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
        choice: what took time to choose: ``slot_index`` of ``norm``, ``slot`` of ``lsh``. Else empty.
    """

    out: Tensor
    lse: Tensor
    choice: Tensor


def to_save(call: Call, results: Results) -> Saved:
    """What to keep of the results of ``call``."""
    return Saved(results.out, results.lse, results.slot_index if call.compression == "norm" else results.slot)


def allocate(call: Call) -> Results:
    """Uninitialised results of ``call``, on its device."""
    batch, heads, length, head_dim = call.query.shape
    chosen = {"norm": call.num_slots, "lsh": call.num_tokens}.get(call.compression, 0)
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
    is_compressed = _SPARSITY[call.compression] == "compressed"
    slots, tokens = (call.num_slots, call.num_tokens) if is_compressed else (0, 0)
    new = call.query.new_empty
    return Results(
        out=saved.out,
        lse=saved.lse,
        slot_index=saved.choice if call.compression == "norm" else new(batch, heads, slots, dtype=torch.int32),
        sparse_key=new(batch, heads, slots, head_dim),
        sparse_value=new(batch, heads, slots, head_dim),
        weight=new(batch, heads, tokens, dtype=torch.float32),
        slot=saved.choice if call.compression == "lsh" else new(batch, heads, 0, dtype=torch.int32),
    )
