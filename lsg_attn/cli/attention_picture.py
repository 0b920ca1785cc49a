"""lsg-attn attention: the maps of a reading as a PNG, with matplotlib, or as a page of the document's words."""

from __future__ import annotations

from pathlib import Path

from .attention_maps import Map, Reading
from .draw import sizes
from .page import write_page

KEYS = 16  # of each query on a page: its strongest
UNITS = 1000  # a weight of 1 on a page, where weights are whole numbers
_NONE = "#ffffff"
_COLORS = 32  # so few that the file stays small
_FAINTEST = 0.01  # the least weight with a colour of its own, relative to what each key gets where all get the same


def caption(reading: Reading) -> str:
    """What was drawn, in one line."""
    pattern = reading.maps[0].pattern
    read = len(reading.pieces) - pattern.num_global_tokens
    tokens = f"all {read} tokens" if read == reading.total else f"the first {read} of {reading.total} tokens"
    return (
        f"{reading.source}, {tokens}; {reading.model}, layer {reading.layer} of 0 to {reading.num_layers - 1}, "
        f"mean of {reading.num_heads} heads; {sizes(pattern)}"
    )


def save_maps(path: Path, reading: Reading) -> None:
    """Draw a panel for each type to a PNG, with one logarithmic scale of colours. What gets no attention is white.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    columns = min(len(reading.maps), 3)
    rows = -(-len(reading.maps) // columns)
    figure = Figure(figsize=(3.2 * columns + 0.9, 3.2 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    colors = colormaps["viridis"].resampled(_COLORS).with_extremes(bad=_NONE)
    most = max(each.weights.max().item() for each in reading.maps)
    scale = LogNorm(vmin=_FAINTEST / len(reading.pieces), vmax=most, clip=True)
    for axis, (pattern, weights) in zip(axes, reading.maps, strict=False):
        drawn = weights.masked_fill(weights == 0, float("nan")).numpy()
        image = axis.imshow(drawn, cmap=colors, norm=scale, interpolation="nearest")
        axis.set(title=pattern.sparsity_type, xlabel="key", ylabel="query")
        for edge in range(pattern.num_global_tokens, len(weights), pattern.block_size):
            axis.axhline(edge - 0.5, color="black", linewidth=0.3)
            axis.axvline(edge - 0.5, color="black", linewidth=0.3)
    for axis in axes[len(reading.maps) :]:
        axis.remove()
    figure.colorbar(image, ax=axes[: len(reading.maps)].tolist(), label="attention weight (white: none)", shrink=0.6)
    figure.suptitle(caption(reading), fontsize="medium", wrap=True)
    figure.savefig(path, dpi=140)


def save_maps_page(path: Path, reading: Reading) -> None:
    """Write a page of the document's words, of which each shows what it attends to.

    Raises:
        OSError: the file cannot be written.
    """
    write_page(
        path,
        "attention.html",
        {
            "caption": caption(reading),
            "pieces": reading.pieces,
            "special": reading.special,
            "keys": KEYS,
            "units": UNITS,
            "types": [{"name": each.pattern.sparsity_type, "rows": _strongest(each)} for each in reading.maps],
        },
    )


def _strongest(each: Map) -> list[list[int]]:
    """For each query its strongest keys, key and weight by turns, the strongest first; without those of weight 0."""
    top = (each.weights * UNITS).round().int().topk(min(KEYS, len(each.weights)))
    rows: list[list[int]] = []
    for keys, weights in zip(top.indices.tolist(), top.values.tolist(), strict=True):
        rows.append([number for pair in zip(keys, weights, strict=True) if pair[1] for number in pair])
    return rows
