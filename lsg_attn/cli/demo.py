"""lsg-attn demo: a long document through a BART-base-sized encoder stack, once for each sparsity type."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from ..call import Call
from ..compression import Tokens, compress, lsh_directions
from ..layer import LSGAttention
from ..pattern import SPARSITY_TYPES, LSGPattern
from ..reference import reference_attention, visible_slots, visible_tokens
from ..testing import relative_rms
from .document import read_document
from .measure import measure
from .output import memory_cell, print_table, progress_bar
from .sizes import BART_SIZES

SIZE = BART_SIZES["base"]
CHECKED_HEADS = 1  # the dense reference takes about 40 bytes per pair of positions and head
REPETITIONS = 2
Attend = Callable[[LSGAttention, Tensor], Tensor]


def run_demo(console: Console, tokens: int = 4096, file: Path | None = None, tokenizer: str | None = None) -> None:
    """Read a document, run the stack with each sparsity type and with dense attention, and print a table.

    Args:
        console: where to print.
        tokens: how many tokens of the document to read.
        file: a text file in UTF-8; by default the language reference in ``pydoc_data``.
        tokenizer: a name or folder for transformers' ``AutoTokenizer``; by default each byte is a token.

    Raises:
        OSError: the file cannot be read.
        ValueError: the document is empty, or ``tokens`` is not positive.
        ModuleNotFoundError: ``tokenizer`` was given and transformers is not installed.
    """
    if tokens < 1:
        raise ValueError(f"tokens: expected at least 1, got {tokens}")
    document = read_document(file)
    ids, vocabulary = tokenize(document.text, tokenizer)
    if not ids:
        raise ValueError(f"the document has no tokens: {document.source}")
    ids = ids[:tokens]
    console.print(
        f"{document.source}: {len(document.text)} characters, the first {len(ids)} tokens of "
        f"{tokenizer or 'one byte each'}. {SIZE.layers} layers, width {SIZE.width}, {SIZE.heads} heads, float32, "
        f"{torch.get_num_threads()} threads, random weights (seed 0): what is shown is cost and error, not meaning.",
        markup=False,
    )
    torch.manual_seed(0)
    hidden = embed(torch.tensor(ids), vocabulary)
    stack = EncoderStack().eval()
    rows: list[dict[str, str]] = []
    with torch.inference_mode(), progress_bar(console) as progress:
        task = progress.add_task("dense attention", total=1 + 2 * len(SPARSITY_TYPES))
        dense_seconds = measure(lambda: stack(hidden, dense_attention), REPETITIONS).seconds
        progress.advance(task)
        for sparsity_type in SPARSITY_TYPES:
            pattern = LSGPattern(sparsity_type=sparsity_type)
            stack.set_pattern(pattern)
            progress.update(task, description=f"{sparsity_type}: {SIZE.layers} layers")
            seconds = measure(lambda: stack(hidden), REPETITIONS).seconds
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
                    "attention's peak memory, MB": memory_cell(check.peak_bytes, 1e6, 0),
                    "speed against dense": f"{dense_seconds / seconds:.2f}x",
                }
            )
    print_table(console, rows, f"dense attention: {hidden.shape[1]} keys per query, {dense_seconds:.2f} s")
    console.print(
        "error: relative RMS of the last layer's attention over the whole document against the dense reference in "
        f"float64, {CHECKED_HEADS} head of {SIZE.heads}. Peak memory: one attention layer, beyond its input."
    )


def tokenize(text: str, tokenizer: str | None) -> tuple[list[int], int]:
    """Token ids of a text, by a tokenizer of transformers or (None) one per byte, and the size of the vocabulary.

    Raises:
        ModuleNotFoundError: a tokenizer is named and transformers is not installed.
    """
    if tokenizer is None:
        return list(text.encode("utf-8")), 256
    if find_spec("transformers") is None:
        raise ModuleNotFoundError("--tokenizer needs transformers: pip install transformers, or omit --tokenizer")
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return loaded(text, add_special_tokens=False)["input_ids"], len(loaded)


def embed(ids: Tensor, vocabulary: int) -> Tensor:
    """Random embeddings of a global token and the T tokens, positions added: (1, 1 + T, width), float32."""
    table = torch.randn(1 + vocabulary, SIZE.width)
    hidden = table[torch.cat([torch.tensor([vocabulary]), ids])] + torch.randn(1 + len(ids), SIZE.width)
    return nn.functional.layer_norm(hidden, (SIZE.width,)).unsqueeze(0)


class EncoderLayer(nn.Module):
    """A layer of BART's encoder: attention and feed-forward, each followed by a residual sum and a norm."""

    def __init__(self) -> None:
        super().__init__()
        width, inner = SIZE.width, SIZE.feed_forward
        self.attention = LSGAttention(width, SIZE.heads)
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, hidden: Tensor, attend: Attend | None = None) -> Tensor:
        """(1, G+T, width) to the same shape; ``attend`` replaces the attention's forward."""
        attended = self.attention(hidden) if attend is None else attend(self.attention, hidden)
        hidden = self.attention_norm(hidden + attended)
        out: Tensor = self.norm(hidden + self.feed_forward(hidden))
        return out


class EncoderStack(nn.Module):
    """BART-base's encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer() for _ in range(SIZE.layers))

    def set_pattern(self, pattern: LSGPattern) -> None:
        """Give every layer the same pattern."""
        for attention in self.attentions():
            attention.pattern = pattern

    def attentions(self) -> list[LSGAttention]:
        """The attention layers in order."""
        return [module for module in self.modules() if isinstance(module, LSGAttention)]

    def forward(self, hidden: Tensor, attend: Attend | None = None) -> Tensor:
        """(1, G+T, width) to the same shape; ``attend`` replaces the attention layers' forward."""
        for layer in self.layers:
            hidden = layer(hidden, attend)
        return hidden


def dense_attention(layer: LSGAttention, hidden: Tensor) -> Tensor:
    """PyTorch's dense attention between the layer's projections: (1, G+T, width) to the same shape."""
    query, key, value = layer.project(hidden)
    out = nn.functional.scaled_dot_product_attention(query, key, value)
    projected: Tensor = layer.out_proj(out.transpose(1, 2).flatten(2))
    return projected


class Check(NamedTuple):
    """What :func:`check_last_layer` found."""

    error: float  # relative RMS of some heads' output, before the output projection, against the dense reference
    peak_bytes: int | None  # of one call of the layer, beyond its input; None where the system does not report it
    keys_per_query: float  # raw and compressed keys in the softmax of a query, on average


def check_last_layer(stack: EncoderStack, hidden: Tensor) -> Check:
    """Check and measure the last layer's attention on the hidden states (1, G+T, width) that reach it in the stack."""
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
    projections: tuple[Tensor, ...] = ()
    if pattern.rule.is_hashed:  # those that the layer drew for these heads
        directions = lsh_directions(pattern, SIZE.heads, SIZE.head_dim)
        projections = tuple(direction[:CHECKED_HEADS] for direction in directions)
    length, first, scale = hidden.shape[1], pattern.num_global_tokens, SIZE.head_dim**-0.5
    keep = torch.ones(1, length, dtype=torch.bool)
    expected, _ = reference_attention(Call(query, key, value, None, None, projections, 0.0, scale, pattern))
    got = seen["out"].unflatten(-1, (SIZE.heads, -1)).transpose(1, 2)[:, :CHECKED_HEADS]

    tokens = Tokens(query[:, :, first:], key[:, :, first:], keep[:, first:], scale, projections or None)
    keys = visible_tokens(pattern, length).sum().item()
    if (compression := compress(pattern, tokens)) is not None:  # clusters of lsh can be empty
        keys += (visible_slots(pattern, length).sum(0) * compression.keep[0]).sum().item() / CHECKED_HEADS
    peak = measure(lambda: layer(seen["hidden"])).peak
    return Check(relative_rms(got, expected), None if peak is None else peak.growth, keys / length)
