"""What a rank receives for an attention that ranks share out: as lsg_attn does it, and in three other ways.

Arithmetic of bytes and messages, one rank's. In a collective, each other rank sends one message, as
:class:`lsg_attn.communication.Group` counts them. The other ways are for dense attention on tensors of the same layout,
in which R ranks have n = (G + T) / R rows each; a row of keys and values, both, has k bytes, and one of queries q:

- Ulysses (DeepSpeed-Ulysses, arXiv 2309.14509): all-to-alls of queries, keys, values and outputs, from all heads of
  some rows to some heads of all rows: (R - 1) / R * n * (2 q + k). Backward, their gradients take as much. Each rank
  needs heads of its own, of keys too.
- Ring (Ring Attention, arXiv 2310.01889): the keys and values of all pass through every rank: (R - 1) * n * k. Backward
  they pass again, and their gradients with them, which also have a last step back to where they belong:
  (R - 1) * n * k + R * n * k.
- All-gather of keys and values, kept for the backward: (R - 1) * n * k. Backward, a reduce-scatter of their gradients
  takes as much.

Gradients count in the dtype of the keys; where they are summed in float32, they take more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple, cast

import torch
from rich.console import Console
from rich.table import Table

from lsg_attn import LSGPattern
from lsg_attn.communication import Group
from lsg_attn.sections import Span, shares
from lsg_attn.sharded import Shard

# Bytes per second into one H100 SXM, by the makers' data sheets: NVLink 4 has 900 GB/s, of which half is one direction
# (NVIDIA H100 Tensor Core GPU); a port of InfiniBand NDR, or of Ethernet of that rate, 400 Gb/s (NVIDIA ConnectX-7).
LINKS = {"NVLink 4": 450e9, "400 Gb/s": 50e9}
_HIDDEN = [f"hidden from, {link}" for link in LINKS]
_CAPTION = "hidden from: with so many tokens of its own, a rank's attention takes as long, by the bounds of an H100 SXM"
# The numbers that ranks compare before an attention, besides the pattern's, 8 bytes each.
_NUMBERS = 15

# Microseconds that an attention of so many tokens takes at least, or with True its backward.
Bound = Callable[[int, bool], float]


@dataclass(frozen=True)
class Attention:
    """What the tensors of an attention are like, except for the tokens."""

    pattern: LSGPattern
    batch: int
    heads: int
    key_heads: int
    head_dim: int
    dtype: torch.dtype
    has_mask: bool = False

    def row_bytes(self, heads: int, dtype: torch.dtype | None = None) -> int:
        """The bytes of one position, of so many heads."""
        return self.batch * heads * self.head_dim * (dtype or self.dtype).itemsize


@dataclass(frozen=True)
class Traffic:
    """What a rank receives."""

    received_bytes: int = 0
    messages: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.received_bytes + other.received_bytes, self.messages + other.messages)


class Passes(NamedTuple):
    """The traffic of a forward, and of its backward."""

    forward: Traffic
    backward: Traffic


def context_parallel(attention: Attention, sizes: Sequence[int], rank: int) -> Passes:
    """What lsg_attn's context parallelism brings to a rank, where ranks have so many tokens each."""
    pattern, others = attention.pattern, len(sizes) - 1
    if others == 0:
        return Passes(Traffic(), Traffic())
    shard = Shard(cast(Group, SimpleNamespace(rank=rank)), pattern, sizes)
    keys_and_values = 2 * attention.row_bytes(attention.key_heads)
    mask = attention.batch if attention.has_mask else 0
    agreement = _from_each(others, 8 * (len(vars(pattern)) + _NUMBERS))
    of_globals = _from_each(others, _bytes_of_globals(attention))
    forward = agreement + _halo(shard.receives, keys_and_values + mask) + of_globals
    backward = _halo(shard.sends, keys_and_values) + of_globals
    if pattern.rule.has_weight_gradient and not pattern.is_dense(sum(sizes)):
        query = attention.row_bytes(attention.heads)
        forward += _from_each(min(rank, 1), query)
        backward += _from_each(others, query)
    return Passes(forward, backward)


def _from_each(ranks: int, size: int) -> Traffic:
    return Traffic(ranks * size, ranks if size else 0)


def _halo(spans: dict[int, Span], row_bytes: int) -> Traffic:
    return Traffic(row_bytes * sum(span.size for span in spans.values()), len(spans))


def _bytes_of_globals(attention: Attention) -> int:
    """A rank's part of the globals' outputs and log-sum-exps, or of their gradients."""
    dtype = torch.promote_types(attention.dtype, torch.float32)
    values = attention.batch * attention.heads * attention.pattern.num_global_tokens * (attention.head_dim + 1)
    return values * dtype.itemsize


def ulysses(attention: Attention, rows: int, ranks: int) -> Passes | None:
    """All-to-alls over heads, where each rank has so many rows; None where it has no head."""
    if ranks > min(attention.heads, attention.key_heads):
        return None
    rows_of_others = rows - rows // ranks
    size = rows_of_others * 2 * (attention.row_bytes(attention.heads) + attention.row_bytes(attention.key_heads))
    traffic = Traffic(size, 4 * (ranks - 1))
    return Passes(traffic, traffic)


def ring(attention: Attention, rows: int, ranks: int) -> Passes:
    """Keys and values pass through all ranks, where each has so many rows."""
    forward = _from_each(ranks - 1, rows * 2 * attention.row_bytes(attention.key_heads))
    home = Traffic(forward.received_bytes // (ranks - 1), 1) if ranks > 1 else Traffic()
    return Passes(forward, forward + forward + home)


def all_gather(attention: Attention, rows: int, ranks: int) -> Passes:
    """Each rank gets all keys and values, where each has so many rows."""
    forward = _from_each(ranks - 1, rows * 2 * attention.row_bytes(attention.key_heads))
    return Passes(forward, forward)


def hidden_from(attention: Attention, ranks: int, bound: Bound, rate: float, is_backward: bool) -> int:
    """The fewest tokens of each rank, in whole blocks, from which its exchange takes no longer than its attention.

    Both by lower bounds: the bytes at ``rate`` per second, without latency, and ``bound`` of the rank's own tokens.
    """
    block = attention.pattern.block_size

    def is_hidden(blocks: int) -> bool:
        traffic = context_parallel(attention, [blocks * block] * ranks, ranks // 2)[is_backward]
        return 1e6 * traffic.received_bytes / rate <= bound(blocks * block, is_backward)

    low, high = 0, 1
    while not is_hidden(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_hidden(middle) else (middle, high)
    return high * block


def table_of_context_parallel(
    attentions: Sequence[Attention], tokens: int, counts: Sequence[int], bound_of: Callable[[Attention], Bound]
) -> Table:
    """What the rank in the middle receives, and from how many tokens on its own attention hides that."""
    names = [f"{step}: {what}" for step in ("forward", "backward") for what in ("MB", "messages", *_HIDDEN)]
    title = "context_parallel, received by one rank for one attention: lower bounds from data sheets, not times"
    table = Table("type", "ranks", "tokens of a rank", *names, title=title, caption=_CAPTION)
    table.columns[0].no_wrap = True
    for attention in attentions:
        for ranks in counts:
            sizes = [span.size for span in shares(tokens, ranks, attention.pattern.block_size)]
            cells = []
            for is_backward, traffic in enumerate(context_parallel(attention, sizes, ranks // 2)):
                cells += [_megabytes(traffic), str(traffic.messages)]
                for rate in LINKS.values():
                    cells.append(f"{hidden_from(attention, ranks, bound_of(attention), rate, bool(is_backward)):,}")
            table.add_row(attention.pattern.sparsity_type, str(ranks), f"{sizes[ranks // 2]:,}", *cells)
    return table


def table_of_others(attention: Attention, tokens: int, counts: Sequence[int]) -> Table:
    """What a rank receives of dense attention on the same tensors, by other ways."""
    names = [f"{step}: {what}" for step in ("forward", "backward") for what in ("MB", "messages")]
    table = Table("dense attention by", "ranks", *names, title="dense attention, received by one rank: by formulas")
    ways = {"Ulysses": ulysses, "ring": ring, "all-gather of keys and values": all_gather}
    for name, way in ways.items():
        for ranks in counts:
            found = way(attention, -(-(attention.pattern.num_global_tokens + tokens) // ranks), ranks)
            cells = (
                [cell for x in found for cell in (_megabytes(x), str(x.messages))]
                if found
                else ["more ranks than heads"]
            )
            table.add_row(name, str(ranks), *cells)
    return table


def _megabytes(traffic: Traffic) -> str:
    return f"{traffic.received_bytes / 1e6:,.2f}"


def print_tables(
    attentions: Sequence[Attention], tokens: int, counts: Sequence[int], bound_of: Callable[[Attention], Bound]
) -> None:
    """Print both tables; the second is of the first attention's sizes, which all share."""
    console = Console(width=150)
    console.print(table_of_context_parallel(attentions, tokens, counts, bound_of))
    console.print(table_of_others(attentions[0], tokens, counts))
