"""python -m bench.plot: draws a run's file: time and memory against length, bars of ratios, and a small picture."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import peers
from bench.cases import OURS
from bench.flops import BOUNDS, LARGE, PRODUCTS_ALONE
from bench.record import Run, read

_COLORS = {**peers.COLORS, PRODUCTS_ALONE: "#7f7f7f", LARGE: "#bcbcbc"}
_LINE = 19.0  # pixels from one name at the end of a line to the next
Figure = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the pictures of each run beside its file, or to a given folder."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, nargs="+", help="what bench.run wrote")
    parser.add_argument("--folder", type=Path, help="where to write; by default beside the file")
    options = parser.parse_args(arguments)
    for path in options.file:
        for picture in plot(path, options.folder or path.parent):
            print(picture)


def plot(path: Path, folder: Path) -> list[Path]:
    """Draw a run's file to ``NAME-time.png``, and with ``memory``, ``ratios`` and ``small``, if it has the figures.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    run = read(path)
    where = run.run["device"] if run.run["cuda"] else f"{run.run['device']}, {run.run['threads']} threads"
    note = f"{where}, torch {run.run['versions']['torch']}, transformers {run.run['versions']['transformers']}"
    drawn = {
        "time": _against_length(run, "time, ms", lambda figure: figure["ms"][0], note),
        "memory": _against_length(run, "peak memory of the call, MiB", _mebibytes, note),
        "ratios": _ratios(run, note),
        "small": _small(run, where),
    }
    pictures = []
    for name, figure in drawn.items():
        if figure is not None:
            pictures.append(folder / f"{path.stem}-{name}.png")
            figure.savefig(pictures[-1], dpi=110)
    return pictures


def _small(run: Run, where: str) -> Any:
    """The times of the first section with several lengths, to be read at 400 pixels: few lines, named at their ends."""
    from matplotlib.figure import Figure as Canvas

    panels = _panels(run, lambda figure: figure["ms"][0])
    if not panels:
        return None
    title, lines = next(iter(panels.items()))
    canvas = Canvas(figsize=(5.6, 4.2), layout="constrained")
    axis = canvas.subplots()
    ends = {}
    for peer, line in lines.items():
        if peer not in BOUNDS and len(line) > 2:
            xs, ys = zip(*sorted(line), strict=True)
            axis.plot(xs, ys, marker="o", color=_COLORS[peer], linewidth=3 if peer in OURS else 1.8)
            ends[peer] = (xs[-1], ys[-1])
    if not ends:
        return None
    _scale_by_length(axis, lines)
    axis.tick_params(labelsize=11)
    axis.set_xlabel("tokens", fontsize=12)
    axis.set_ylabel(f"ms, {title}", fontsize=12)
    canvas.draw_without_rendering()  # from here on the layout, and with it the scale of pixels, is known
    top = 0.0  # of the names below, in pixels
    for peer, end in sorted(ends.items(), key=lambda item: item[1][1]):
        y = axis.transData.transform(end)[1]
        top = max(y, top + _LINE)
        axis.annotate(peers.LABELS[peer], end, (8, (top - y) * 72 / canvas.dpi), textcoords="offset points",
                      va="center", color=_COLORS[peer], fontsize=11, annotation_clip=False)  # fmt: skip
    canvas.supxlabel(where, fontsize=9, color="#555555")
    return canvas


def _mebibytes(figure: Figure) -> float | None:
    peak = figure.get("peak_bytes")
    return None if peak is None else peak / 2**20


def _against_length(run: Run, label: str, value: Callable[[Figure], float | None], note: str) -> Any:
    """A panel for each section with several lengths, and in it a line for each peer."""
    from matplotlib.figure import Figure as Canvas

    panels = _panels(run, value)
    if not panels:
        return None
    canvas = Canvas(figsize=(4.6 * len(panels), 4.6), layout="constrained")
    axes = canvas.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for peer, line in lines.items():
            xs, ys = zip(*sorted(line), strict=True)
            style: dict[str, Any] = {"linewidth": 2.6, "zorder": 3} if peer in OURS else {"linewidth": 1.4}
            style["linestyle"] = "--" if peer in BOUNDS else "-"
            axis.plot(xs, ys, marker="o", markersize=4, color=_COLORS[peer], label=peer, **style)
        _scale_by_length(axis, lines)
        axis.set(title=title, xlabel="tokens", ylabel=label)
    _legend(canvas, axes)
    canvas.supxlabel(note, fontsize=8, color="#555555")
    return canvas


def _panels(run: Run, value: Callable[[Figure], float | None]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """The points (length, value) of each peer in each section with several lengths."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for figure in run.figures:
        y = value(figure)
        if y and figure["compares"] == "peers":
            lines = panels.setdefault(figure["section"], {})
            lines.setdefault(figure["peer"], []).append((figure["case"].tokens, y))
    return {title: lines for title, lines in panels.items() if len(_lengths(lines)) > 1}


def _scale_by_length(axis: Any, lines: dict[str, list[tuple[int, float]]]) -> None:
    """Logarithmic scales, with a tick at each length."""
    ticks = _lengths(lines)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(ticks, [f"{x // 1024}k" if x >= 1024 else str(x) for x in ticks])
    axis.grid(alpha=0.3)


def _lengths(lines: dict[str, list[tuple[int, float]]]) -> list[int]:
    return sorted({length for line in lines.values() for length, _ in line})


def _ratios(run: Run, note: str) -> Any:
    """Bars of the time over ours for each section that compares peers, at the length that most figures have."""
    from matplotlib.figure import Figure as Canvas

    groups: dict[str, list[Figure]] = {}
    for figure in run.figures:
        if figure["ratio"] is not None and figure["compares"] == "peers":
            groups.setdefault(figure["section"], []).append(figure)
    if not groups:
        return None
    middle = run.common_length()
    groups = {title: [x for x in figures if x["case"].tokens == middle] for title, figures in groups.items()}
    groups = {title: figures for title, figures in groups.items() if len(figures) > 2}
    if not groups:
        return None
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    canvas = Canvas(figsize=(4.8 * columns, 2.7 * rows + 0.4), layout="constrained")
    axes = canvas.subplots(rows, columns, squeeze=False).flatten()
    for axis, (title, figures) in zip(axes, groups.items(), strict=False):
        figures = [figure for figure in figures if figure["peer"] not in BOUNDS][::-1]
        names = [figure["peer"] for figure in figures]
        middles = [figure["ratio"][0] for figure in figures]
        errors = [[x["ratio"][0] - x["ratio"][1] for x in figures], [x["ratio"][2] - x["ratio"][0] for x in figures]]
        axis.barh(names, middles, xerr=errors, color=[_COLORS[name] for name in names], error_kw={"linewidth": 1})
        for row, figure in enumerate(figures):
            axis.annotate(f"{figure['ratio'][0]:.2f}", (figure["ratio"][2], row), (4, 0), textcoords="offset points",
                          va="center", fontsize=8)  # fmt: skip
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(title=title, xlabel="time over ours")
        axis.margins(x=0.15)
    for axis in axes[len(groups) :]:
        axis.remove()
    canvas.supxlabel(f"{middle} tokens; {note}", fontsize=8, color="#555555")
    return canvas


def _legend(canvas: Any, axes: Sequence[Any]) -> None:
    """Draw one legend for all panels."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    canvas.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=min(len(handles), 6))


if __name__ == "__main__":
    main()
