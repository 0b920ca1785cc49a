"""The files of results: one JSON object per line, the run first, then a row for each setting as it comes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.record import describe_run, records

FOLDER = Path(__file__).parent.parent / "results/quality"
ROW = "row"
_SAME = ("device", "threads", "python", "lsg_attn", "versions", "arguments")  # what rows of one file share


class Results:
    """A file that rows are added to; a run that was stopped goes on where it was.

    Args:
        path: the file. If it exists, its rows are kept, but for a last line that is not whole.
        arguments: what the rows depend on beside machine and versions.

    Raises:
        ValueError: the file is that of another machine, other versions or other arguments.
    """

    def __init__(self, path: Path, arguments: dict[str, Any]) -> None:
        run = json.loads(json.dumps(describe_run(arguments, "cpu")))
        rows = []
        if path.exists():
            old, rows = read_run(path), list(read_rows(path))
            for name in _SAME:
                if old[name] != run[name]:
                    raise ValueError(f"{path}: expected rows with {name} {run[name]}, got {old[name]}; delete the file")
            run = old
        path.parent.mkdir(parents=True, exist_ok=True)
        self.labels = {row["label"] for row in rows}
        self._file = path.open("w", encoding="utf-8", buffering=1)
        self._write({"kind": "run", **run})
        for row in rows:
            self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        """Write a row; its ``label`` says what it is of."""
        self._write({"kind": ROW, **row})
        self.labels.add(row["label"])

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_run(path: Path) -> dict[str, Any]:
    """What a file says of its run.

    Raises:
        ValueError: it is not the file of one run.
    """
    runs = list(records(path, "run"))
    if len(runs) != 1:
        raise ValueError(f"{path}: expected the file of one run, got {len(runs)} records of kind 'run'")
    return runs[0]


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, in order."""
    yield from records(path, ROW)
