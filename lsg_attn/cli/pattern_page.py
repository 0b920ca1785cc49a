"""lsg-attn pattern --out PAGE.html: what the page shows, a panel for each pattern."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from ..pattern import LSGPattern
from ..reference import visible_slots
from .draw import KINDS, compressed_keys, kinds_of_keys, title
from .page import write_page


def save_pattern_page(
    path: Path, patterns: Sequence[LSGPattern], num_tokens: int, num_padding: int = 0, head: int = 0
) -> None:
    """Write a page in which a block of queries shows its keys; the arguments are those of :func:`kinds_of_keys`.

    Raises:
        OSError: the file cannot be written.
        ValueError: as in :func:`kinds_of_keys`.
    """
    panels = [_panel(pattern, num_tokens, num_padding, head) for pattern in patterns]
    kinds = [{"name": name, "color": color} for name, _, _, color in KINDS]
    write_page(path, "pattern.html", {"kinds": kinds, "head": head, "panels": panels})


def _panel(pattern: LSGPattern, num_tokens: int, num_padding: int, head: int) -> dict[str, Any]:
    """What one panel shows. All positions count the globals."""
    kinds = kinds_of_keys(pattern, num_tokens, num_padding, head)
    compression = compressed_keys(pattern, num_tokens, num_padding, head)
    first, length = pattern.num_global_tokens, len(kinds)
    slots = visible_slots(pattern, length)
    members: list[list[int]] = []
    if compression is not None:
        slot, weight = compression.slot[0, head], compression.weight[0, head]
        slots &= compression.keep[0, head]
        members = [_where((slot == n) & (weight > 0), first) for n in range(slots.shape[1])]
    edges = sorted({0, *range(first, length, pattern.block_size), length})
    blocks = [
        {"start": start, "stop": stop, "runs": _runs(kinds[start]), "compressed": _where(slots[start])}
        for start, stop in pairwise(edges)  # the queries of a block see alike
    ]
    return {"title": title(pattern), "globals": first, "length": length, "blocks": blocks, "members": members}


def _runs(row: Tensor) -> list[list[int]]:
    """A row of kinds as [kind, how many keys] from the first key to the last."""
    return [[kind, len(list(keys))] for kind, keys in groupby(row.tolist())]


def _where(mask: Tensor, first: int = 0) -> list[int]:
    """Where a mask (n,) is true, counted from ``first``."""
    where: list[int] = (mask.nonzero().flatten() + first).tolist()
    return where
