"""`python -m bench.static`: compile the kernels for GPUs that are not here, and read the binaries.

It needs no GPU and no driver: ptxas and the disassemblers are in the triton wheel. It tells registers, spills, shared
memory, tensor-core instructions and occupancy of every variant that dispatch can choose; it does not tell time.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.static import binary
from bench.static.binary import GPUS, num_blocks, read_amdgcn, read_cubin
from bench.static.meta import meta_call, meta_passes
from lsg_attn import SPARSITY_TYPES, LSGPattern
from lsg_attn.fused.launch import Launch

_CACHE = Path(__file__).parents[2] / "build/static"
MOST_SPILLED = 64  # bytes of a thread that a kernel may spill
_MATMULS = ("_lsg_lsh_kernel", "_lsg_fwd_kernel", "_lsg_bwd_slots_kernel", "_lsg_bwd_dq_dkv_kernel")


@dataclass(frozen=True)
class Row:
    """One compiled kernel, by what its binary says; ``spill_bytes`` are of a thread, loads and stores together."""

    kernel: str
    variant: str
    target: str
    registers: int
    stack: int
    spill_bytes: int
    shared_bytes: int
    tensor_core_instructions: int
    async_copies: int
    float_atomics: int
    blocks_per_sm: int
    occupancy: float
    num_warps: int
    num_stages: int
    triton: str
    source: str  # hash of what was compiled, and for what


@dataclass(frozen=True)
class Case:
    """A call that dispatch may get: which kernels it takes on a target is up to the planner."""

    sparsity_type: str
    dtype: torch.dtype
    head_dim: int
    has_mask: bool
    has_dropout: bool
    target: str
    has_backward: bool = True
    block_size: int = 128
    num_globals: int = 1

    def launches(self) -> list[tuple[str, Launch]]:
        """What it launches, each with the name of its variant."""
        sizes = {"block_size": self.block_size, "sparse_block_size": self.block_size}
        pattern = LSGPattern(sparsity_type=self.sparsity_type, num_global_tokens=self.num_globals, **sizes)
        shape = (2, 16, self.num_globals + 4096, self.head_dim)
        call = meta_call(pattern, shape, self.dtype, self.has_mask, self.has_dropout)
        forward, backward = meta_passes(call, self.target)
        launches = forward.launches + (backward.launches if self.has_backward else [])
        return [(self._variant(launch), launch) for launch in launches]

    def _variant(self, launch: Launch) -> str:
        """The name of the variant that one of the case's launches is."""
        words = [str(self.dtype).removeprefix("torch."), f"d{self.head_dim}"]
        if "V" in launch.arguments:  # sums have none: they know nothing of masks, dropout and sparsity
            variant = launch.arguments["V"]
            words.insert(0, variant.sparsity)
            words += ["mask"] * variant.has_mask + ["dropout"] * variant.has_dropout
        words += [f"B{self.block_size}"] * (self.block_size != 128) + [f"G{self.num_globals}"] * (self.num_globals != 1)
        return " ".join(words)


def cases(subset: str, targets: Sequence[str]) -> Iterator[Case]:
    """The calls of a subset.

    "quick": bfloat16, head_dim 64, a mask; "ci": all dtypes, and for bfloat16 also dropout; "all": every combination
    with head_dim 64 and 128, with and without a mask and dropout, for the default pattern; and for some of them blocks
    smaller than a tile, many globals, and head_dim 256. The backward of only some of these: see :func:`_has_backward`.
    """
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    everything = itertools.product(SPARSITY_TYPES, dtypes, (64, 128), (True, False), (False, True), targets)
    for values in everything:
        case = Case(*values, has_backward=_has_backward(subset, *values[1:5]))
        is_main = case.head_dim == 64 and case.has_mask
        is_plain = case.dtype == torch.bfloat16 and not case.has_dropout
        if subset == "quick" and not (is_main and is_plain):
            continue
        if subset == "ci" and not (is_main and (not case.has_dropout or case.dtype == torch.bfloat16)):
            continue
        yield case
    if subset == "all":
        others = itertools.product(("norm", "lsh"), (torch.bfloat16, torch.float32), (False, True), targets)
        for sparsity_type, dtype, has_dropout, target in others:
            for head_dim, sizes in ((64, {"block_size": 32}), (128, {"num_globals": 200}), (256, {})):
                yield Case(sparsity_type, dtype, head_dim, True, has_dropout, target, not has_dropout, **sizes)


def _has_backward(subset: str, dtype: torch.dtype, head_dim: int, has_mask: bool, has_dropout: bool) -> bool:
    """Whether a call's backward is compiled, too: not where another one tells what it would, as it takes longest."""
    if subset != "all":
        return dtype == torch.bfloat16 and not has_dropout
    if dtype == torch.bfloat16:
        return has_mask or (head_dim == 64 and not has_dropout)
    # float16 has the tiles of bfloat16
    return has_mask and not has_dropout and (head_dim == 64 or dtype == torch.float32)


def source_of(launch: Launch) -> ASTSource:
    """The compiler's input for a launch, specialised as a run would be; tensors count as 16-byte aligned."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def describe(value: Any, path: tuple[int, ...], is_specialized: bool) -> Any:
        if value is None or (is_specialized and isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(describe(x, (*path, i), True) for i, x in enumerate(value))
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, torch.Tensor) or (is_specialized and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return "*" + _TYPES[value.dtype]
        return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"

    for i, param in enumerate(launch.kernel.params):
        value = launch.arguments[param.name]
        if param.is_constexpr:
            constants[i,] = value
            signature[param.name] = "constexpr"
        else:
            signature[param.name] = describe(value, (i,), not param.do_not_specialize)
    return ASTSource(launch.kernel, signature, constants, attributes)


_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.bool: "i1",
}


def compile_row(case: Case, index: int) -> Row | str:
    """Launch number ``index`` of a case compiled, or the error if it does not; from the cache if it is there."""
    variant, launch = case.launches()[index]
    source = key_of(case, launch)
    readers = hashlib.sha256(Path(binary.__file__).read_bytes()).hexdigest()  # what is kept was read by that file
    path = _CACHE / f"{source[:32]}-{readers[:32]}.json"
    if path.exists():
        return Row(**{**json.loads(path.read_text(encoding="utf-8")), "variant": variant})
    try:
        found = compile_and_read(source_of(launch), case.target, launch.options)
    except Exception as error:  # whatever a backend raises is a result of this bench
        return f"{launch.kernel.__name__} {variant} {case.target}: {type(error).__name__}: {error}".strip()
    gpu, is_cuda = GPUS[case.target], case.target.startswith("sm_")
    blocks = num_blocks(gpu, is_cuda, found["registers"], found["shared_bytes"], launch.tuning.num_warps)
    row = Row(
        kernel=launch.kernel.__name__,
        variant=variant,
        target=case.target,
        blocks_per_sm=blocks,
        occupancy=round(blocks * launch.tuning.num_warps / gpu.warps, 4),
        num_warps=launch.tuning.num_warps,
        num_stages=launch.tuning.num_stages,
        triton=triton.__version__,
        source=source,
        **found,
    )
    _CACHE.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(row)), encoding="utf-8")
    return row


def compile_and_read(source: ASTSource, target: str, options: dict[str, Any]) -> dict[str, int]:
    """What the binary says that a kernel becomes for one of ``GPUS``."""
    is_cuda, log = target.startswith("sm_"), io.StringIO()
    gpu = GPUTarget("cuda", int(target[3:]), 32) if is_cuda else GPUTarget("hip", target, GPUS[target].warp_size)
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True  # the log has the spills
        kernel = triton.compile(source, target=gpu, options=options)
    return read_cubin(kernel, log.getvalue()) if is_cuda else read_amdgcn(kernel)


def key_of(case: Case, launch: Launch) -> str:
    """What a compiled kernel is known by: source, types, constants, options, target and compiler."""
    parts = (source_of(launch).hash(), sorted(launch.options.items()), case.target, triton.__version__)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def faults(row: Row) -> list[str]:
    """What is wrong with a compiled kernel; empty if it may ship."""
    wrong = []
    if row.spill_bytes > MOST_SPILLED:
        wrong.append(f"spills {row.spill_bytes} bytes, more than {MOST_SPILLED}")
    if row.shared_bytes > GPUS[row.target].shared_of_block:
        wrong.append(f"takes {row.shared_bytes} bytes of shared memory of {GPUS[row.target].shared_of_block}")
    if row.float_atomics:
        wrong.append(f"has {row.float_atomics} atomics on floats, and no sum's order may depend on timing")
    is_matmul = row.kernel in _MATMULS and (row.kernel == "_lsg_lsh_kernel" or "float32" not in row.variant)
    if is_matmul and not row.tensor_core_instructions:
        wrong.append("has no tensor-core instruction")
    return [f"{row.kernel} {row.variant} {row.target} {what}" for what in wrong]


def compile_all(todo: Iterable[Case], jobs: int) -> tuple[list[Row], list[str]]:
    """Every kernel of the cases, once; and the errors of those that do not compile."""
    distinct: dict[str, tuple[Case, int]] = {}
    for case in todo:
        for index, (_, launch) in enumerate(case.launches()):
            distinct.setdefault(key_of(case, launch), (case, index))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        outcomes = pool.map(compile_row, *zip(*distinct.values(), strict=True))
        console = Console(stderr=True)
        results = list(track(outcomes, "compiling", len(distinct), console=console, disable=not console.is_terminal))
    rows = [x for x in results if isinstance(x, Row)]
    rows.sort(key=lambda row: (row.kernel, row.variant, [*GPUS].index(row.target)))
    return rows, [x for x in results if isinstance(x, str)]


def print_rows(rows: Sequence[Row]) -> None:
    """A table of all rows."""
    table = Table(
        "kernel",
        "variant",
        "target",
        *(["reg", "stack", "spill", "shared", "mma", "async", "atomics", "blocks", "occ"]),
    )
    for row in rows:
        values = asdict(row)
        numbers = (values[name] for name in list(values)[3:12])
        table.add_row(row.kernel, row.variant, row.target, *map(str, numbers))
    Console(width=140).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench; the status is 1 if a kernel does not compile or has a fault."""
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__)
    parser.add_argument("--target", nargs="+", choices=GPUS, default=list(GPUS), help="GPUs (default: all)")
    parser.add_argument("--subset", choices=("quick", "ci", "all"), default="all", help="which variants (default: all)")
    parser.add_argument("--json", type=Path, help="write the rows there, as a list of objects")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (default: %(default)s)")
    options = parser.parse_args(arguments)
    rows, errors = compile_all(cases(options.subset, options.target), options.jobs)
    print_rows(rows)
    for row in rows:
        errors += faults(row)
    for error in errors:
        print(error, file=sys.stderr)
    print(f"{len(rows)} kernels compiled, {len(errors)} faults")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    return 1 if errors else 0
