"""The picture: quality against speed, both relative to the plain model in pieces; a mark for a type and block size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.quality.figures import Figures, difference
from bench.quality.retrieval import FIRST_PIECE, PIECES
from bench.quality.settings import BLOCKS, DENSE, TYPES, Setting, grid

_COLORS = {
    "norm": "#d62728",
    "pooling": "#1f77b4",
    "bos_pooling": "#17becf",
    "stride": "#2ca02c",
    "block_stride": "#bcbd22",
    "lsh": "#9467bd",
    "none": "#7f7f7f",
}
_MARKERS = {32: "v", 64: "s", 128: "o", 256: "^"}
_SIZES = {2: 7, 4: 13, 8: 21, 16: 31}  # of the dots
_LINES = {PIECES: ("-", "mean of pieces"), FIRST_PIECE: ("--", "first 512 tokens"), DENSE.label: (":", "dense")}


def draw(figures: Figures, path: Path) -> None:
    """Write the picture.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: a row has no time.
    """
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(7.2, 6.4), layout="constrained")
    axis = canvas.subplots()
    for name in (*TYPES, "none"):
        for block in BLOCKS:
            group = [x for x in grid() if (x.sparsity_type, x.block_size) == (name, block)]
            _mark(axis, figures, group)
    for label, (style, text) in _LINES.items():
        height = difference(figures.score(label), figures.score(PIECES)).value
        axis.axhline(height, color="#333333", linewidth=1.4, linestyle=style, zorder=1)
        axis.annotate(text, (1.0, height), (-4, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                      ha="right", fontsize=11, color="#333333")  # fmt: skip
    axis.set_xlabel("speed: time of the plain model in pieces / time", fontsize=13)
    axis.set_ylabel("quality: score, against the mean of pieces", fontsize=13)
    axis.tick_params(labelsize=12)
    axis.grid(alpha=0.25)
    _legend(canvas)
    canvas.savefig(path, dpi=130)


def speed(figures: Figures, setting: Setting) -> float:
    """The time of the plain model in pieces over the setting's.

    Raises:
        ValueError: it was not measured.
    """
    cost = figures.cost(setting.label)
    if cost is None:
        raise ValueError(f"expected a time of {setting.label!r}, got none; run python -m bench.quality --only cost")
    return float(cost["ratio"][0])


def _mark(axis: Any, figures: Figures, group: list[Setting]) -> None:
    """The mean over factors with its interval, and a dot for each factor."""
    color, marker = _COLORS[group[0].sparsity_type], _MARKERS[group[0].block_size]
    xs = [speed(figures, setting) for setting in group]
    pieces = figures.score(PIECES)
    mean = difference(figures.mean_score(setting.label for setting in group), pieces)
    if len(group) > 1:
        heights = [difference(figures.score(setting.label), pieces).value for setting in group]
        sizes = [_SIZES[setting.sparsity_factor] for setting in group]
        axis.scatter(xs, heights, s=sizes, color=color, alpha=0.5, linewidths=0, zorder=2)
    errors = [[mean.value - mean.low], [mean.high - mean.value]]
    middle = sum(xs) / len(xs)
    axis.errorbar(middle, mean.value, yerr=errors, color=color, alpha=0.3, elinewidth=1.2, zorder=1)
    axis.plot(middle, mean.value, marker=marker, markersize=9, color=color, markeredgecolor="white", zorder=3)


def _legend(canvas: Any) -> None:
    from matplotlib.lines import Line2D

    def handle(label: str, color: str, marker: str) -> Any:
        return Line2D([], [], color=color, marker=marker, markersize=9, linestyle="", label=label)

    handles = [handle(name, color, "o") for name, color in _COLORS.items()]
    handles += [handle(f"B = {block}", "#333333", marker) for block, marker in _MARKERS.items()]
    handles.append(Line2D([], [], color="#333333", marker="o", markersize=4, linestyle="", label="one factor"))
    canvas.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=12, frameon=False, columnspacing=1.2)
