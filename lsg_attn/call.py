"""Call: the checked request that every implementation answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from .masking import full_mask
from .pattern import LSGPattern
from .sparsity import RULES, CompressionRule


class Section(NamedTuple):
    """Where a call lies in a longer sequence: it has the globals and some of its blocks, whole ones but for the last.

    The call's tokens around its queries must be all that these see. Where its first token is no query, the row of that
    has the query of the sequence's first token, which ``bos_pooling`` weights by.

    Attributes:
        first_token: the number of the call's first token in the sequence.
        num_tokens: T of the sequence.
        start, stop: tokens [start, stop) of the call are queries, those of some whole blocks. So are the globals, which
            see the tokens of the call. In other rows the output and its log-sum-exp hold nothing of use, gradients of
            them are not looked at, and the query's is 0.
        has_globals: whether the globals' queries see their keys: of the sections of a sequence, those of one do.
    """

    first_token: int
    num_tokens: int
    start: int
    stop: int
    has_globals: bool


@dataclass(frozen=True)
class Call:
    """The checked arguments of one call. Tensors may be on the meta device, to plan and compile without a GPU.

    Attributes:
        query: (batch, heads, G+T, head_dim).
        key, value: (batch, key heads, G+T, head_dim); head h of the query reads key head h // (heads / key heads).
        attention_mask: (batch, T) or (batch, G+T), nonzero for a token; or None.
        seed: of dropout's draws, an int64 scalar on the CPU; None without dropout. The reference draws from PyTorch's
            generator instead.
        projections: the directions of each ``lsh`` round, (heads, head_dim, buckets // 2); empty for those that
            follow from the pattern's seed.
        dropout_p: the probability that an attention probability is zeroed.
        scale: of the scores.
        pattern: who sees whom.
        first_head: the number that the first head has for ``stride`` and ``block_stride``, whose choice depends on it.
        cu_seqlens: (n + 1,) int32 or int64, where the n sequences of a packed call start and the last one stops: the
            batch is 1, and the length that of all together. None of others.
        max_seqlen: of a packed call, a length that no sequence exceeds; else 0.
        section: where the call lies in a longer sequence, or None where it is the whole one.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attention_mask: Tensor | None
    seed: Tensor | None
    projections: tuple[Tensor, ...]
    dropout_p: float
    scale: float
    pattern: LSGPattern
    first_head: int = 0
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    section: Section | None = None

    @cached_property
    def num_tokens(self) -> int:
        """T, of a packed call that of the longest sequence."""
        if self.cu_seqlens is None:
            return self.query.shape[2] - self.pattern.num_global_tokens
        return max(self.max_seqlen - self.pattern.num_global_tokens, 0)

    @property
    def num_sequences(self) -> int:
        """The batch, or how many sequences are packed."""
        return int(self.query.shape[0]) if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    @cached_property
    def num_slots(self) -> int:
        """Compressed keys of each head, of a packed call those of the longest sequence."""
        return self.pattern.num_slots(self.num_tokens)

    @cached_property
    def rule(self) -> CompressionRule:
        """The compression that takes place, that of ``"none"`` where there are no slots."""
        return self.pattern.rule if self.num_slots else RULES["none"]

    def keep(self) -> Tensor:
        """The mask as (batch, G+T) bool, true for a token."""
        return full_mask(self.attention_mask, self.query)

    def seed_value(self) -> int:
        """The seed as an int, 0 without dropout. It is on the CPU, so this waits for no device."""
        return 0 if self.seed is None else int(self.seed)
