"""The ways to compress keys: one record each, of all that other modules ask of it. The maps are in compression.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CompressionRule:
    """What tells one way to compress keys from another.

    Attributes:
        name: as :attr:`.pattern.LSGPattern.compression` gives it.
        lookup: how the kernels find a slot's key: ``"none"``, there are no slots; ``"stride"`` and
            ``"block_stride"``, a row of the keys by arithmetic; ``"indexed"``, a row of the keys by index;
            ``"compressed"``, a row of its own.
        is_chunked: it chooses within chunks of min(B, s) tokens.
        is_hashed: it draws random directions, and hashes by them.
        varies_by_head: each head takes other tokens, and at least f heads are needed to take them all.
        saved: which of the kernels' results their backward needs because it is slow to make again.
        has_weight_gradient: the weights depend on queries and keys, and have a gradient.
    """

    name: str
    lookup: Literal["none", "stride", "block_stride", "indexed", "compressed"]
    is_chunked: bool = False
    is_hashed: bool = False
    varies_by_head: bool = False
    saved: Literal["slot_index", "slot"] | None = None
    has_weight_gradient: bool = False


RULES = {
    rule.name: rule
    for rule in (
        CompressionRule("none", "none"),
        CompressionRule("identity", "stride"),  # with a factor of 1, the stride kernel takes every token
        CompressionRule("norm", "indexed", is_chunked=True, saved="slot_index"),
        CompressionRule("pooling", "compressed"),
        CompressionRule("bos_pooling", "compressed", has_weight_gradient=True),
        CompressionRule("stride", "stride", varies_by_head=True),
        CompressionRule("block_stride", "block_stride", varies_by_head=True),
        CompressionRule("lsh", "compressed", is_chunked=True, is_hashed=True, saved="slot"),
    )
}
