"""What the commands print: the console, progress bars and tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


def make_console() -> Console:
    """The terminal; a pipe has no width of its own and gets 120 columns."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def progress_bar(console: Console) -> Progress:
    """A bar between the name of the current step and the elapsed time."""
    return Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console)


def print_table(console: Console, rows: Sequence[dict[str, str]], title: str | None = None) -> None:
    """Print rows that all have the same keys; the keys are the columns' headings."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


def memory_cell(size: int | None, unit: float, decimals: int) -> str:
    """A number of bytes in a unit of so many bytes, or "n/a" if it is unknown."""
    return "n/a" if size is None else f"{size / unit:.{decimals}f}"
