"""python -m bench.recall: how much of dense attention's probability each pattern keeps on a text, and its speed.

A checkpoint reads the text with dense attention in every layer. Its queries, keys and values then show, for each
pattern, how much of the probability lies on tokens that a query sees unchanged, how much lies on these and on tokens
that it sees averaged with others, and the error of the output against dense attention.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.timing import Clock, Step, interleave, ratio, spread
from lsg_attn import SPARSITY_TYPES, LSGAttention, LSGPattern, lsg_attention
from lsg_attn.cli.document import read_document
from lsg_attn.cli.output import progress_bar
from lsg_attn.compression import Tokens, compress
from lsg_attn.reference import visible_in_slots, visible_slots, visible_tokens
from lsg_attn.testing import relative_rms

_TINY = Path(__file__).parent.parent / "tests/goldens/bart/base"
_DENSE = "dense"
QKV = tuple[Tensor, Tensor, Tensor]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row for each pattern."""
    options = _parse(arguments)
    console = Console(width=110)
    model, ids, source = _read(options)
    tokens = ids.shape[1]
    patterns = patterns_of(options.factors, options.block_size, model.config.num_global_tokens)
    console.print(
        f"{source}, the first {tokens} tokens, read by {options.model}: "
        f"{len(model.layers)} layers, {model.layers[0].self_attn.num_heads} heads, {torch.get_num_threads()} threads.",
        markup=False,
    )
    if options.model == _TINY:
        console.print("This checkpoint is for tests: its weights are random. --model takes any BART or LSG-BART.")
    layers = list(dense_layers(model, ids))
    kept = []
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(patterns) + 1)
        for pattern in patterns:
            progress.update(task, description=_name(pattern))
            every = [recall(pattern, qkv) for qkv in layers]
            kept.append(Recall(*(sum(xs) / len(xs) for xs in zip(*every, strict=True))))
            progress.advance(task)
        progress.update(task, description="speed")
        speeds = _speeds(patterns, layers[-1])
        progress.advance(task)
    columns = ("pattern", "seen as it is", "or averaged", "error of the output", "ms", "dense attention's time over it")
    table = Table(*columns, title="means over layers and heads; times of the last layer's attention")
    for pattern, means in zip(patterns, kept, strict=True):
        milliseconds, gain = speeds[pattern]
        shares = (f"{100 * x:.1f}%" for x in means[:2])
        table.add_row(_name(pattern), *shares, f"{means.error:.3f}", f"{milliseconds:.1f}", f"{gain:.2f}")
    console.print(table)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.recall", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=_TINY, help="a BART or LSG-BART; by default a tiny random one")
    parser.add_argument("--file", type=Path, help="a text file; by default Python's own language reference")
    parser.add_argument("--tokens", type=int, default=4096, help="how many tokens to read (default: %(default)s)")
    parser.add_argument("--factors", type=int, nargs="+", default=[2, 4, 8], metavar="F", help="sparsity factors")
    parser.add_argument("--block-size", type=int, default=128, help="B and s (default: %(default)s)")
    return parser.parse_args(arguments)


def patterns_of(factors: Sequence[int], block_size: int, num_global_tokens: int) -> list[LSGPattern]:
    """Every sparsity type with every factor, and ``none``, which has no factor."""
    sizes: dict[str, Any] = {"block_size": block_size, "sparse_block_size": block_size}
    sizes["num_global_tokens"] = num_global_tokens
    types = [name for name in SPARSITY_TYPES if name != "none"]
    every = [LSGPattern(sparsity_type=name, sparsity_factor=factor, **sizes) for factor in factors for name in types]
    return [*every, LSGPattern(sparsity_type="none", **sizes)]


class Recall(NamedTuple):
    """What a pattern keeps of dense attention's probability, and its error: means over heads and queries of tokens."""

    seen: float  # probability on global, local and chosen tokens
    covered: float  # the same and the probability on tokens averaged into a key that the query sees
    error: float  # relative root mean square error of the output against dense attention


def recall(pattern: LSGPattern, qkv: QKV) -> Recall:
    """What a pattern keeps of dense attention on queries, keys and values (1, heads, G+T, head_dim)."""
    query, key, value = qkv
    _, heads, length, head_dim = query.shape
    first, scale = pattern.num_global_tokens, head_dim**-0.5
    keep = torch.ones(1, length - first, dtype=torch.bool)
    compression = compress(pattern, Tokens(query[:, :, first:], key[:, :, first:], keep, scale))
    tokens, slots = visible_tokens(pattern, length)[first:], visible_slots(pattern, length)[first:]
    is_choice = compression is not None and compression.token is not None
    seen = covered = 0.0
    for head in range(heads):  # one at a time: the matrix has (tokens, G+T) elements
        probs = (query[0, head, first:] @ key[0, head].mT * scale).softmax(-1)
        raw = everything = _probability(probs, tokens)
        if compression is not None:
            compressed = visible_in_slots(slots, compression, head)
            everything = _probability(probs, torch.cat([tokens[:, :first], tokens[:, first:] | compressed], dim=1))
        seen += everything if is_choice else raw
        covered += everything
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    out = lsg_attention(query, key, value, pattern)
    return Recall(seen / heads, covered / heads, relative_rms(out[:, :, first:], dense[:, :, first:]))


def _probability(probs: Tensor, where: Tensor) -> float:
    """The sum of probabilities (queries, keys) where the mask is true, as a mean over queries."""
    return (probs * where).sum(-1).mean().item()


def dense_layers(encoder: Any, ids: Tensor) -> Iterator[QKV]:
    """Queries, keys and values of each layer of an LSG encoder as it reads ids (1, T) with dense attention."""
    seen: list[tuple[LSGAttention, Tensor]] = []
    num_globals = encoder.config.num_global_tokens
    dense = LSGPattern(block_size=ids.shape[1], sparsity_type="none", num_global_tokens=num_globals)
    for attention in encoder.modules():
        if isinstance(attention, LSGAttention):
            attention.pattern = dense  # one block: all tokens see each other
            attention.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0])))
    with torch.inference_mode():
        encoder(ids)
        for attention, hidden in seen:
            yield attention.project(hidden)


def _read(options: argparse.Namespace) -> tuple[Any, Tensor, str]:
    """The checkpoint's encoder, the text's ids (1, T), and the text's source."""
    from lsg_attn.cli.demo_model import encode, load

    model, tokenizer = load(str(options.model), options.tokens)
    document = read_document(options.file)
    return model.get_encoder().eval(), encode(document.text, tokenizer, options.tokens), document.source


def _speeds(patterns: Sequence[LSGPattern], qkv: QKV) -> dict[LSGPattern, tuple[float, float]]:
    """For each pattern its milliseconds, and dense attention's time over its own."""
    steps: dict[str, Step] = {_name(pattern): partial(lsg_attention, *qkv, pattern=pattern) for pattern in patterns}
    steps[_DENSE] = partial(torch.nn.functional.scaled_dot_product_attention, *qkv)
    for step in steps.values():
        step()
    with torch.inference_mode():
        times = interleave(steps, Clock("cpu"), seconds=5.0, least=3)
    dense = times[_DENSE]
    return {x: (1e3 * spread(times[_name(x)]).median, ratio(dense, times[_name(x)]).median) for x in patterns}


def _name(pattern: LSGPattern) -> str:
    return f"{pattern.sparsity_type}, f = {pattern.sparsity_factor}" if pattern.has_sparse else "none"


if __name__ == "__main__":
    main()
