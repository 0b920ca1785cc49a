"""python -m bench.packed: a batch of mixed lengths, padded against packed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from bench.timing import Clock, Step, interleave, ratio, spread
from lsg_attn import LSGPattern, lsg_attention, lsg_attention_varlen

# One long document among short ones, as a batch of a corpus has them: padding triples its rows.
_LENGTHS = (8192, 4096, 2048, 1024, 1024, 512, 512, 256)
_HEADS, _HEAD_DIM = 16, 64


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the times of the forward and of forward and backward, and what a token costs."""
    parser = argparse.ArgumentParser(prog="python -m bench.packed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=list(_LENGTHS), help="tokens (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each step (default: %(default)s)")
    options = parser.parse_args(arguments)
    pattern = LSGPattern()
    dtype: torch.dtype = getattr(torch, options.dtype)
    lengths = [pattern.num_global_tokens + tokens for tokens in options.lengths]
    table = Table("step", "batch", "rows", "ms", "p20-p80", "packed is faster by", "us/token")
    for name, has_backward in (("forward", False), ("forward+backward", True)):
        steps = {"packed": _packed(lengths, pattern, dtype, has_backward)}
        steps |= {"padded": _padded(lengths, pattern, dtype, has_backward)}
        times = interleave(steps, Clock("cpu"), options.seconds, least=3)
        rows = {"packed": sum(lengths), "padded": len(lengths) * max(lengths)}
        for batch, seconds in times.items():
            ms, gain = spread([1e3 * x for x in seconds]), ratio(seconds, times["packed"]).median
            per_token = f"{1e3 * ms.median / sum(options.lengths):.1f}"
            span = f"{ms.p20:.0f}-{ms.p80:.0f}"
            table.add_row(name, batch, str(rows[batch]), f"{ms.median:.0f}", span, f"{gain:.2f}", per_token)
    Console(width=100).print(table)


def _packed(lengths: list[int], pattern: LSGPattern, dtype: torch.dtype, has_backward: bool) -> Step:
    q, k, v = _inputs((sum(lengths), _HEADS, _HEAD_DIM), dtype, has_backward)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    return _step(lambda: lsg_attention_varlen(q, k, v, cu_seqlens, max(lengths), pattern), has_backward)


def _padded(lengths: list[int], pattern: LSGPattern, dtype: torch.dtype, has_backward: bool) -> Step:
    q, k, v = _inputs((len(lengths), _HEADS, max(lengths), _HEAD_DIM), dtype, has_backward)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return _step(lambda: lsg_attention(q, k, v, pattern, mask), has_backward)


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, has_backward: bool) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=has_backward) for _ in range(3)]


def _step(attend: Step, has_backward: bool) -> Step:
    def step() -> object:
        out = attend()
        if has_backward and isinstance(out, torch.Tensor):
            out.sum().backward()
        return out

    return step


if __name__ == "__main__":
    main()
