"""python -m bench.profile: where one thread's time goes in an attention on a CPU, from the samples of `perf record`.

Without a file it samples now, and writes one; with one it prints its table. perf is a program of Linux.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from bench.record import Writer, new_path, records
from lsg_attn import LSGPattern, lsg_attention

DTYPES, PASSES = ("float32", "bfloat16"), ("forward", "forward+backward")
# The parts of the table, with the libraries and the functions whose names begin so; the first that fits.
PARTS: dict[str, tuple[tuple[str, str], ...]] = {
    "oneDNN's products": (("[JIT]", ""), ("jitted-", ""), ("perf-", "")),
    "our C++: packing, scaling, masks, powers, rounding": (("lsg_attn_cpp", ""),),
    "copies of rows": (("libc.so", "__mem"),),
    "PyTorch: choosing and gathering compressed keys, adding their gradients": (("libtorch", ""), ("libc10", "")),
    "the system: fresh pages": (("[kernel", ""), ("[unknown]", "")),
}
_SHAPE, _SECONDS, _FREQUENCY = (1, 16, 4097, 64), 10, 997


def part_of(library: str, function: str) -> str | None:
    """The part of the table that a sample belongs to; None for Python, its imports and the rest."""
    for part, names in PARTS.items():
        if any(library.startswith(x) and function.startswith(y) for x, y in names):
            return part
    return None


def shares(samples: dict[tuple[str, str], int]) -> dict[str, float]:
    """The share of each part, of the samples (library, function) that belong to one.

    Raises:
        ValueError: none does.
    """
    counts: Counter[str] = Counter()
    for (library, function), count in samples.items():
        if (part := part_of(library, function)) is not None:
            counts[part] += count
    if not counts:
        raise ValueError("expected samples of the attention, got none")
    return {part: counts[part] / counts.total() for part in PARTS}


def sample(dtype: str, what: str) -> dict[tuple[str, str], int]:
    """How many samples of a process that repeats a step lie in each function (library, name).

    Raises:
        RuntimeError: perf fails; the error has what it said.
    """
    with TemporaryDirectory() as folder:
        data = f"{folder}/perf.data"
        _run(
            "perf",
            "record",
            "-o",
            data,
            "-F",
            str(_FREQUENCY),
            sys.executable,
            "-m",
            "bench.profile",
            "--step",
            dtype,
            what,
        )
        lines = _run("perf", "script", "-i", data, "-F", "ip,sym,dso").splitlines()
    return dict(Counter(_parsed(line) for line in lines if line.strip()))


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:2])} failed: {done.stderr.strip()}")
    return done.stdout


def _parsed(line: str) -> tuple[str, str]:
    """The library and the function of a line `address function (path)`."""
    _, function_and_path = line.strip().split(" ", 1)
    function, _, path = function_and_path.rpartition(" (")
    return Path(path.removesuffix(")")).name, function


def repeat_step(dtype: str, what: str) -> None:
    """Repeat a forward, or a forward and a backward, of `norm` in one thread, for ``_SECONDS`` of its CPU time."""
    torch.set_num_threads(1)
    is_training = what == PASSES[1]
    query, key, value = (torch.randn(_SHAPE, dtype=getattr(torch, dtype), requires_grad=is_training) for _ in range(3))
    grad = torch.randn(_SHAPE, dtype=getattr(torch, dtype))
    start = time.process_time()
    while time.process_time() - start < _SECONDS:
        out = lsg_attention(query, key, value, LSGPattern())
        if is_training:
            _: tuple[Tensor, ...] = torch.autograd.grad(out, (query, key, value), grad)


def table(path: Path) -> list[str]:
    """The lines of a Markdown table of a run's file."""
    figures = list(records(path, "figure"))
    lines = [["", *(f"{x['pass']}, {x['dtype']}" for x in figures)], ["---"] * (1 + len(figures))]
    lines += [[part, *(f"{100 * x['shares'][part]:.0f}%" for x in figures)] for part in PARTS]
    return [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines]


def main(arguments: Sequence[str] | None = None) -> int:
    """Sample and write a file, or read one, and print its table.

    Returns:
        0; 2 if perf is not installed.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", help="a file of an earlier run; by default it samples now")
    parser.add_argument("--out", type=Path, help="the file to write (default: a new one in build/bench)")
    parser.add_argument("--step", nargs=2, metavar=("DTYPE", "PASS"), help=argparse.SUPPRESS)  # what perf runs
    options = parser.parse_args(arguments)
    if options.step is not None:
        repeat_step(*options.step)
        return 0
    if options.file is None:
        if which("perf") is None:
            print("bench.profile needs perf: on Debian, apt install linux-perf", file=sys.stderr)
            return 2
        options.file = options.out or new_path("profile")
        writer = Writer(options.file, {"shape": _SHAPE, "type": "norm", "threads": 1}, "cpu")
        for what in PASSES:
            for dtype in DTYPES:
                found = sample(dtype, what)
                writer.write(
                    "figure", {"dtype": dtype, "pass": what, "samples": sum(found.values()), "shares": shares(found)}
                )
        writer.close()
    print("\n".join(table(options.file)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
