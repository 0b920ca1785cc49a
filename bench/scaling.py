"""python -m bench.scaling: how time grows with length, and from which length LSG is faster than each peer."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench import fresh
from bench.cases import OURS, Section, TimedCase, ours_of
from bench.flops import BOUNDS
from bench.measure import measure
from bench.record import read

_LENGTHS = (512, 1024, 2048, 4096, 8192)
Points = dict[str, dict[int, float]]  # seconds of each peer at each length


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the exponents and crossings of a run's file, or of a few lengths measured now."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", help="what bench.run wrote; by default attention is measured now")
    options = parser.parse_args(arguments)
    sections = _measured() if options.file is None else _of_file(options.file)
    for title, points in sections.items():
        if any(len(line) > 1 for line in points.values()):
            _print(Console(width=100), title, points)


def exponent(line: dict[int, float]) -> float:
    """The slope of log time against log length, by least squares."""
    lengths, seconds = zip(*sorted(line.items()), strict=True)
    return float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0])


def crossing(ours: dict[int, float], other: dict[int, float]) -> str:
    """From which length ours takes less time, interpolated between measured lengths in logarithms."""
    lengths = sorted(set(ours) & set(other))
    gains = [float(np.log(other[length] / ours[length])) for length in lengths]
    slower = [i for i, gain in enumerate(gains) if gain <= 0]
    if not slower:
        return f"at all lengths from {lengths[0]} on"
    last = slower[-1]
    if last == len(lengths) - 1:
        return f"not up to {lengths[-1]}"
    weight = gains[last] / (gains[last] - gains[last + 1])
    length = np.exp(np.interp(weight, (0, 1), np.log((lengths[last], lengths[last + 1]))))
    return f"from about {length:.0f} on (measured: {lengths[last]} not, {lengths[last + 1]} yes)"


def _of_file(path: Path) -> dict[str, Points]:
    sections: dict[str, Points] = {}
    for figure in read(path).figures:
        line = sections.setdefault(figure["section"], {}).setdefault(figure["peer"], {})
        line[figure["case"].tokens] = figure["ms"][0] / 1e3
    return sections


def _measured() -> dict[str, Points]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    cases = tuple(TimedCase("attention", "large", tokens, dtype_name=dtype, device=device) for tokens in _LENGTHS)
    section = Section("attention, forward", cases, seconds=2.0)
    points: Points = {}
    for case in cases:
        arguments: tuple[Any, ...] = section, case, (*OURS, "dense"), {}
        result = measure(*arguments) if device == "cuda" else fresh.call(measure, *arguments)
        for figure in result.figures:
            points.setdefault(figure["peer"], {})[case.tokens] = figure["ms"][0] / 1e3
    return {section.title: points}


def _print(console: Console, title: str, points: Points) -> None:
    name_of_ours = ours_of(points)
    table = Table("peer", "lengths", "time grows as length to the", "LSG is faster than it", title=title)
    for name, line in points.items():
        if len(line) < 2:
            continue
        span = f"{min(line)} to {max(line)}"
        told = "" if name_of_ours is None or name in (name_of_ours, *BOUNDS) else crossing(points[name_of_ours], line)
        table.add_row(name, span, f"{exponent(line):.2f}", told)
    console.print(table)


if __name__ == "__main__":
    main()
