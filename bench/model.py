"""`python -m bench.model`: the least time that a forward can take on a GPU, by its flops, its bytes and data sheets.

It measures nothing. It says what a time that is measured one day can be set against: no kernel goes below either floor.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from bench.meta import meta_call
from lsg_attn import SPARSITY_TYPES, LSGPattern
from lsg_attn.call import allocate
from lsg_attn.plan import Launch, plan_forward


@dataclass(frozen=True)
class DataSheet:
    """Peak rates of a GPU as its maker gives them, dense: 10^12 operations and 10^12 bytes in a second."""

    name: str
    tensor_tflops: float  # 16-bit products, float32 sums
    float32_tflops: float  # without tensor cores
    memory_tbps: float


DATA_SHEETS = {
    "sm_80": DataSheet("A100 SXM 80 GB", 312.0, 19.5, 2.039),
    "sm_86": DataSheet("A10", 125.0, 31.2, 0.600),
    "sm_90": DataSheet("H100 SXM", 989.4, 66.9, 3.35),
    "sm_100": DataSheet("B200", 2250.0, 75.0, 7.7),
    "sm_120": DataSheet("RTX 5090", 209.5, 104.8, 1.792),
    "gfx942": DataSheet("MI300X", 1307.4, 163.4, 5.3),
}


# Arguments that hold the parts of the global queries, and what a backward needs.
_PASSED_ON = ("part_ptr", "part_lse_ptr")
_SAVED = ("lse_ptr", "index_ptr", "sparse_k_ptr", "sparse_v_ptr", "weight_ptr", "slot_ptr")


@dataclass(frozen=True)
class Model:
    """What one forward has to do, and the floors under its time in microseconds."""

    flops: int
    bytes_moved: int
    bytes_allocated: int  # besides the output
    launches: tuple[str, ...]
    compute_us: float
    memory_us: float


def num_scores(pattern: LSGPattern, num_tokens: int) -> int:
    """Scores of one head: pairs of a query and a key, raw or compressed, that it sees where nothing is padding."""
    first, slots = pattern.num_global_tokens, pattern.num_slots(num_tokens)
    scores = first * (first + num_tokens)
    for block in range(pattern.num_blocks(num_tokens)):
        rows = min(pattern.block_size, num_tokens - block * pattern.block_size)
        local, *sparse = pattern.local_window(block), *pattern.sparse_windows(block)
        keys = min(local[1], num_tokens) - max(local[0], 0)
        keys += sum(max(min(stop, slots) - max(start, 0), 0) for start, stop in sparse)
        scores += rows * (first + keys)
    return scores


def _bytes(launches: Sequence[Launch], counts: Callable[[str], bool]) -> int:
    """Bytes of the tensors that launches are given by arguments of these names, each tensor once."""
    sizes = {}
    for launch in launches:
        for name, argument in launch.arguments.items():
            for x in argument if isinstance(argument, tuple) else (argument,):
                if isinstance(x, torch.Tensor) and counts(name):
                    sizes[id(x)] = x.numel() * x.element_size()
    return sum(sizes.values())


def model(pattern: LSGPattern, shape: tuple[int, int, int, int], dtype: torch.dtype, target: str) -> Model:
    """The model of a forward on queries of ``shape`` (batch, heads, G+T, head_dim), without a mask or dropout."""
    batch, heads, _, head_dim = shape
    call = meta_call(pattern, shape, dtype, has_mask=False, has_dropout=False)
    launches = plan_forward(call, allocate(call), target)
    flops = 4 * head_dim * batch * heads * num_scores(pattern, call.num_tokens)  # two products, of 2 each
    # What launches only pass on to each other may stay in a cache; and so may what two of them read: a floor.
    moved = _bytes(launches, lambda name: name not in _PASSED_ON)
    allocated = _bytes(launches, lambda name: name in _PASSED_ON or name in _SAVED)
    sheet = DATA_SHEETS[target]
    rate = sheet.float32_tflops if dtype == torch.float32 else sheet.tensor_tflops
    return Model(
        flops=flops,
        bytes_moved=moved,
        bytes_allocated=allocated,
        launches=tuple(launch.kernel.__name__ for launch in launches),
        compute_us=flops / rate / 1e6,
        memory_us=moved / sheet.memory_tbps / 1e6,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the model of one shape, for each sparsity type and GPU asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=__doc__)
    parser.add_argument("--target", nargs="+", choices=DATA_SHEETS, default=["sm_90"])
    parser.add_argument("--types", nargs="+", default=list(SPARSITY_TYPES), choices=SPARSITY_TYPES)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    sizes = {"batch": 1, "heads": 16, "tokens": 4096, "head-dim": 64}
    sizes |= {"block-size": 128, "sparse-block-size": 128, "sparsity-factor": 2, "num-global-tokens": 1}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    shape = options.batch, options.heads, options.num_global_tokens + options.tokens, options.head_dim
    title = f"forward of {shape} {options.dtype}: floors from data sheets, not times"
    names = ("type", "GPU", "launches", "GFLOP", "MB moved", "MB allocated", "compute us", "memory us")
    table = Table(*names, title=title)
    for sparsity_type in options.types:
        pattern = LSGPattern(
            block_size=options.block_size,
            sparse_block_size=options.sparse_block_size,
            sparsity_factor=options.sparsity_factor,
            sparsity_type=sparsity_type,
            num_global_tokens=options.num_global_tokens,
        )
        for target in options.target:
            row = model(pattern, shape, getattr(torch, options.dtype), target)
            counts = (row.flops / 1e9, row.bytes_moved / 1e6, row.bytes_allocated / 1e6)
            numbers = (f"{x:.1f}" for x in (*counts, row.compute_us, row.memory_us))
            gpu = f"{DATA_SHEETS[target].name} ({target})"
            table.add_row(sparsity_type, gpu, str(len(row.launches)), *numbers)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
