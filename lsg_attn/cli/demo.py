"""lsg-attn demo: a long document through a BART-base-sized encoder stack, once for each sparsity type."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from ..compression import Tokens, compress, lsh_directions
from ..layer import LSGAttention
from ..memory import peak_growth
from ..pattern import SPARSITY_TYPES, LSGPattern
from ..reference import reference_attention, visible_slots, visible_tokens
from ..testing import relative_rms

# BART-base's encoder (arXiv 1910.13461)
LAYERS, WIDTH, HEADS, FEED_FORWARD = 6, 768, 12, 3072
CHECKED_HEADS = 1  # the dense reference takes about 40 bytes for each pair of positions and head
REPETITIONS = 2
Attend = Callable[[LSGAttention, Tensor], Tensor]


def run_demo(console: Console, tokens: int = 4096, file: Path | None = None, tokenizer: str | None = None) -> None:
    """Read a document, run the stack for each sparsity type and once with dense attention, and print a table.

    Args:
        console: where to print.
        tokens: how many tokens of the document to take.
        file: a text file in UTF-8; by default the language reference in ``pydoc_data``.
        tokenizer: a name or folder for transformers' ``AutoTokenizer``; by default a token is a byte.

    Raises:
        OSError: the file can not be read.
        ValueError: the document is empty, or ``tokens`` is not positive.
        ModuleNotFoundError: ``tokenizer`` was given and transformers is not installed.
    """
    if tokens < 1:
        raise ValueError(f"tokens: expected at least 1, got {tokens}")
    text = read_document(file)
    ids, vocabulary = tokenize(text, tokenizer)
    if not ids:
        raise ValueError(f"the document has no tokens: {file}")
    ids = ids[:tokens]
    console.print(
        f"{file or 'pydoc_data.topics'}: {len(text)} characters, the first {len(ids)} tokens of "
        f"{tokenizer or 'one byte each'}. {LAYERS} layers, width {WIDTH}, {HEADS} heads, float32, "
        f"{torch.get_num_threads()} threads, random weights (seed 0): what is shown is cost and error, not meaning.",
        markup=False,
    )
    torch.manual_seed(0)
    hidden = embed(torch.tensor(ids), vocabulary)
    stack = EncoderStack().eval()
    rows: list[dict[str, Any]] = []
    with torch.inference_mode(), progress_bar(console) as progress:
        task = progress.add_task("dense attention", total=1 + 2 * len(SPARSITY_TYPES))
        dense_seconds = best_seconds(lambda: stack(hidden, dense_attention))
        progress.advance(task)
        for sparsity_type in SPARSITY_TYPES:
            pattern = LSGPattern(sparsity_type=sparsity_type)
            stack.set_pattern(pattern)
            progress.update(task, description=f"{sparsity_type}: {LAYERS} layers")
            seconds = best_seconds(lambda: stack(hidden))
            progress.advance(task)
            progress.update(task, description=f"{sparsity_type}: check and memory")
            check = check_last_layer(stack, hidden)
            progress.advance(task)
            rows.append(
                {
                    "type": sparsity_type,
                    "keys seen per query": f"{check.keys_per_query:.0f}",
                    "error": f"{check.error:.1e}",
                    "stack, s": f"{seconds:.2f}",
                    "attention's peak memory, MB": "n/a"
                    if check.peak_bytes is None
                    else f"{check.peak_bytes / 1e6:.0f}",
                    "speed against dense": f"{dense_seconds / seconds:.2f}x",
                }
            )
    table = Table(*rows[0], title=f"dense attention: {hidden.shape[1]} keys per query, {dense_seconds:.2f} s")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    console.print(
        "error: relative RMS of the last layer's attention over the whole document against the dense reference in "
        f"float64, {CHECKED_HEADS} head of {HEADS}. Peak memory: one attention layer, beyond its input."
    )


def progress_bar(console: Console) -> Progress:
    """A bar with the name of the step before it and the time after it."""
    return Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console)


def read_document(file: Path | None) -> str:
    """The text of a file in UTF-8; by default the language reference that Python has for its interactive help.

    Raises:
        OSError: the file can not be read.
    """
    if file is not None:
        return file.read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def tokenize(text: str, tokenizer: str | None) -> tuple[list[int], int]:
    """Token ids of the text and the size of the vocabulary: bytes, or what transformers' tokenizer makes of it."""
    if tokenizer is None:
        return list(text.encode("utf-8")), 256
    if find_spec("transformers") is None:
        raise ModuleNotFoundError("--tokenizer needs transformers: pip install transformers, or leave it away")
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return loaded(text, add_special_tokens=False)["input_ids"], len(loaded)


def embed(ids: Tensor, vocabulary: int) -> Tensor:
    """(1, 1 + T, WIDTH): a global token, then the tokens, each with its position's embedding; random weights."""
    table = torch.randn(1 + vocabulary, WIDTH)
    hidden = table[torch.cat([torch.tensor([vocabulary]), ids])] + torch.randn(1 + len(ids), WIDTH)
    return nn.functional.layer_norm(hidden, (WIDTH,)).unsqueeze(0)


class EncoderLayer(nn.Module):
    """A layer of BART's encoder: attention and feed-forward, each with a residual and a norm after it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = LSGAttention(WIDTH, HEADS)
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, FEED_FORWARD), nn.GELU(), nn.Linear(FEED_FORWARD, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, hidden: Tensor, attend: Attend | None = None) -> Tensor:
        """(1, G+T, WIDTH) -> the same; ``attend`` replaces the attention's forward."""
        attended = self.attention(hidden) if attend is None else attend(self.attention, hidden)
        hidden = self.attention_norm(hidden + attended)
        out: Tensor = self.norm(hidden + self.feed_forward(hidden))
        return out


class EncoderStack(nn.Module):
    """BART-base's encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer() for _ in range(LAYERS))

    def set_pattern(self, pattern: LSGPattern) -> None:
        """Give every layer the same pattern."""
        for attention in self.attentions():
            attention.pattern = pattern

    def attentions(self) -> list[LSGAttention]:
        """The attention layers in order."""
        return [module for module in self.modules() if isinstance(module, LSGAttention)]

    def forward(self, hidden: Tensor, attend: Attend | None = None) -> Tensor:
        """(1, G+T, WIDTH) -> the same; ``attend`` replaces the attention layers' forward."""
        for layer in self.layers:
            hidden = layer(hidden, attend)
        return hidden


def dense_attention(layer: LSGAttention, hidden: Tensor) -> Tensor:
    """The layer's projections around PyTorch's dense attention."""
    query, key, value = layer.project(hidden)
    out = nn.functional.scaled_dot_product_attention(query, key, value)
    projected: Tensor = layer.out_proj(out.transpose(1, 2).flatten(2))
    return projected


def best_seconds(call: Callable[[], object]) -> float:
    """The least time of a few calls."""
    return min(timeit.repeat(call, number=1, repeat=REPETITIONS))


class Check(NamedTuple):
    """What :func:`check_last_layer` found."""

    error: float
    peak_bytes: int | None
    keys_per_query: float


def check_last_layer(stack: EncoderStack, hidden: Tensor) -> Check:
    """Look at the last layer's attention on what reaches it in the stack.

    Returns:
        The error of its output before the projection, of some heads; its peak memory; and how many keys, raw and
        compressed, are in the softmax of a query, on average.
    """
    layer = stack.attentions()[-1]
    pattern, seen = layer.pattern, dict[str, Tensor]()
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: seen.update(hidden=args[0])),
        layer.out_proj.register_forward_pre_hook(lambda _, args: seen.update(out=args[0])),
    ]
    stack(hidden)
    for hook in hooks:
        hook.remove()
    query, key, value = (x[:, :CHECKED_HEADS].double() for x in layer.project(seen["hidden"]))
    projections: tuple[Tensor, ...] | None = None
    if pattern.compression == "lsh":  # the directions of these heads among all
        directions = lsh_directions(pattern, HEADS, WIDTH // HEADS)
        projections = tuple(direction[:CHECKED_HEADS] for direction in directions)
    length, first, scale = hidden.shape[1], pattern.num_global_tokens, (WIDTH // HEADS) ** -0.5
    keep = torch.ones(1, length, dtype=torch.bool)
    expected = reference_attention(query, key, value, keep, pattern, 0.0, scale, projections)
    got = seen["out"].unflatten(-1, (HEADS, -1)).transpose(1, 2)[:, :CHECKED_HEADS]

    tokens = Tokens(query[:, :, first:], key[:, :, first:], keep[:, first:], scale, projections)
    keys = visible_tokens(pattern, length).sum().item()
    if (compression := compress(pattern, tokens)) is not None:  # clusters of lsh can be empty
        keys += (visible_slots(pattern, length).sum(0) * compression.keep[0]).sum().item() / CHECKED_HEADS
    return Check(relative_rms(got, expected), peak_growth(lambda: layer(seen["hidden"])), keys / length)
