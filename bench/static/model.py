"""`python -m bench.static.model`: lower bounds of the time of a forward or a backward on a GPU.

It measures nothing. The bounds come from flops and bytes, and measured times can be compared with them. With --ranks,
it says what processes that share a sequence out receive from each other.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.flops import BACKWARD_PRODUCTS, PRODUCTS, num_scores
from bench.static import ranks
from bench.static.meta import meta_call, meta_passes
from bench.static.tiles import read_costs, table_of
from lsg_attn import SPARSITY_TYPES, LSGPattern
from lsg_attn.fused.launch import Launch
from lsg_attn.sparsity import RULES

COSTS = Path(__file__).parents[1] / "results/tiles.csv"
_TOKENS, _TOKENS_OF_RANKS = 4096, 1 << 20


@dataclass(frozen=True)
class DataSheet:
    """Peak dense rates from the maker of a GPU: 10^12 operations and 10^12 bytes per second."""

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


@dataclass(frozen=True)
class Model:
    """The work of one forward or backward, and the lower bounds of its time in microseconds."""

    flops: int
    bytes_moved: int
    bytes_scratch: int  # allocated only while it runs
    bytes_saved: int  # by the forward for the backward, besides the inputs and the output
    launches: tuple[str, ...]
    compute_us: float
    memory_us: float


def _tensors(launches: Sequence[Launch]) -> list[torch.Tensor]:
    """The tensors among the arguments of launches, each once."""
    found: dict[int, torch.Tensor] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[id(value)] = value
        elif isinstance(value, tuple):
            for x in value:
                visit(x)

    for launch in launches:
        visit(tuple(launch.arguments.values()))
    return list(found.values())


def model(
    pattern: LSGPattern, shape: tuple[int, int, int, int], dtype: torch.dtype, target: str, is_backward: bool = False,
    lengths: Sequence[int] = (),
) -> Model:  # fmt: skip
    """The model of a forward, or of its backward, on queries of ``shape`` (batch, heads, G+T, head_dim).

    The call has no mask and no dropout. ``lengths``: G+T of each packed sequence, in place of the shape's batch and
    length.
    """
    batch, heads, length, head_dim = shape
    call = meta_call(pattern, shape, dtype, has_mask=False, has_dropout=False, lengths=lengths)
    forward, backward = meta_passes(call, target)
    launches, inputs, outputs = backward if is_backward else forward
    products = BACKWARD_PRODUCTS if is_backward else PRODUCTS
    scores = sum(num_scores(pattern, n - pattern.num_global_tokens) for n in lengths or [length] * batch)
    flops = 2 * products * head_dim * heads * scores
    # Scratch between launches may stay in a cache, and so may a tensor that two launches read: bytes are a lower bound.
    is_kept = {id(x) for x in (*inputs, *outputs)}
    sizes = [(id(x) in is_kept, x.nbytes) for x in _tensors(launches)]
    moved, scratch = (sum(size for kind, size in sizes if kind == wanted) for wanted in (True, False))
    sheet = DATA_SHEETS[target]
    rate = sheet.float32_tflops if dtype == torch.float32 else sheet.tensor_tflops
    return Model(
        flops=flops,
        bytes_moved=moved,
        bytes_scratch=scratch,
        bytes_saved=sum(x.nbytes for x in forward.outputs[1:]),
        launches=tuple(launch.kernel.__name__ for launch in launches),
        compute_us=flops / rate / 1e6,
        memory_us=moved / sheet.memory_tbps / 1e6,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the model of one shape for each sparsity type and GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.static.model", description=__doc__)
    parser.add_argument("--target", nargs="+", choices=DATA_SHEETS, default=["sm_90"])
    parser.add_argument("--types", nargs="+", default=list(SPARSITY_TYPES), choices=SPARSITY_TYPES)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--backward", action="store_true", help="model the backward instead of the forward")
    parser.add_argument("--causal", action="store_true", help="of a causal pattern")
    parser.add_argument("--lengths", type=int, nargs="+", default=[], help="the tokens of each packed sequence")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[], metavar="N", help="what each of N ranks receives, on GPUs of sm_90"
    )
    parser.add_argument("--tokens", type=int, help=f"(default: {_TOKENS}; with --ranks {_TOKENS_OF_RANKS}, of all)")
    sizes = {"batch": 1, "heads": 16, "head-dim": 64}
    sizes |= {"block-size": 128, "sparse-block-size": 128, "sparsity-factor": 2, "num-global-tokens": 1}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    options.tokens = options.tokens or (_TOKENS_OF_RANKS if options.ranks else _TOKENS)
    if options.ranks:
        if options.lengths or options.target != ["sm_90"]:
            parser.error("--ranks: expected one sequence, without --lengths, and the default --target")
        _print_ranks(options)
        return
    shape = options.batch, options.heads, options.num_global_tokens + options.tokens, options.head_dim
    name = "backward" if options.backward else "forward"
    lengths = [options.num_global_tokens + tokens for tokens in options.lengths]
    what = f"packed sequences of {lengths}" if lengths else str(shape)
    title = f"{name} of {what} {options.dtype}: lower bounds from data sheets, not times"
    names = ("type", "GPU", "launches", "GFLOP", "MB moved", "MB scratch", "MB saved", "compute us", "memory us")
    table = Table(*names, title=title)
    for sparsity_type in options.types:
        pattern = _pattern(options, sparsity_type)
        for target in options.target:
            row = model(pattern, shape, getattr(torch, options.dtype), target, options.backward, lengths)
            counts = (row.flops / 1e9, row.bytes_moved / 1e6, row.bytes_scratch / 1e6, row.bytes_saved / 1e6)
            numbers = (f"{x:.1f}" for x in (*counts, row.compute_us, row.memory_us))
            gpu = f"{DATA_SHEETS[target].name} ({target})"
            table.add_row(sparsity_type, gpu, str(len(row.launches)), *numbers)
    Console(width=120).print(table)
    _print_tiles(options)


def _pattern(options: argparse.Namespace, sparsity_type: str) -> LSGPattern:
    return LSGPattern(
        block_size=options.block_size,
        sparse_block_size=options.sparse_block_size,
        sparsity_factor=options.sparsity_factor,
        sparsity_type=sparsity_type,
        num_global_tokens=options.num_global_tokens,
        causal=options.causal,
    )


def _print_ranks(options: argparse.Namespace) -> None:
    """Print what ranks receive, beside the bounds of an H100 for the tokens that each has."""
    heads, dtype = options.heads, getattr(torch, options.dtype)
    attentions = [
        ranks.Attention(_pattern(options, name), options.batch, heads, heads, options.head_dim, dtype)
        for name in options.types
    ]
    ranks.print_tables(attentions, options.tokens, options.ranks, bound_of)


def bound_of(attention: ranks.Attention) -> ranks.Bound:
    """The lower bounds of an H100's time for an attention of some tokens, without those of other ranks."""

    def bound(tokens: int, is_backward: bool) -> float:
        pattern = attention.pattern
        shape = attention.batch, attention.heads, pattern.num_global_tokens + tokens, attention.head_dim
        found = model(pattern, shape, attention.dtype, "sm_90", is_backward)
        return max(found.compute_us, found.memory_us)

    return bound


def _print_tiles(options: argparse.Namespace) -> None:
    """Print what a tile costs by the counts that ``make static`` keeps, which are of some GPUs and head_dims."""
    lookups = {RULES[name].lookup for name in options.types}
    steps = ("dq", "dkv") if options.backward else ("forward",)
    costs = [
        cost
        for cost in read_costs(COSTS)
        if cost.target in options.target
        and cost.head_dim == options.head_dim
        and RULES[cost.sparsity_type].lookup in lookups
        and cost.step in steps
        and not cost.has_mask
    ]
    if costs:
        Console(width=180).print(table_of(costs))
        print("Cycles of a tile are counted in the compiled loops, not measured: those of its busiest pipe.")


if __name__ == "__main__":
    main()
