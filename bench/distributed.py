"""python -m bench.distributed: time, memory and traffic of an attention that processes on this machine share out.

Each process has one thread and only its shard. In strong scaling, the sequence stays the same; in weak scaling, the
tokens of a process do.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh

from bench.record import FOLDER, Writer, new_path
from bench.timing import Step, spread
from lsg_attn import SPARSITY_TYPES, LSGPattern, lsg_attention
from lsg_attn.communication import Group
from lsg_attn.distributed import context_parallel
from lsg_attn.memory import peak_memory
from lsg_attn.sections import shares

_TOKENS, _QUICK_TOKENS = (16384, 32768, 65536, 131072, 262144), (2048, 4096)
STEPS = ("forward", "forward_backward")
_REPETITIONS, _QUICK_REPETITIONS = 5, 2


@dataclass(frozen=True)
class Case:
    """One attention, and how many processes share it out."""

    tokens: int
    ranks: int
    sparsity_type: str
    heads: int
    head_dim: int
    dtype_name: str
    repetitions: int

    @property
    def pattern(self) -> LSGPattern:
        """The default one of its type."""
        return LSGPattern(sparsity_type=self.sparsity_type)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each case in processes of its own, write a record of each, and print how time scales."""
    options = _parse(arguments)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    console = Console(width=120)
    described = {**vars(options), "out": None, "cores": cores, "threads_of_a_rank": 1}
    writer = Writer(options.out or new_path("distributed"), described, "cpu")
    console.print(" ".join(f"{name}: {value}." for name, value in writer.run.items()), markup=False)
    records = []
    steps = STEPS if options.backward else STEPS[:1]
    for tokens in options.tokens:
        for ranks in options.ranks:
            sizes = (options.type, options.heads, options.head_dim, options.dtype, options.repetitions)
            for record in measure(Case(tokens, ranks, *sizes), steps):
                writer.write("distributed", record)
                records.append(record)
                print(f"{tokens} tokens, {ranks} ranks, {record['step']}: {record['ms'][0]:.0f} ms", flush=True)
    writer.close()
    for step in steps:
        console.print(table_of([record for record in records if record["step"] == step], cores))
    console.print(f"written to {writer.path}", markup=False)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.distributed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", help=f"of the sequence (default: {_TOKENS})")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="processes (default: %(default)s)")
    parser.add_argument("--type", default="norm", choices=SPARSITY_TYPES, help="(default: %(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--head-dim", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="(default: %(default)s)")
    parser.add_argument("--backward", action="store_true", help="after the forward, forward and backward, too")
    parser.add_argument("--repetitions", type=int, help=f"of a step (default: {_REPETITIONS})")
    parser.add_argument("--quick", action="store_true", help="short sequences, and few repetitions")
    parser.add_argument("--out", type=Path, help=f"the file to write; by default a new one in {FOLDER}")
    options = parser.parse_args(arguments)
    options.tokens = options.tokens or list(_QUICK_TOKENS if options.quick else _TOKENS)
    options.repetitions = options.repetitions or (_QUICK_REPETITIONS if options.quick else _REPETITIONS)
    return options


def measure(case: Case, steps: Sequence[str]) -> list[dict[str, Any]]:
    """A record of each step: milliseconds of the slowest rank, median and 20th and 80th percentiles; lists by rank.

    Raises:
        RuntimeError: a process failed, and wrote why, or was killed.
    """
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [context.Process(target=_run, args=(rank, case, steps, folder)) for rank in range(case.ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        codes = [process.exitcode for process in processes]
        if any(codes):
            raise RuntimeError(f"{case}: expected processes that end with 0, got {codes}")
        found = [json.loads(_path(folder, rank).read_text()) for rank in range(case.ranks)]
    return [_record(case, step, [of_rank[step] for of_rank in found]) for step in steps]


def _record(case: Case, step: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    by_rank = {name: [x[name] for x in found] for name in found[0]}
    slowest = [1e3 * max(seconds) for seconds in zip(*by_rank.pop("seconds"), strict=True)]
    return {**asdict(case), "step": step, "ms": spread(slowest), **by_rank}


def _path(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.json"


def _run(rank: int, case: Case, steps: Sequence[str], folder: Path) -> None:
    """A process: it writes what it measures into the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=case.ranks)
    with context_parallel(init_device_mesh("cpu", (case.ranks,))) as group:
        attention = _Attention(case, rank)
        found = {step: _measure_rank(group, getattr(attention, step), case.repetitions) for step in steps}
    _path(folder, rank).write_text(json.dumps(found))
    dist.barrier()
    # Without the interpreter's own end: gloo's threads now and then outlive it, and abort the process.
    os._exit(0)


def _measure_rank(group: Group, step: Step, repetitions: int) -> dict[str, Any]:
    """The figures of one rank. The peak is beyond the inputs, as in :mod:`bench.peak`."""
    step()
    before = group.received_bytes, group.messages
    peak = peak_memory(step)
    received, messages = group.received_bytes - before[0], group.messages - before[1]
    seconds = []
    for _ in range(repetitions):
        dist.barrier()
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    return {
        "seconds": seconds,
        "received_bytes": received,
        "messages": messages,
        "peak_bytes": None if peak is None else peak.growth,
    }


class _Attention:
    """The steps of a rank, on random rows of its own; those of the globals are alike on all ranks."""

    def __init__(self, case: Case, rank: int) -> None:
        self._pattern, dtype = case.pattern, getattr(torch, case.dtype_name)
        tokens = shares(case.tokens, case.ranks, self._pattern.block_size)[rank].size
        count, alike = self._pattern.num_global_tokens, torch.Generator().manual_seed(0)
        torch.manual_seed(rank)
        # with the strides that projections give
        shape = 1, count + tokens, case.heads, case.head_dim
        self._rows = [torch.randn(shape, dtype=dtype).transpose(1, 2) for _ in range(4)]
        for x in self._rows:
            x[:, :, :count] = torch.randn(1, case.heads, count, case.head_dim, generator=alike)

    def forward(self) -> None:
        q, k, v, _ = self._rows
        lsg_attention(q, k, v, self._pattern)

    def forward_backward(self) -> None:
        q, k, v, dout = self._rows
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        lsg_attention(leaves[0], leaves[1], leaves[2], self._pattern).backward(dout)


def table_of(records: Sequence[dict[str, Any]], cores: int) -> Table:
    """How a step scales, from the fewest ranks on; 1 is ideal: the work shared out over as many cores as there are.

    Strong: the time of the same tokens on the fewest ranks, over the ideal share and this time. Weak: the time of as
    many tokens of each rank on the fewest ranks, over this time, where ranks beyond the cores have to take turns.
    """
    found = {(x["tokens"], x["ranks"]): x for x in records}
    fewest = min(ranks for _, ranks in found)
    title = f"{records[0]['step']}, {records[0]['sparsity_type']}: one thread for each rank"
    if max(ranks for _, ranks in found) > cores:
        title += f"; {cores} cores, so that more ranks are at best as fast as {cores}"
    names = ("tokens", "ranks", "ms", "p20-p80", "strong / ideal", "weak / ideal", "KB received", "messages", "MiB")
    table = Table(*names, title=title, caption="KB, messages and peak MiB beyond the inputs: of the rank with the most")
    for (tokens, ranks), record in found.items():
        median, low, high = record["ms"]
        gain = min(ranks, cores) / min(fewest, cores)
        strong, weak = found.get((tokens, fewest)), found.get((tokens * fewest // ranks, fewest))
        is_whole = tokens * fewest % ranks == 0
        ratios = (
            strong["ms"][0] / gain / median if strong else None,
            weak["ms"][0] * ranks / fewest / gain / median if weak and is_whole else None,
        )
        peaks = [peak for peak in record["peak_bytes"] if peak is not None]
        table.add_row(
            f"{tokens:,}",
            str(ranks),
            f"{median:.1f}",
            f"{low:.1f}-{high:.1f}",
            *("" if x is None else f"{x:.2f}" for x in ratios),
            f"{max(record['received_bytes']) / 1e3:.1f}",
            str(max(record["messages"])),
            f"{max(peaks) / 2**20:.1f}" if peaks else "",
        )
    return table


if __name__ == "__main__":
    main()
