"""lsg-attn pattern: which keys each query sees, drawn as coloured text or, with matplotlib, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from ..compression import Compression, Tokens, compress
from ..pattern import LSGPattern
from ..reference import visible_in_slots, visible_slots, visible_tokens

# name, letter in a terminal, colour of the letter, colour in a picture
KINDS = (
    ("not seen", "·", "bright_black", "#ffffff"),
    ("global", "G", "blue", "#3b6fb6"),
    ("local", "L", "dark_orange", "#f2a541"),
    ("sparse", "S", "green", "#3f9b6c"),
    ("padding", "x", "grey50", "#c9c9c9"),
)
NOT_SEEN, GLOBAL, LOCAL, SPARSE, PADDING = range(len(KINDS))


def kinds_of_keys(pattern: LSGPattern, num_tokens: int, num_padding: int = 0, head: int = 0, seed: int = 0) -> Tensor:
    """(G+T, G+T) indices into ``KINDS``: how each query (row) sees each token (column).

    A token is sparse to a query if it has a weight in a compressed key that the query sees. The choices of ``norm`` and
    ``lsh`` depend on the keys, which are drawn at random from ``seed``.

    Args:
        pattern: which keys each query sees.
        num_tokens: T, including padding.
        num_padding: how many of the last tokens are padding.
        head: the head to show, for types whose heads differ.
        seed: of the random queries and keys.

    Raises:
        ValueError: ``num_tokens`` or ``head`` is out of range, or ``num_padding`` is not between 0 and it.
    """
    compression = compressed_keys(pattern, num_tokens, num_padding, head, seed)
    first = pattern.num_global_tokens
    length = first + num_tokens
    kinds = torch.full((length, length), NOT_SEEN)
    kinds[visible_tokens(pattern, length)] = LOCAL
    kinds[:first] = kinds[:, :first] = GLOBAL
    if compression is not None:
        seen = visible_in_slots(visible_slots(pattern, length), compression, head)
        kinds[:, first:][seen] = SPARSE
    kinds[:, length - num_padding :] = PADDING
    return kinds


def compressed_keys(
    pattern: LSGPattern, num_tokens: int, num_padding: int = 0, head: int = 0, seed: int = 0
) -> Compression | None:
    """What :func:`kinds_of_keys` shows of heads 0 to ``head``, or None where no query sees a compressed key.

    The arguments and errors are the same.
    """
    if num_tokens < 1 or head < 0 or not 0 <= num_padding <= num_tokens:
        raise ValueError(
            f"expected num_tokens >= 1, head >= 0 and 0 <= num_padding <= num_tokens, "
            f"got num_tokens={num_tokens}, head={head}, num_padding={num_padding}"
        )
    if pattern.rule.varies_by_head and head >= pattern.sparsity_factor:
        raise ValueError(
            f"head: expected less than sparsity_factor={pattern.sparsity_factor}, as later heads of "
            f"{pattern.sparsity_type} repeat these; got {head}"
        )
    query, key = torch.randn(2, 1, head + 1, num_tokens, 16, generator=torch.Generator().manual_seed(seed))
    keep = torch.arange(num_tokens)[None] < num_tokens - num_padding
    return compress(pattern, Tokens(query, key, keep, 0.25))


def print_pattern(console: Console, pattern: LSGPattern, kinds: Tensor) -> None:
    """Print a row per query and a letter per key."""
    console.print(Text(title(pattern), style="bold"))
    for row in kinds.tolist():
        console.print(Text.assemble(*((KINDS[kind][1], KINDS[kind][2]) for kind in row)), soft_wrap=True)
    console.print(
        Text.assemble(*(part for name, letter, colour, _ in KINDS for part in ((letter, colour), f" {name}  ")))
    )


def save_pattern(path: Path, patterns: Sequence[LSGPattern], kinds: Sequence[Tensor]) -> None:
    """Draw the patterns side by side to a PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = min(len(patterns), 3)
    rows = -(-len(patterns) // columns)
    figure = Figure(figsize=(4.2 * columns, 4.2 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, pattern, matrix in zip(axes, patterns, kinds, strict=False):
        axis.imshow(matrix.numpy(), cmap=ListedColormap([kind[3] for kind in KINDS]), vmin=0, vmax=len(KINDS) - 1)
        axis.set(title=title(pattern), xlabel="key", ylabel="query")
        edges = range(pattern.num_global_tokens, len(matrix), pattern.block_size)
        for edge in edges:
            axis.axhline(edge - 0.5, color="black", linewidth=0.3)
            axis.axvline(edge - 0.5, color="black", linewidth=0.3)
    for axis in axes[len(patterns) :]:
        axis.remove()
    present = sorted({kind for matrix in kinds for kind in matrix.unique().tolist()})
    handles = [Patch(facecolor=KINDS[kind][3], edgecolor="black", label=KINDS[kind][0]) for kind in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.savefig(path, dpi=110)


def title(pattern: LSGPattern) -> str:
    """The pattern's parameters in one line."""
    return f"{pattern.sparsity_type}: {sizes(pattern)}"


def sizes(pattern: LSGPattern) -> str:
    """The pattern's parameters without the type."""
    return (
        f"B={pattern.block_size}, s={pattern.sparse_block_size}, f={pattern.sparsity_factor}, "
        f"G={pattern.num_global_tokens}"
    )
