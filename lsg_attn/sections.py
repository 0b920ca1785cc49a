"""How a sequence is shared out over processes: which tokens each has, needs and answers. Arithmetic alone.

Spans are of the tokens after the globals, which every process has.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from .call import Section
from .pattern import LSGPattern


class Span(NamedTuple):
    """Tokens from ``start`` on and before ``stop``."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many there are."""
        return self.stop - self.start

    def common(self, other: Span) -> Span:
        """The tokens that both have; empty, from a place in ``self`` on, if there are none."""
        start = min(max(self.start, other.start), self.stop)
        return Span(start, max(start, min(self.stop, other.stop)))

    def around(self, tokens: int, num_tokens: int, *, right: bool = True) -> Span:
        """The span and so many tokens left and right of it, or left alone, of a sequence of ``num_tokens``."""
        return Span(max(self.start - tokens, 0), min(self.stop + (tokens if right else 0), num_tokens))


class Piece(NamedTuple):
    """What one call of the attention does for a process: the tokens whose keys it has, and whose queries it answers."""

    keys: Span
    queries: Span

    @property
    def lacks_first_query(self) -> bool:
        """Whether it has tokens, of which the first is no query."""
        return self.keys.size > 0 and (self.queries.size == 0 or self.queries.start > self.keys.start)

    def section(self, num_tokens: int, *, has_globals: bool) -> Section:
        """The Section of a call with these keys, in a sequence of ``num_tokens``."""
        first = self.keys.start
        return Section(first, num_tokens, self.queries.start - first, self.queries.stop - first, has_globals)


def shares(num_tokens: int, ranks: int, block_size: int) -> list[Span]:
    """The spans of some processes: as many whole blocks for each, or one more for the first ones; the last is cut.

    If there are fewer blocks than processes, the last processes have empty spans: they hold the globals alone.
    """
    blocks = -(-num_tokens // block_size)
    each, more = divmod(blocks, ranks)
    ends = [min((rank * each + min(rank, more)) * block_size, num_tokens) for rank in range(ranks + 1)]
    return [Span(*ends) for ends in pairwise(ends)]


def spans_of(sizes: Sequence[int], block_size: int) -> list[Span]:
    """The spans of processes that have so many tokens each, in order.

    Raises:
        ValueError: a span that others follow does not consist of whole blocks.
    """
    total = sum(sizes)
    spans, start = [], 0
    for rank, size in enumerate(sizes):
        spans.append(Span(start, start + size))
        start += size
        if start < total and size % block_size:
            raise ValueError(
                f"expected whole blocks of {block_size} tokens on each rank but the last, as shard gives them; "
                f"rank {rank} has {size} tokens of {total}"
            )
    return spans


def pieces_of(pattern: LSGPattern, own: Span, num_tokens: int) -> list[Piece]:
    """What a process with the span ``own`` does: first what needs no token of others, then the rest.

    The first piece has its own keys and the queries of blocks that see none but these, if there are any, and the
    globals' queries. Each other piece has the keys that its queries see, and the globals' queries for nothing.
    """
    halo, right = pattern.halo, not pattern.causal
    start = own.start + (halo if own.start > 0 else 0)
    stop = own.stop - (halo if right and own.stop < num_tokens else 0)
    if start < stop:
        inner, rest = Span(start, stop), [Span(own.start, start), Span(stop, own.stop)]
    else:
        inner, rest = Span(own.start, own.start), [own]
    return [
        Piece(own, inner),
        *(Piece(queries.around(halo, num_tokens, right=right), queries) for queries in rest if queries.size),
    ]


def halo_of(pattern: LSGPattern, own: Span, num_tokens: int) -> tuple[Span, Span]:
    """The tokens of others that a process with the span ``own`` needs, left and right of it."""
    if own.size == 0:
        return Span(own.start, own.start), Span(own.stop, own.stop)
    around = own.around(pattern.halo, num_tokens, right=not pattern.causal)
    return Span(around.start, own.start), Span(own.stop, around.stop)
