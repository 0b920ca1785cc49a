"""`python -m bench.static`: compile the kernels for GPUs that are not here, and read the binaries.

It compiles every variant that dispatch can choose, and reports registers, spills, shared memory, tensor-core
instructions and occupancy. It does not measure time. Compiled results are kept in build/static by the kernels' keys.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.static.binary import GPUS
from bench.static.calls import Kernel, PlannedCall, kernels_of, planned_calls
from bench.static.figures import Figures, compile_and_read
from bench.static.key import source_of
from bench.static.rows import HEADINGS, Row, faults, read_rows, summarize, to_markdown, write_rows
from bench.static.stage import stage_of

T = TypeVar("T")
_CACHE = Path(__file__).parents[2] / "build/static"


def figures_of(key: str, kernel: Kernel) -> Figures | str:
    """The figures of the kernel with this key, from the cache if it has them; or the error if it does not compile."""
    path = _CACHE / f"{key}.json"
    if path.exists():
        return Figures(**json.loads(path.read_text(encoding="utf-8")))
    launch = kernel.launch
    try:
        figures = compile_and_read(source_of(launch), kernel.label.target, launch.options)
    except Exception as error:  # whatever a backend raises is a result of this bench
        return f"{kernel.label}: {type(error).__name__}: {error}".strip()
    _CACHE.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(figures)), encoding="utf-8")
    return figures


def compile_all(
    calls: Iterable[PlannedCall], jobs: int, known: Sequence[Row] | None = None
) -> tuple[list[Row], list[str]]:
    """Every kernel of the calls, once; and the errors of those that do not compile.

    ``known``: rows of kernels that need not be compiled again; None where nothing is kept, stages neither.
    """
    kernels = kernels_of(calls)
    by_key = {row.key: row for row in known or ()}
    by_stage = {row.stage: row.figures for row in known or ()}
    missing = [key for key in kernels if key not in by_key]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        stages = {key: row.stage for key, row in by_key.items()}
        if known is not None:
            digests = pool.map(stage_of, (kernels[key] for key in missing))
            stages |= zip(missing, _tracked(digests, "first stage", len(missing)), strict=True)
        missing = [key for key in missing if stages.get(key) not in by_stage]
        outcomes = pool.map(figures_of, missing, (kernels[key] for key in missing))
        compiled = dict(zip(missing, _tracked(outcomes, "compiling", len(missing)), strict=True))
    rows, errors = [], []
    for key, kernel in kernels.items():
        stage = stages.get(key, "")
        outcome = by_key[key].figures if key in by_key else compiled[key] if key in compiled else by_stage[stage]
        if isinstance(outcome, str):
            errors.append(outcome)
        else:
            tuning = kernel.launch.tuning
            rows.append(Row(kernel.label, outcome, tuning.num_warps, tuning.num_stages, triton.__version__, key, stage))
    return rows, errors


def _tracked(results: Iterable[T], what: str, count: int) -> list[T]:
    """The results, as they come under a bar in a terminal."""
    console = Console(stderr=True)
    return list(track(results, what, count, console=console, disable=not console.is_terminal))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench; the status is 1 if a kernel does not compile or has a fault."""
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__)
    parser.add_argument("--target", nargs="+", choices=GPUS, default=list(GPUS), help="GPUs (default: all)")
    parser.add_argument("--subset", choices=("quick", "ci", "all"), default="all", help="which variants (default: all)")
    parser.add_argument(
        "--csv",
        type=Path,
        help="bring the rows in this file up to date, and the summary beside it (.md); rows of unchanged kernels, and "
        "of those that come to the same after the first stage, are taken from the file, not compiled",
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (default: %(default)s)")
    options = parser.parse_args(arguments)
    known = None
    if options.csv:
        known = read_rows(options.csv) if options.csv.exists() else []
    rows, errors = compile_all(planned_calls(options.subset, options.target), options.jobs, known)
    table = Table(*HEADINGS)
    for summary in summarize(rows):
        table.add_row(*map(str, summary))
    Console(width=140).print(table)
    for row in rows:
        errors += faults(row)
    for error in errors:
        print(error, file=sys.stderr)
    print(f"{len(rows)} kernels, {len(errors)} faults")
    if options.csv:
        write_rows(options.csv, rows)
        options.csv.with_suffix(".md").write_text(to_markdown(rows, options.csv.name), encoding="utf-8")
    return 1 if errors else 0
