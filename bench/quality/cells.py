"""How figures are written in the page's tables and sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from bench.quality.figures import Figures, difference
from bench.quality.intervals import Floats, Interval, interval


def figure(figures: Floats) -> str:
    """A figure and its interval."""
    value, low, high = interval(figures)
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


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
    """The shares of probability that are seen, and seen or averaged: means over rows."""
    found = [row for row in map(figures.kept, labels) if row]
    return [f"{100 * np.mean([row[name] for row in found]):.0f} %" if found else "" for name in ("seen", "covered")]


def cost(figures: Figures, labels: Sequence[str]) -> list[str]:
    """Speed and mebibytes: means over rows."""
    found = [row for row in map(figures.cost, labels) if row]
    peaks = [row["peak_bytes"] for row in found if row["peak_bytes"]]
    speed = f"{np.mean([row['ratio'][0] for row in found]):.2f}" if found else ""
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
