"""`python -m bench.static.tiles`: what a tile costs in each loop of the kernels, beside a plain dense flash kernel.

It compiles both for GPUs that are not here, and counts instructions; it does not measure time. The status is 1 if a
loop has more of them, for each of the yardstick's, than is allowed.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import math
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from bench.static.calls import PlannedCall
from bench.static.figures import compile_kernel
from bench.static.key import source_of
from bench.static.loops import Counts, count_around, count_loops
from bench.static.sass import Code, read_code
from bench.static.yardstick import backward_yardstick, forward_yardstick
from lsg_attn.fused.launch import Launch
from lsg_attn.fused.schedules import Schedule, backward_schedule, forward_schedule


class Rates(NamedTuple):
    """What a quarter of a multiprocessor does in a cycle: products of its tensor core, and lanes of its pipes.

    From the makers' peak rates, and the CUDA C++ Programming Guide's table of arithmetic throughput.
    """

    macs: int
    fma: int
    alu: int = 16
    mufu: int = 4


RATES = {"sm_80": Rates(256, 16), "sm_86": Rates(128, 32), "sm_90": Rates(512, 32)}
# A type for each way to find a slot's key; the others have the same kernels.
TYPES = ("none", "norm", "pooling", "stride", "block_stride")
_BLOCK, _WARPS = 128, 4
# Instructions for each of the yardstick's that may be needed, by target, step and kind of keys.
LIMITS = {
    ("sm_80", "forward", "local"): 1.25,
    ("sm_80", "forward", "slots"): 1.4,
    ("sm_90", "forward", "local"): 1.12,
    ("sm_90", "forward", "slots"): 1.25,
    **{(target, "dq", keys): 1.25 for target in ("sm_80", "sm_90") for keys in ("local", "slots")},
    **{(target, "dkv", keys): 1.3 for target in ("sm_80", "sm_90") for keys in ("local", "slots")},
}


@dataclass(frozen=True)
class TileCost:
    """What a tile costs in one loop, of each of four warps.

    Attributes:
        target, head_dim, sparsity_type, has_mask: the calls: bfloat16, no dropout, blocks of 128, one global.
        step: "forward", "dq" or "dkv".
        keys: "local", positions of the sequence, or "slots".
        instructions: of a forward's tile of 128 queries by 64 keys, or of a backward's of 64 by 64.
        yardstick: instructions of such a tile of the dense kernel.
        tensor_core_cycles, alu_cycles, fma_cycles, mufu_cycles: that the tile keeps a pipe busy.
        stall_cycles: that the control words let pass.
        shared, memory, shuffle, barrier: instructions of the loop as it was compiled.
        around: instructions of a forward's program outside its loops; 0 of a backward's.
        outside: their part of all that the program has at a place where nothing is cut off; 0 of a backward's.
    """

    target: str
    head_dim: int
    sparsity_type: str
    has_mask: bool
    step: str
    keys: str
    instructions: float
    yardstick: float
    tensor_core_cycles: float
    alu_cycles: float
    fma_cycles: float
    mufu_cycles: float
    stall_cycles: float
    shared: int
    memory: int
    shuffle: int
    barrier: int
    around: int = 0
    outside: float = 0.0

    @property
    def ratio(self) -> float:
        """Instructions for each of the yardstick's."""
        return self.instructions / self.yardstick

    @property
    def cycles(self) -> float:
        """A tile's least cycles: those of the busiest pipe, or of the instructions, of which one a cycle is issued."""
        pipes = (self.tensor_core_cycles, self.alu_cycles, self.fma_cycles, self.mufu_cycles)
        return max(*pipes, self.instructions)

    @property
    def is_too_long(self) -> bool:
        """Whether the loop has more instructions than is allowed."""
        return self.ratio > LIMITS.get((self.target, self.step, self.keys), math.inf)


def costs_of(target: str, head_dim: int, sparsity_type: str, has_mask: bool) -> list[TileCost]:
    """The costs of a tile in each loop of the calls' kernels.

    Raises:
        RuntimeError: if the loops of a kernel are not those that are expected.
    """
    call = PlannedCall(sparsity_type, torch.bfloat16, head_dim, has_mask, False, target, block_size=_BLOCK)
    codes = {launch.kernel.__name__: _code(launch, target) for _, launch in call.launches() if _has_loops(launch)}
    forward, backward = _schedules(target, head_dim)
    (dense,), (dense_dq, dense_dkv) = (count_loops(code) for code in _yardsticks(target, head_dim))
    names = ["slots", "local"] if sparsity_type != "none" else ["local"]
    places = [
        ("forward", forward, dense, "_lsg_fwd_kernel", names),
        ("dq", backward, dense_dq, "_lsg_bwd_dq_dkv_kernel", names),
        ("dkv", backward, dense_dkv, "_lsg_bwd_dq_dkv_kernel", ["local"]),
        *([("dkv", backward, dense_dkv, "_lsg_bwd_slots_kernel", ["slots"])] if sparsity_type != "none" else []),
    ]
    costs = []
    for step, schedule, yardstick, kernel, keys in places:
        found = [counts for counts in count_loops(codes[kernel]) if counts.macs == yardstick.macs]
        if len(found) != len(keys):
            raise RuntimeError(f"{kernel} of {sparsity_type} on {target} has {len(found)} loops of {step}, not {keys}")
        around, outside = 0, 0.0
        if step == "forward":
            around = count_around(codes[kernel], yardstick.macs)
            # Slots of a reach on both sides, and three blocks.
            tiles = {"slots": 2 * _BLOCK // schedule.block_n, "local": 3 * _BLOCK // schedule.block_n}
            inside = sum(tiles[name] * counts.instructions for name, counts in zip(keys, found, strict=True))
            outside = around / (around + inside)
        for name, counts in zip(keys, found, strict=True):
            row = _cost(step, schedule, yardstick, counts, RATES[target])
            costs.append(
                TileCost(target, head_dim, sparsity_type, has_mask, step, name, **row, around=around, outside=outside)
            )
    return costs


def _cost(step: str, schedule: Schedule, yardstick: Counts, counts: Counts, rates: Rates) -> dict[str, Any]:
    """The fields of a TileCost that come from a loop."""
    elements = (2 if step == "forward" else 1) * 64 * 64
    scale = elements / (schedule.block_m * schedule.block_n) * schedule.tuning.num_warps / _WARPS
    return {
        "instructions": counts.instructions * scale,
        "yardstick": yardstick.instructions * scale,
        "tensor_core_cycles": counts.macs * scale / rates.macs,
        "alu_cycles": counts.alu * scale * 32 / rates.alu,
        "fma_cycles": counts.fma * scale * 32 / rates.fma,
        "mufu_cycles": counts.mufu * scale * 32 / rates.mufu,
        "stall_cycles": counts.stalls * scale,
        **{name: getattr(counts, name) for name in ("shared", "memory", "shuffle", "barrier")},
    }


def _has_loops(launch: Launch) -> bool:
    return launch.kernel.__name__ in ("_lsg_fwd_kernel", "_lsg_bwd_slots_kernel", "_lsg_bwd_dq_dkv_kernel")


def _schedules(target: str, head_dim: int) -> tuple[Schedule, Schedule]:
    return (
        forward_schedule(target, torch.bfloat16, head_dim, _BLOCK, False),
        backward_schedule(target, torch.bfloat16, head_dim, False),
    )


@functools.cache
def _yardsticks(target: str, head_dim: int) -> tuple[Code, Code]:
    """The dense kernels with the tiles of ours: the forward, and the backward."""
    forward, backward = _schedules(target, head_dim)
    launches = (
        forward_yardstick(torch.bfloat16, head_dim, forward),
        backward_yardstick(torch.bfloat16, head_dim, backward),
    )
    return _code(launches[0], target), _code(launches[1], target)


def _code(launch: Launch, target: str) -> Code:
    kernel, _ = compile_kernel(source_of(launch), target, launch.options)
    return read_code(kernel.asm["cubin"])


def _compile_all(cases: Iterable[tuple[str, int, str, bool]], jobs: int) -> list[TileCost]:
    """The costs of all cases, by so many processes."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return list(itertools.chain.from_iterable(pool.map(costs_of, *zip(*cases, strict=True))))


def write_costs(path: Path, costs: Iterable[TileCost]) -> None:
    """Write costs as CSV."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(TileCost))
        writer.writerows([f"{x:.4g}" if isinstance(x, float) else x for x in astuple(cost)] for cost in costs)


def read_costs(path: Path) -> list[TileCost]:
    """The costs of a CSV that :func:`write_costs` wrote."""
    readers: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float, "bool": "True".__eq__}
    with path.open(encoding="utf-8", newline="") as file:
        return [
            TileCost(**{field.name: readers[str(field.type)](row[field.name]) for field in fields(TileCost)})
            for row in csv.DictReader(file)
        ]


def table_of(costs: Iterable[TileCost]) -> Table:
    """The costs, with what each has for one of the yardstick's."""
    names = ("GPU", "head_dim", "type", "mask", "step", "keys", "instructions", "yardstick", "ratio")
    pipes = ("tensor core", "ALU", "FMA", "MUFU", "least cycles", "outside")
    table = Table(*names, *pipes, title="a tile, of each of four warps: counts and cycles of pipes, not times")
    for x in costs:
        mask, outside = "yes" if x.has_mask else "no", f"{x.outside:.0%}" if x.outside else ""
        ratio = f"{x.ratio:.2f}{' (too long)' if x.is_too_long else ''}"
        counts = (x.instructions, x.yardstick)
        cycles = (x.tensor_core_cycles, x.alu_cycles, x.fma_cycles, x.mufu_cycles, x.cycles)
        cells = (x.target, str(x.head_dim), x.sparsity_type, mask, x.step, x.keys, *(f"{n:.0f}" for n in counts), ratio)
        table.add_row(*cells, *(f"{n:.0f}" for n in cycles), outside)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench; the status is 1 if a loop is too long."""
    parser = argparse.ArgumentParser(prog="python -m bench.static.tiles", description=__doc__)
    parser.add_argument("--target", nargs="+", choices=RATES, default=list(RATES), help="GPUs (default: all)")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES), help="(default: all)")
    parser.add_argument("--head-dim", nargs="+", type=int, choices=(64, 128), default=[64], help="(default: 64)")
    parser.add_argument("--csv", type=Path, help="write the counts to this file")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (default: %(default)s)")
    options = parser.parse_args(arguments)
    costs = _compile_all(
        itertools.product(options.target, options.head_dim, options.types, (False, True)), options.jobs
    )
    Console(width=180).print(table_of(costs))
    if options.csv:
        write_costs(options.csv, costs)
    too_long = [cost for cost in costs if cost.is_too_long]
    for cost in too_long:
        print(f"{cost} is too long", file=sys.stderr)
    print(f"{len(costs)} loops, {len(too_long)} too long")
    return 1 if too_long else 0


if __name__ == "__main__":
    sys.exit(main())
