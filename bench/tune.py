"""python -m bench.tune: tries schedules near the table's row for a shape on this GPU, and prints the best as a row.

The result of the table's row is compared with the block-wise PyTorch code in float32, except with dropout, where that
code draws other numbers. The result of each schedule is compared with the row's; then both are timed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from bench.measure import reason_of
from bench.static.meta import meta_call
from bench.timing import Clock, Spread, Step, interleave, ratio, spread
from lsg_attn import SPARSITY_TYPES, LSGPattern, lsg_attention
from lsg_attn.call import Call
from lsg_attn.fused.backward import allocate_gradients, plan_backward
from lsg_attn.fused.forward import launch_forward, plan_forward
from lsg_attn.fused.launch import Launch, run_on
from lsg_attn.fused.results import Saved, allocate, restore, to_save
from lsg_attn.fused.schedules import Schedule, Tuning, backward_schedule, forward_schedule, target_of
from lsg_attn.testing import assert_close, make_inputs

_ROWS, _WARPS, _STAGES = (16, 256), (4, 8), (1, 4)  # limits of rows and of stages; the warps to try


def main(arguments: Sequence[str] | None = None) -> int:
    """Try schedules and print their times; return 2 if there is no GPU and this is no dry run, otherwise 0."""
    options = _parse(arguments)
    console = Console(width=110)
    pattern = LSGPattern(sparsity_type=options.type, num_global_tokens=options.num_global_tokens)
    shape = options.batch, options.heads, pattern.num_global_tokens + options.tokens, options.head_dim
    dtype, dropout_p = getattr(torch, options.dtype), 0.1 if options.dropout else 0.0
    if options.dry_run is not None:
        _print_plan(console, pattern, shape, dtype, options)
        return 0
    if not torch.cuda.is_available():
        console.print("bench.tune: torch finds no GPU; --dry-run TARGET lists what would be tried on one")
        return 2
    trial = Trial(pattern, shape, dtype, dropout_p, options.backward)
    schedules = neighbours(trial.row)
    tried = track(schedules, "tune", auto_refresh=False, console=console)  # no thread draws while a schedule is timed
    measured = [trial.measure(schedule, options.seconds) for schedule in tried]
    _print_measured(console, trial, measured)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--type", default="norm", choices=SPARSITY_TYPES)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--backward", action="store_true", help="tune the backward instead of the forward")
    parser.add_argument("--dropout", action="store_true")
    sizes = {"batch": 1, "heads": 16, "tokens": 16384, "head-dim": 64, "num-global-tokens": 1}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each schedule (default: %(default)s)")
    parser.add_argument("--dry-run", metavar="TARGET", help="list the schedules for a GPU such as sm_90, run nothing")
    return parser.parse_args(arguments)


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
    """One shape's forward or backward on the current GPU."""

    def __init__(
        self, pattern: LSGPattern, shape: tuple[int, int, int, int], dtype: torch.dtype, dropout_p: float,
        is_backward: bool,
    ) -> None:  # fmt: skip
        self.device = torch.device("cuda")
        self.target = target_of(self.device)
        self.is_backward = is_backward
        query, key, value, self._dout = (x.to(self.device) for x in make_inputs(*shape, dtype)[:4])
        seed = torch.tensor(1) if dropout_p else None
        self.call = Call(query, key, value, None, seed, (), dropout_p, shape[3] ** -0.5, pattern)
        self.row = table_row(self.target, pattern, dtype, shape[3], dropout_p > 0, is_backward)
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
        q, k, v = (x.detach().float().requires_grad_(self.is_backward) for x in (call.query, call.key, call.value))
        out = lsg_attention(q, k, v, call.pattern, implementation="torch")
        return torch.autograd.grad(out, (q, k, v), self._dout.float()) if self.is_backward else (out,)


def plan_pass(
    call: Call, saved: Saved | None, dout: Tensor, target: str, schedule: Schedule
) -> tuple[list[Launch], tuple[Tensor, ...]]:
    """The launches of a forward or, if something was saved, of its backward; and the tensors that they write."""
    if saved is None:
        results = allocate(call)
        return plan_forward(call, results, target, schedule), (results.out,)
    gradients = allocate_gradients(call)
    return plan_backward(call, restore(call, saved), dout, gradients, target, schedule), gradients


def table_row(
    target: str, pattern: LSGPattern, dtype: torch.dtype, head_dim: int, has_dropout: bool, is_backward: bool
) -> Schedule:
    """The schedule that the library uses."""
    if is_backward:
        return backward_schedule(target, dtype, head_dim, has_dropout)
    return forward_schedule(target, dtype, head_dim, pattern.block_size, has_dropout)


def row_text(schedule: Schedule, head_dim: int, has_dropout: bool, comment: str) -> str:
    """A row to paste into ``lsg_attn/fused/schedules.py``."""
    limit = next(limit for limit in (64, 128, 256) if head_dim <= limit)
    (m, n, (warps, stages)) = schedule
    return f"    ({limit}, {has_dropout}): Schedule({m}, {n}, Tuning({warps}, {stages})),  # {comment}"


def _print_measured(console: Console, trial: Trial, measured: Sequence[Measured]) -> None:
    table = Table("rows", "columns", "warps", "stages", "ms", "p20-p80", "to the table's row", "p20-p80")
    for schedule, seconds, to_row, failure in measured:
        cells = [str(x) for x in (*schedule[:2], *schedule.tuning)]
        if seconds is None or to_row is None:
            table.add_row(*cells, failure)
            continue
        low, high = 1e3 * seconds.p20, 1e3 * seconds.p80
        cells += [f"{1e3 * seconds.median:.3f}", f"{low:.3f}-{high:.3f}"]
        table.add_row(*cells, f"{to_row.median:.3f}", f"{to_row.p20:.3f}-{to_row.p80:.3f}")
    console.print(table)
    best = min((x for x in measured if x.to_row), key=_median_to_row)
    if best.to_row is None or best.to_row.p80 >= 1:
        console.print(f"keep the row: nothing is faster on {trial.target} in four of five repetitions")
        return
    call, shape = trial.call, tuple(trial.call.query.shape)
    dtype = str(call.query.dtype).removeprefix("torch.")
    what = f"{'backward' if trial.is_backward else 'forward'} of {shape} {dtype} {call.pattern.sparsity_type}"
    comment = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {_median_to_row(best):.3f} of the time of "
        f"{tuple(trial.row[:2])}, {tuple(trial.row.tuning)}, {what}"
    )
    console.print(f"best on {trial.target}:", highlight=False)
    console.print(row_text(best.schedule, shape[3], call.dropout_p > 0, comment), markup=False, soft_wrap=True)


def _median_to_row(measured: Measured) -> float:
    return float("inf") if measured.to_row is None else measured.to_row.median


def _print_plan(
    console: Console, pattern: LSGPattern, shape: tuple[int, int, int, int], dtype: torch.dtype,
    options: argparse.Namespace,
) -> None:  # fmt: skip
    """Print the schedules that would be tried, and the programs of their launches."""
    target = options.dry_run
    call = meta_call(pattern, shape, dtype, has_mask=False, has_dropout=options.dropout)
    saved, dout = to_save(call, allocate(call)) if options.backward else None, torch.empty_like(call.query)
    row = table_row(target, pattern, dtype, shape[3], options.dropout, options.backward)
    table = Table("rows", "columns", "warps", "stages", "programs", title=f"{target}: would be tried")
    for schedule in neighbours(row):
        launches, _ = plan_pass(call, saved, dout, target, schedule)
        programs = ", ".join(f"{launch.kernel.__name__} {launch.programs}" for launch in launches)
        table.add_row(*(str(x) for x in (*schedule[:2], *schedule.tuning)), programs)
    console.print(table)


if __name__ == "__main__":
    raise SystemExit(main())
