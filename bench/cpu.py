"""python -m bench.cpu: our attention on a CPU against the original, a plain matmul and dense attention, in one run.

Repetitions are interleaved (A B C A B C ...), so that a drift of the machine hits all alike. Times are medians;
ratios are medians of the ratios within a repetition. Before anything is timed, ours is checked against the reference on
a shorter sequence, and the original against ours on the timed one (but for lsh, whose directions it draws at random).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from bench.original import OriginalAttention
from lsg_attn import SPARSITY_TYPES, LSGPattern, __version__, lsg_attention
from lsg_attn.memory import peak_growth
from lsg_attn.testing import Inputs, assert_close, make_inputs, run_attention, run_reference

HEADS, HEAD_DIM, TOKENS = 16, 64, 4096
LENGTHS = (4096, 8192, 16384, 32768, 65536)
Step = Callable[[], object]
Attend = Callable[..., Tensor]


def main() -> None:
    """Measure, print the tables, and write them as JSON where asked to."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="3 repetitions and lengths up to 16384")
    parser.add_argument("--types", nargs="+", default=list(SPARSITY_TYPES), choices=SPARSITY_TYPES)
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    repetitions = 3 if arguments.quick else 11
    console = Console(width=max(Console().width, 120))
    console.print(" ".join(f"{name}: {value}." for name, value in machine().items()))
    with Progress(console=console) as progress:
        task = progress.add_task("attention", total=len(arguments.types) + 3)
        rows = []
        for sparsity_type in arguments.types:
            progress.update(task, description=f"attention, {sparsity_type}")
            rows.append(attention_row(LSGPattern(sparsity_type=sparsity_type), repetitions))
            progress.advance(task)
        progress.update(task, description="memory")
        memory = memory_rows(arguments.types)
        progress.advance(task)
        progress.update(task, description="dtypes")
        dtypes = dtype_rows(repetitions)
        progress.advance(task)
        progress.update(task, description="lengths")
        lengths = length_rows(LENGTHS[:3] if arguments.quick else LENGTHS, 3)
        progress.advance(task)
    for title, table in (
        (f"Attention, float32, (1, {HEADS}, {TOKENS} + 1, {HEAD_DIM}), B = s = 128, f = 2", rows),
        ("Peak memory beyond inputs, output and gradients; 1 is the size of q, k, v and out together", memory),
        ("Dtypes, norm", dtypes),
        ("Lengths, norm, float32", lengths),
    ):
        console.print(as_table(title, table))
    if arguments.json:
        record = {"machine": machine(), "attention": rows, "memory": memory, "dtypes": dtypes, "lengths": lengths}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


def attention_row(pattern: LSGPattern, repetitions: int) -> dict[str, Any]:
    """Times in ms of ours and its peers for one pattern, and ratios to ours."""
    gate(pattern)
    inputs = make_inputs(1, HEADS, TOKENS + pattern.num_global_tokens, HEAD_DIM)
    attend: Attend = partial(lsg_attention, pattern=pattern)
    qkv = inputs[:3]
    original = OriginalAttention(pattern, HEADS, HEAD_DIM)
    if pattern.sparsity_type != "lsh":
        assert_close("original", original(*qkv), attend(*qkv).transpose(1, 2).flatten(2))
    leaves = tuple(x.clone().requires_grad_() for x in qkv)
    dout_flat = inputs.dout.transpose(1, 2).flatten(2)  # the original's output is (batch, length, heads * head_dim)
    times = interleave(
        {
            "ours": lambda: attend(*qkv),
            "original": no_grad(lambda: original(*qkv)),
            "matmul": matmul_bound(pattern),
            "cached matmul": matmul_bound(pattern, cached=True),
            "dense": lambda: torch.nn.functional.scaled_dot_product_attention(*qkv),
            "ours f+b": backward(lambda: attend(*leaves), inputs.dout, leaves),
            "original f+b": backward(lambda: original(*leaves), dout_flat, leaves),
        },
        repetitions,
    )
    return {
        "type": pattern.sparsity_type,
        "fwd ms": median_ms(times["ours"]),
        "original ms": median_ms(times["original"]),
        "original/ours": ratio(times, "original", "ours"),
        "ours/matmul": ratio(times, "ours", "matmul"),
        "ours/cached matmul": ratio(times, "ours", "cached matmul"),
        "dense/ours": ratio(times, "dense", "ours"),
        "f+b ms": median_ms(times["ours f+b"]),
        "original f+b ms": median_ms(times["original f+b"]),
        "f+b original/ours": ratio(times, "original f+b", "ours f+b"),
    }


def gate(pattern: LSGPattern, dtype: torch.dtype = torch.float32) -> None:
    """Raise AssertionError where ours disagrees with the reference, on a shorter sequence of the same kind."""
    inputs = make_inputs(1, 2, 7 * pattern.block_size - 3 + pattern.num_global_tokens, HEAD_DIM, dtype, "right")
    expected = run_reference(inputs, pattern)
    for name, x in run_attention(inputs, pattern).items():
        assert_close(name, x, expected[name])


def matmul_bound(pattern: LSGPattern, cached: bool = False) -> Step:
    """The two batched matmuls of the block windows, their operands in place: no gather, no softmax, no global queries.

    ``cached``: the same matmuls on one head's operands again and again, which then stay in the CPU's cache.
    """
    blocks = pattern.num_blocks(TOKENS)
    window = 3 * pattern.block_size + pattern.num_global_tokens
    window += 2 * pattern.sparse_block_size if pattern.has_sparse else 0
    batch, rounds = (blocks, HEADS) if cached else (blocks * HEADS, 1)
    query = torch.randn(batch, pattern.block_size, HEAD_DIM)
    key, value = (torch.randn(batch, window, HEAD_DIM) for _ in range(2))
    scores, out = torch.empty(batch, pattern.block_size, window), torch.empty_like(query)

    def step() -> None:
        for _ in range(rounds):
            torch.bmm(query, key.mT, out=scores)
            torch.bmm(scores, value, out=out)

    return step


def dtype_rows(repetitions: int) -> list[dict[str, Any]]:
    """Forward times of ours in each dtype, and ratios to float32."""
    pattern = LSGPattern()
    steps: dict[str, Step] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        gate(pattern, dtype)
        inputs = make_inputs(1, HEADS, TOKENS + 1, HEAD_DIM, dtype)
        steps[str(dtype)] = partial(lsg_attention, *inputs[:3], pattern=pattern)
    times = interleave(steps, repetitions)
    return [
        {"dtype": name, "fwd ms": median_ms(ts), "float32/this": ratio(times, "torch.float32", name)}
        for name, ts in times.items()
    ]


def length_rows(lengths: tuple[int, ...], repetitions: int) -> list[dict[str, Any]]:
    """Forward times of ours over lengths, and time per token against that of the shortest."""
    pattern = LSGPattern()
    gate(pattern)
    steps: dict[str, Step] = {}
    for length in lengths:
        inputs = make_inputs(1, HEADS, length + 1, HEAD_DIM)
        steps[str(length)] = partial(lsg_attention, *inputs[:3], pattern=pattern)
    times = interleave(steps, repetitions)
    shortest = str(lengths[0])
    return [
        {
            "tokens": length,
            "fwd ms": median_ms(times[str(length)]),
            "us/token": 1e3 * median_ms(times[str(length)]) / length,
            "against the shortest": ratio(times, str(length), shortest) * lengths[0] / length,
        }
        for length in lengths
    ]


def memory_rows(types: list[str]) -> list[dict[str, Any]]:
    """Peak scratch memory of one call in a fresh process, ours and the original's, in units of q + k + v + out."""
    context = multiprocessing.get_context("spawn")
    rows = []
    for sparsity_type in types:
        row: dict[str, Any] = {"type": sparsity_type}
        for who in ("ours", "original"):
            for what in ("fwd", "f+b"):
                with context.Pool(1) as pool:
                    row[f"{who} {what}"] = pool.apply(peak_scratch, (who, what, sparsity_type))
        rows.append(row)
    return rows


def peak_scratch(who: str, what: str, sparsity_type: str) -> float | None:
    """How far this process grows over one call, less its output and gradients, in units of q + k + v + out."""
    pattern = LSGPattern(sparsity_type=sparsity_type)
    attend: Attend = partial(lsg_attention, pattern=pattern)
    if who == "original":
        attend = OriginalAttention(pattern, HEADS, HEAD_DIM)
    backwards = what == "f+b"

    def call(inputs: Inputs) -> None:
        leaves = tuple(x.requires_grad_(backwards) for x in inputs[:3])
        out = attend(*leaves)
        if backwards:
            out.backward(inputs.dout if who == "ours" else inputs.dout.transpose(1, 2).flatten(2))

    with torch.set_grad_enabled(backwards):
        call(make_inputs(1, HEADS, 4 * pattern.block_size + 1, HEAD_DIM))  # what libraries allocate once does not count
        inputs = make_inputs(1, HEADS, TOKENS + 1, HEAD_DIM)
        peak = peak_growth(lambda: call(inputs))
    results = 4 if backwards else 1  # out, and the gradients of q, k, v
    return None if peak is None else peak / (4 * inputs.query.nbytes) - results / 4


def backward(forward: Callable[[], Tensor], dout: Tensor, leaves: tuple[Tensor, ...]) -> Step:
    """Forward, then backward into fresh gradients."""

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        forward().backward(dout)

    return step


def no_grad(step: Step) -> Step:
    """The step without autograd's bookkeeping."""
    return torch.no_grad()(step)


def interleave(steps: dict[str, Step], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each step in each repetition, after one call to warm up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(repetitions + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repetition:
                times[name].append(time.perf_counter() - start)
    return times


def median_ms(times: list[float]) -> float:
    """The median in milliseconds."""
    return 1e3 * statistics.median(times)


def ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    """The median over repetitions of one time over another."""
    return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    root = Path(__file__).parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lsg_attn": __version__,
        "commit": commit.stdout.strip() or "unknown",
    }


def cpu_name() -> str:
    """The processor's name, with its widest vector instructions as torch sees them."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def as_table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Rows of one shape as a table."""
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right", overflow="fold")
    for row in rows:
        table.add_row(*(f"{x:.2f}" if isinstance(x, float) else "n/a" if x is None else str(x) for x in row.values()))
    return table


if __name__ == "__main__":
    main()
