"""The tables that a run prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.cases import TimedCase
from lsg_attn import LSGPattern

_LONG_SETUP = 50.0  # milliseconds: a longer setup is printed


def print_section(console: Console, title: str, figures: Sequence[dict[str, Any]]) -> None:
    """Print a line for each case and peer; a ratio is the peer's time over ours."""
    if not figures:
        return
    cases = list(dict.fromkeys(figure["case"] for figure in figures))
    table = Table(title=f"{title}: {common_label(cases)}", title_justify="left", box=box.SIMPLE)
    table.add_column("", no_wrap=True)
    columns = ("ms", "p20-p80", "to ours", "p20-p80", "us/token", "TFLOP/s", "to matmul", "peak MiB")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for case in cases:
        table.add_row(f"[bold]{case_label(case, cases)}[/bold]")
        for figure in figures:
            if figure["case"] == case:
                table.add_row(f"  {figure['peer']}", *_cells(figure))
        table.add_section()
    console.print(table)
    for figure in figures:
        if (setup := figure.get("setup_ms", 0)) > _LONG_SETUP:
            where = case_label(figure["case"], cases)
            compiled = " with their compilation" * (figure["case"].device == "cuda")
            console.print(f"{figure['peer']}, {where}: {digits(setup)} ms apart for masks{compiled}, once for a shape")


def _cells(figure: dict[str, Any]) -> list[str]:
    ratios, peak = figure["ratio"], figure.get("peak_bytes")
    return [
        digits(figure["ms"][0]),
        f"{digits(figure['ms'][1])}-{digits(figure['ms'][2])}",
        *(["", ""] if ratios is None else [f"{ratios[0]:.2f}", f"{ratios[1]:.2f}-{ratios[2]:.2f}"]),
        digits(figure["us_per_token"]),
        digits(figure["tflops"]),
        f"{figure['over_matmul'][0]:.2f}",
        "" if peak is None else f"{peak / 2**20:.0f}",
    ]


def print_skipped(console: Console, figures: Sequence[dict[str, Any]], skipped: Sequence[dict[str, Any]]) -> None:
    """Print the peers that ran, and what each of the others did not run and why."""
    ran = dict.fromkeys(figure["peer"] for figure in figures)
    console.print(f"ran: {', '.join(ran) or 'nothing'}")
    reasons: dict[tuple[str, str], dict[str, list[TimedCase]]] = {}
    for record in skipped:
        sections = reasons.setdefault((record["peer"], record["reason"]), {})
        sections.setdefault(record["section"], []).append(record["case"])
    for (peer, reason), sections in reasons.items():
        console.print(f"skipped: {peer}: {reason}", markup=False, soft_wrap=True)
        for section, cases in sections.items():
            labels = ", ".join(case_label(case, cases) for case in cases)
            console.print(f"    {section}: {labels}", markup=False, soft_wrap=True)


def case_label(case: TimedCase, among: Sequence[TimedCase]) -> str:
    """What distinguishes a case from others."""
    parts = [f"{case.tokens} tokens"] if len({other.tokens for other in among}) > 1 else []
    if len({other.pattern for other in among}) > 1:
        parts.append(pattern_label(case.pattern))
    if len({other.dtype_name for other in among}) > 1:
        parts.append(case.dtype_name)
    return ", ".join(parts) or f"{case.tokens} tokens"


def common_label(cases: Sequence[TimedCase]) -> str:
    """What the cases of a section have in common."""
    case = cases[0]
    size = case.size
    shape = f"{size.heads} heads x {size.head_dim}"
    if case.level == "encoder":
        shape = f"{size.layers} layers x {size.width}, {size.heads} heads"
    parts = [f"batch {case.batch}", shape]
    if len({other.tokens for other in cases}) == 1:
        parts.append(f"{case.tokens} tokens")
    if len({other.pattern for other in cases}) == 1:
        parts.append(pattern_label(case.pattern))
    if len({other.dtype_name for other in cases}) == 1:
        parts.append(case.dtype_name)
    return ", ".join(parts)


def digits(x: float) -> str:
    """Three significant digits, and all digits before the point."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def pattern_label(pattern: LSGPattern) -> str:
    """Sparsity type, sizes of local and sparse blocks, and factor."""
    if not pattern.has_sparse:
        return f"none {pattern.block_size}/0"
    return f"{pattern.sparsity_type} {pattern.block_size}/{pattern.sparse_block_size} f={pattern.sparsity_factor}"
