"""How figures are written in the page's tables and sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from bench.quality.figures import Figures, difference
from bench.quality.intervals import Floats, Interval, interval


def figure(figures: Floats, digits: int = 2) -> str:
    """A figure and its interval."""
    value, low, high = interval(figures)
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def score(figures: Floats) -> str:
    """A score, whose small differences matter, and its interval."""
    return figure(figures, 3)


def against(left: Floats, right: Floats) -> str:
    """A paired difference and its interval, in bold if it is not zero."""
    gap = difference(left, right)
    return f"**{signed(gap)}**" if gap.is_different else signed(gap)


def signed(gap: Interval) -> str:
    """A difference with signs."""
    return f"{gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})".replace("-", "\N{MINUS SIGN}")


def cosine(found: Interval | None) -> str:
    """A mean cosine; nothing where there is none."""
    return "" if found is None else f"{found.value:.3f}"


def kept(figures: Figures, labels: Sequence[str]) -> list[str]:
    """The shares of probability that are seen, and seen or averaged, and the output's error: means over rows."""
    found = [row for row in map(figures.kept, labels) if row]
    if not found:
        return ["", "", ""]
    seen, covered, error = (np.mean([row[name] for row in found]) for name in ("seen", "covered", "error"))
    return [f"{100 * seen:.0f} %", f"{100 * covered:.0f} %", f"{error:.2f}"]


def cost(figures: Figures, labels: Sequence[str]) -> list[str]:
    """Speed and mebibytes: means over rows; of one row also the 20th and 80th percentiles of its repetitions."""
    found = [row for row in map(figures.cost, labels) if row]
    peaks = [row["peak_bytes"] for row in found if row["peak_bytes"]]
    speed = f"{np.mean([row['ratio'][0] for row in found]):.2f}" if found else ""
    if found and len(labels) == 1:
        _, low, high = found[0]["ratio"]
        speed += f" ({low:.2f} to {high:.2f})"
    return [speed, f"{np.mean(peaks) / 2**20:.0f}" if peaks else ""]


def listed(words: Iterable[object]) -> str:
    """Words with commas and an "and"."""
    *some, last = map(str, words)
    return f"{', '.join(some)} and {last}" if some else last


def table(columns: Sequence[str], rows: dict[str, list[str]]) -> list[str]:
    """A Markdown table whose rows have names."""
    return [
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        *(f"| {' | '.join([name, *cells])} |" for name, cells in rows.items()),
        "",
    ]
