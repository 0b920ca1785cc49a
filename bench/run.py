"""python -m bench.run: measures this library and its alternatives on this machine in one run.

The result of each implementation is checked first; if it is wrong, the implementation has no figures. Repetitions are
interleaved (A B C A B C ...). Times are medians; ratios are medians of the ratios within a repetition.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import fresh, peers
from bench.cases import Section, TimedCase, plan, shrink
from bench.flops import BOUNDS
from bench.measure import Result, Verdicts, all_skipped, measure, reason_of
from bench.peak import peak_bytes
from bench.record import FOLDER, Writer, new_path
from bench.table import print_section, print_skipped


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure a plan, print its tables and write its file.

    Returns:
        0; 1 if one of our implementations failed, a peer's result was wrong or a case could not be measured at all; 2
        if there is nothing to measure, the GPU is missing or the file exists.
    """
    options = _parse(arguments)
    console = Console()
    console = console if console.width >= 120 else Console(width=120)  # a pipe has no width of its own
    device = "cpu" if options.dry_run else options.device
    if device == "cuda" and not torch.cuda.is_available():
        console.print("bench.run: --device cuda: torch finds no GPU; --dry-run tries the cases on the CPU")
        return 2
    planned = plan(options.device, options.quick)
    sections = [section for section in planned if options.only in section.title]
    if not sections:
        titles = ", ".join(section.title for section in planned)
        console.print(
            f"bench.run: --only: expected part of a title out of {titles}; got {options.only!r}", markup=False
        )
        return 2
    if options.dry_run:
        sections = shrink(sections)
    kind = f"{options.device}{'-quick' * options.quick}{'-dry-run' * options.dry_run}"
    try:
        writer = Writer(options.out or new_path(kind), {**vars(options), "out": None}, device)
    except FileExistsError as error:
        console.print(f"bench.run: --out: {error.filename} exists already, and runs are not mixed")
        return 2
    console.print(" ".join(f"{name}: {value}." for name, value in writer.run.items()), markup=False)
    # A GPU's plan keeps one process, also where it is tried on the CPU; a CPU's starts one for each case.
    worker = fresh.Worker() if options.device == "cuda" else None
    total = _measure_all(console, writer, sections, options.peers, options.minutes, worker)
    if worker is not None:
        worker.stop()
    writer.close()
    print_skipped(console, total.figures, total.skipped)
    console.print(f"written to {writer.path}", markup=False)
    for failure in total.failures:
        console.print(f"failed: {failure['what']}", style="red", markup=False)
    return 1 if total.failures else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=(__doc__ or "").splitlines()[0])
    default, names = "cuda" if torch.cuda.is_available() else "cpu", ", ".join(peers.NAMES)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="(default here: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few cases and repetitions: a few minutes on two cores")
    parser.add_argument(
        "--peers", nargs="+", choices=peers.NAMES, default=list(peers.NAMES), metavar="PEER", help=f"only {names}"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only sections with this in their title, such as encoder"
    )
    parser.add_argument("--minutes", type=float, help="start no case after so many minutes; by default measure all")
    parser.add_argument("--out", type=Path, help=f"the file to write; by default a new one in {FOLDER}")
    parser.add_argument("--dry-run", action="store_true", help="only try each case, with tiny shapes on the CPU")
    return parser.parse_args(arguments)


def _measure_all(
    console: Console, writer: Writer, sections: Sequence[Section], names: Sequence[str], minutes: float | None,
    worker: fresh.Worker | None,
) -> Result:  # fmt: skip
    total, end = Result(), float("inf") if minutes is None else time.monotonic() + 60 * minutes
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}")
    # Redrawn by hand: a drawing thread would take time from what is measured.
    with Progress(*columns, TimeElapsedColumn(), console=console, auto_refresh=False) as progress:
        task = progress.add_task("", total=sum(len(section.cases) for section in sections))
        for section in sections:
            figures = []
            for case in section.cases:
                progress.update(task, description=f"{section.title}, {case.tokens} tokens", refresh=True)
                if time.monotonic() > end:
                    result = all_skipped(section, case, names, f"the {minutes:g} minutes were over")
                else:
                    result = _measure(section, case, names, total.verdicts, worker)
                for kind in ("figures", "skipped", "failures"):
                    for record in getattr(result, kind):
                        writer.write(kind, record)
                figures += result.figures
                total.figures += result.figures
                total.skipped += result.skipped
                total.failures += result.failures
                total.verdicts |= result.verdicts
                progress.update(task, advance=1, refresh=True)
            print_section(console, section.title, figures)
    return total


def _measure(
    section: Section, case: TimedCase, names: Sequence[str], verdicts: Verdicts, worker: fresh.Worker | None
) -> Result:
    """Times and peaks of a case: in the one worker, or in new processes."""
    try:
        if worker is not None:
            return _measure_in_worker(section, case, names, verdicts, worker)
        result = fresh.call(measure, section, case, names, verdicts)
    except Exception as error:  # the process was killed, for example for lack of memory, or the bound failed
        result = all_skipped(section, case, names, reason_of(error))
        _add_failure(result, f"{section.title}, {case.tokens} tokens")
        return result
    for figure in result.figures:
        if case.tokens in section.memory and figure["peer"] not in BOUNDS:
            try:
                figure["peak_bytes"] = peak_bytes(figure["peer"], case)
            except Exception:
                _add_failure(result, f"{section.title}, {case.tokens} tokens: the peak memory of {figure['peer']}")
    return result


def _measure_in_worker(
    section: Section, case: TimedCase, names: Sequence[str], verdicts: Verdicts, worker: fresh.Worker
) -> Result:
    """Times and peaks of a case. A peer that makes the GPU unusable is left out, and the others start again."""
    result = worker.call(measure, section, case, names, verdicts)
    if not result.is_gpu_lost:
        return result
    worker.stop()
    left = [name for name in names if name not in {record["peer"] for record in result.skipped}]
    again = _measure_in_worker(section, case, left, result.verdicts, worker)
    return replace(again, skipped=result.skipped + again.skipped, failures=result.failures + again.failures)


def _add_failure(result: Result, what: str) -> None:
    result.failures.append({"what": what, "traceback": traceback.format_exc()})


if __name__ == "__main__":
    raise SystemExit(main())
