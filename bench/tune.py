"""python -m bench.tune: tries schedules near the table's row for a shape on this GPU, and prints the best as a row.

The result of the table's row is compared with the block-wise PyTorch code in float32, except with dropout, where that
code draws other numbers. The result of each schedule is compared with the row's; then both are timed, and written to
the run's file at once.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from bench.measure import is_gpu_lost, reason_of
from bench.record import FOLDER, Writer, new_path
from bench.static.meta import meta_call
from bench.timing import Clock, Spread, Step, interleave, ratio, spread
from lsg_attn import SPARSITY_TYPES, LSGPattern, lsg_attention
from lsg_attn.call import Call
from lsg_attn.fused.backward import allocate_gradients, plan_backward
from lsg_attn.fused.forward import launch_forward, plan_forward
from lsg_attn.fused.launch import Launch, run_on
from lsg_attn.fused.results import Saved, allocate, restore, to_save
from lsg_attn.fused.schedules import Schedule, Tuning, backward_schedule, forward_schedule, row_key, target_of
from lsg_attn.testing import assert_close, make_inputs

_ROWS, _WARPS, _STAGES = (16, 256), (4, 8), (1, 4)  # limits of rows and of stages; the warps to try
_PASSES = ("forward", "backward")


class Problem(NamedTuple):
    """What schedules are tried for: a forward or a backward on one shape."""

    pattern: LSGPattern
    shape: tuple[int, int, int, int]  # batch, heads, G+T, head_dim
    dtype: torch.dtype
    dropout_p: float
    is_backward: bool

    def row(self, target: str) -> Schedule:
        """The schedule that the library uses."""
        head_dim, has_dropout = self.shape[3], self.dropout_p > 0
        if self.is_backward:
            return backward_schedule(target, self.dtype, head_dim, has_dropout, self.pattern.causal)
        return forward_schedule(target, self.dtype, head_dim, self.pattern.block_size, has_dropout)

    def schedules(self, target: str) -> list[Schedule]:
        """The row and its neighbours, without those whose rows a forward halves because a block is smaller."""
        most = _ROWS[1] if self.is_backward else max(64, self.pattern.block_size)
        return [x for x in neighbours(self.row(target)) if x.block_m <= most]

    def describe(self) -> str:
        """The problem in a line."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{_PASSES[self.is_backward]} of {tuple(self.shape)} {dtype} {self.pattern.sparsity_type}"

    def call(self, query: Tensor, key: Tensor, value: Tensor) -> Call:
        """The call on these queries, keys and values."""
        seed = torch.tensor(1) if self.dropout_p else None
        return Call(query, key, value, None, seed, (), self.dropout_p, self.shape[3] ** -0.5, self.pattern)


def main(arguments: Sequence[str] | None = None) -> int:
    """Try schedules, print their times and write them to a file.

    Returns:
        0; 1 if the table's row has a wrong result or a schedule made the GPU unusable; 2 if there is no GPU and this is
        no dry run, or if the file exists.
    """
    options = _parse(arguments)
    console = Console(width=110)
    problems = [_problem(options, head_dim, name) for head_dim in options.head_dim for name in options.passes]
    if options.dry_run is not None:
        for problem in problems:
            _print_plan(console, problem, options.dry_run)
        return 0
    if not torch.cuda.is_available():
        console.print("bench.tune: torch finds no GPU; --dry-run TARGET lists what would be tried on one")
        return 2
    try:
        writer = Writer(options.out or new_path("tune"), {**vars(options), "out": None}, "cuda")
    except FileExistsError as error:
        console.print(f"bench.tune: --out: {error.filename} exists already, and runs are not mixed")
        return 2
    end = time.monotonic() + 60 * options.minutes
    context = multiprocessing.get_context("spawn")  # a fork cannot use the GPU
    are_right = []
    with nullcontext() if options.jobs == 1 else context.Pool(options.jobs) as pool:
        for i, problem in enumerate(problems):
            now = time.monotonic()
            until = now + (end - now) / (len(problems) - i)
            are_right.append(_tune(console, writer, problem, options.seconds, until, pool))
    writer.close()
    console.print(f"written to {writer.path}", markup=False)
    return 0 if all(are_right) and not is_gpu_lost() else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--type", default="norm", choices=SPARSITY_TYPES)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--passes", nargs="+", default=["forward"], choices=_PASSES, help="(default: forward)")
    parser.add_argument("--dropout", action="store_true")
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64], help="(default: 64)")
    sizes = {"batch": 1, "heads": 16, "tokens": 16384, "num-global-tokens": 1}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each schedule (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="start no schedule after so many, parted by shapes (default: 60)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="compile in so many processes (default: %(default)s)")
    parser.add_argument("--out", type=Path, help=f"the file to write; by default a new one in {FOLDER}")
    parser.add_argument("--dry-run", metavar="TARGET", help="list the schedules for a GPU such as sm_90, run nothing")
    return parser.parse_args(arguments)


def _problem(options: argparse.Namespace, head_dim: int, name: str) -> Problem:
    pattern = LSGPattern(sparsity_type=options.type, num_global_tokens=options.num_global_tokens)
    shape = options.batch, options.heads, pattern.num_global_tokens + options.tokens, head_dim
    dtype = getattr(torch, options.dtype)
    return Problem(pattern, shape, dtype, 0.1 if options.dropout else 0.0, name == "backward")


def _tune(console: Console, writer: Writer, problem: Problem, seconds: float, until: float, pool: Pool | None) -> bool:
    """Try a problem's schedules until then and print their times. Return whether the table's row is right."""
    try:
        trial = Trial(*problem)
    except Exception as error:  # a wrong result, or a GPU that an earlier schedule made unusable
        what = f"{problem.describe()}: {reason_of(error)}"
        console.print(what, style="red", markup=False)
        writer.write("failures", {"what": what})
        return False
    measured, total = [], len(problem.schedules(trial.target))
    each = _measure(trial, seconds, until, pool)
    # Redrawn by hand: a drawing thread would take time from what is timed.
    for one in track(each, problem.describe(), total, console=console, auto_refresh=False):
        measured.append(one)
        writer.write("schedules", to_record(trial, one))
    _print_measured(console, trial, measured)
    return True


def _measure(trial: Trial, seconds: float, until: float, pool: Pool | None) -> Iterator[Measured]:
    """Time the schedules one after the other until then.

    With processes to compile in, they have two thirds of the time, and what they have not compiled by then is left out.
    Nothing is compiled while a schedule is timed, unless by a process that began before.
    """
    schedules = trial.problem.schedules(trial.target)
    begun = [None if pool is None else pool.apply_async(compile_only, (trial.problem, x)) for x in schedules]
    wait_until = (time.monotonic() + 2 * until) / 3
    for job in begun:
        if job is not None:
            job.wait(max(0.0, wait_until - time.monotonic()))
    for schedule, job in zip(schedules, begun, strict=True):
        if job is not None and not job.ready():
            yield Measured(schedule, failure="not compiled in time")
        elif time.monotonic() > until:
            yield Measured(schedule, failure="the time was over")
        else:
            yield trial.measure(schedule, seconds)
            if is_gpu_lost():
                return


def compile_only(problem: Problem, schedule: Schedule) -> None:
    """Compile a schedule's kernels into Triton's cache on the disk. An error is left to whoever runs them."""
    device = torch.device("cuda")
    x = torch.empty(problem.shape, dtype=problem.dtype, device=device)
    call = problem.call(x, x, x)
    saved = to_save(call, allocate(call)) if problem.is_backward else None
    launches, _ = plan_pass(call, saved, x, target_of(device), schedule)
    for launch in launches:
        launch.kernel.warmup(**launch.arguments, grid=(launch.programs,), **launch.options)


def neighbours(row: Schedule) -> list[Schedule]:
    """The row, then the schedules that differ from it in one or two of rows, columns, warps and stages."""
    (least, most), (fewest, longest) = _ROWS, _STAGES
    sizes = [[x for x in (size, size // 2, size * 2) if least <= x <= most] for size in (row.block_m, row.block_n)]
    stages = [x for x in (row.tuning.num_stages + step for step in (0, -1, 1)) if fewest <= x <= longest]
    every = [Schedule(m, n, Tuning(warps, count)) for m, n, warps, count in itertools.product(*sizes, _WARPS, stages)]
    near = [schedule for schedule in every if 0 < _distance(row, schedule) <= 2]
    return [row, *sorted(near, key=lambda schedule: _distance(row, schedule))]


def _distance(one: Schedule, other: Schedule) -> int:
    return sum(a != b for a, b in zip((*one[:2], *one.tuning), (*other[:2], *other.tuning), strict=True))


class Measured(NamedTuple):
    """A schedule with its time and its ratio to the table's row, or the reason that there are none."""

    schedule: Schedule
    seconds: Spread | None = None
    to_row: Spread | None = None
    failure: str = ""


class Trial:
    """One shape's forward or backward on the current GPU. The arguments are a :class:`Problem`'s."""

    def __init__(
        self, pattern: LSGPattern, shape: tuple[int, int, int, int], dtype: torch.dtype, dropout_p: float,
        is_backward: bool,
    ) -> None:  # fmt: skip
        self.problem = Problem(pattern, shape, dtype, dropout_p, is_backward)
        self.device = torch.device("cuda")
        self.target = target_of(self.device)
        query, key, value, self._dout = (x.to(self.device) for x in make_inputs(*shape, dtype)[:4])
        self.call = self.problem.call(query, key, value)
        self.row = self.problem.row(self.target)
        self._saved = to_save(self.call, launch_forward(self.call)) if is_backward else None
        self._clock = Clock("cuda")
        self._row_step, results = self._prepare(self.row)
        self._row_step()
        self._expected = [x.clone() for x in results]
        if not dropout_p:  # the block-wise code draws dropout in another order
            for x, expected in zip(results, self._blockwise(), strict=True):
                assert_close("the table's row", x, expected)  # within the tolerance of x's dtype

    def measure(self, schedule: Schedule, seconds: float) -> Measured:
        """Compile, check and time a schedule; one that does not compile or has another result is not timed."""
        try:
            step, results = self._prepare(schedule)
            for x in results:
                x.fill_(float("nan"))
            step()
            for x, expected in zip(results, self._expected, strict=True):
                assert_close("result", x, expected)
        except Exception as error:  # too much shared memory, a limit of the compiler, a wrong result
            return Measured(schedule, failure=reason_of(error))
        times = interleave({"row": self._row_step, "this": step}, self._clock, seconds, least=5)
        return Measured(schedule, spread(times["this"]), ratio(times["this"], times["row"]))

    def _prepare(self, schedule: Schedule) -> tuple[Step, tuple[Tensor, ...]]:
        """A function that runs the pass once, and the tensors that it writes."""
        launches, written = plan_pass(self.call, self._saved, self._dout, self.target, schedule)
        return lambda: run_on(self.device, launches), written

    def _blockwise(self) -> tuple[Tensor, ...]:
        """The result of the PyTorch code in float32: out, or the gradients."""
        call = self.call
        has_gradients = self.problem.is_backward
        q, k, v = (x.detach().float().requires_grad_(has_gradients) for x in (call.query, call.key, call.value))
        out = lsg_attention(q, k, v, call.pattern, implementation="torch")
        return torch.autograd.grad(out, (q, k, v), self._dout.float()) if has_gradients else (out,)


def plan_pass(
    call: Call, saved: Saved | None, dout: Tensor, target: str, schedule: Schedule
) -> tuple[list[Launch], tuple[Tensor, ...]]:
    """The launches of a forward or, if something was saved, of its backward; and the tensors that they write."""
    if saved is None:
        results = allocate(call)
        return plan_forward(call, results, target, schedule), (results.out,)
    gradients = allocate_gradients(call)
    return plan_backward(call, restore(call, saved), dout, gradients, target, schedule), gradients


def row_text(schedule: Schedule, head_dim: int, has_dropout: bool, comment: str) -> str:
    """A row to paste into ``lsg_attn/fused/schedules.py``."""
    (m, n, (warps, stages)) = schedule
    return f"    {row_key(head_dim, has_dropout)}: Schedule({m}, {n}, Tuning({warps}, {stages})),  # {comment}"


def _print_measured(console: Console, trial: Trial, measured: Sequence[Measured]) -> None:
    columns = ("rows", "columns", "warps", "stages", "ms", "p20-p80", "to the table's row", "p20-p80")
    table = Table(*columns, title=trial.problem.describe())
    for schedule, seconds, to_row, failure in measured:
        cells = [str(x) for x in (*schedule[:2], *schedule.tuning)]
        if seconds is None or to_row is None:
            table.add_row(*cells, failure)
            continue
        low, high = 1e3 * seconds.p20, 1e3 * seconds.p80
        cells += [f"{1e3 * seconds.median:.3f}", f"{low:.3f}-{high:.3f}"]
        table.add_row(*cells, f"{to_row.median:.3f}", f"{to_row.p20:.3f}-{to_row.p80:.3f}")
    console.print(table)
    best = best_of(measured)
    if best is None:
        console.print(f"keep the row: nothing is faster on {trial.target} in four of five repetitions")
        return
    console.print(f"best on {trial.target}:", highlight=False)
    has_dropout = trial.call.dropout_p > 0
    comment = why_best(best, trial.row, trial.problem.describe(), torch.cuda.get_device_name(), torch.__version__)
    text = row_text(best.schedule, trial.problem.shape[3], has_dropout, comment)
    console.print(text, markup=False, soft_wrap=True)


def best_of(measured: Sequence[Measured]) -> Measured | None:
    """The fastest schedule, if it is faster than the table's row in four of five repetitions."""
    best = min(measured, key=_median_to_row, default=None)
    return None if best is None or best.to_row is None or best.to_row.p80 >= 1 else best


def why_best(best: Measured, row: Schedule, what: str, device: str, version: str) -> str:
    """What a row's comment says of where the row comes from."""
    return (
        f"{device}, torch {version}: {_median_to_row(best):.3f} of the time of {tuple(row[:2])}, {tuple(row.tuning)}, "
        f"{what}"
    )


def _median_to_row(measured: Measured) -> float:
    return float("inf") if measured.to_row is None else measured.to_row.median


def to_record(trial: Trial, measured: Measured) -> dict[str, Any]:
    """A schedule as a line of a run's file."""
    problem, (schedule, seconds, to_row, failure) = trial.problem, measured
    return {
        "target": trial.target,
        "problem": {**problem._asdict(), "pattern": asdict(problem.pattern), "dtype": str(problem.dtype)},
        "row": trial.row,
        "schedule": schedule,
        "seconds": seconds,
        "to_row": to_row,
        "failure": failure,
    }


class Recorded(NamedTuple):
    """A line of a run's file: a schedule that was tried for a problem on a GPU of this target."""

    target: str
    problem: Problem
    row: Schedule
    measured: Measured


def from_record(record: dict[str, Any]) -> Recorded:
    """What :func:`to_record` was given."""
    row, schedule = (Schedule(m, n, Tuning(*tuning)) for m, n, tuning in (record["row"], record["schedule"]))
    seconds, to_row = (None if record[key] is None else Spread(*record[key]) for key in ("seconds", "to_row"))
    told = record["problem"]
    dtype = getattr(torch, told["dtype"].removeprefix("torch."))
    pattern, shape = LSGPattern(**told["pattern"]), tuple(told["shape"])
    problem = Problem(**{**told, "pattern": pattern, "shape": shape, "dtype": dtype})
    return Recorded(record["target"], problem, row, Measured(schedule, seconds, to_row, record["failure"]))


def _print_plan(console: Console, problem: Problem, target: str) -> None:
    """Print the schedules that would be tried, and the programs of their launches."""
    pattern, shape, dtype, dropout_p, is_backward = problem
    call = meta_call(pattern, shape, dtype, has_mask=False, has_dropout=dropout_p > 0)
    saved, dout = to_save(call, allocate(call)) if is_backward else None, torch.empty_like(call.query)
    title = f"{target}, {problem.describe()}: would be tried"
    table = Table("rows", "columns", "warps", "stages", "programs", title=title)
    for schedule in problem.schedules(target):
        launches, _ = plan_pass(call, saved, dout, target, schedule)
        programs = ", ".join(f"{launch.kernel.__name__} {launch.programs}" for launch in launches)
        table.add_row(*(str(x) for x in (*schedule[:2], *schedule.tuning)), programs)
    console.print(table)


if __name__ == "__main__":
    raise SystemExit(main())
