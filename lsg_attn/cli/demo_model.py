"""lsg-attn demo --model and --size: a long document through a whole LSG-BART, and the first tokens of a summary."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from ..bart.configuration import LSGBartConfig
from ..bart.conversion import convert, load_tokenizer
from ..bart.modeling import LSGBartForConditionalGeneration
from ..memory import peak_resident
from .demo import read_document

# width, layers, heads and feed-forward of each of the two stacks (arXiv 1910.13461)
SIZES = {"base": (768, 6, 12, 3072), "large": (1024, 12, 16, 4096)}
NEW_TOKENS = 16
_BYTES_FROM = 4  # of a random model, a byte's token: after BOS, PAD, EOS and UNK


def run_bart_demo(
    console: Console, tokens: int = 4096, file: Path | None = None, model: str | None = None, size: str | None = None
) -> None:
    """Read a document with an LSG-BART, generate, and print what each step took.

    Args:
        console: where to print.
        tokens: how many tokens of the document to take, BOS and EOS included; at least 3.
        file: a text file in UTF-8; by default the language reference in ``pydoc_data``.
        model: name or directory of an LSG-BART, or of a BART, which is converted for as many tokens.
        size: ``"base"`` or ``"large"``, instead of ``model``: random weights (seed 0), one token a byte.

    Raises:
        OSError: the file or the model can not be read.
        ValueError: ``tokens`` is too few, or more than the model reads; neither or both of ``model`` and ``size`` are
            given; or the directory holds another model.
    """
    if (model is None) == (size is None):
        raise ValueError(f"expected either model or size, got model={model!r} and size={size!r}")
    if size is not None and size not in SIZES:
        raise ValueError(f"size: expected one of {', '.join(SIZES)}, got {size!r}")
    if tokens < 3:
        raise ValueError(f"tokens: expected at least 3, got {tokens}")
    text = read_document(file)
    steps: list[tuple[str, float, int | None]] = []
    if size is not None:
        reader, tokenizer = _measured(steps, "build", lambda: (_random_model(size, tokens), None))
    else:
        reader, tokenizer = _measured(steps, "load", lambda: load(str(model), tokens))
    ids = encode(text, tokenizer, tokens)
    config = reader.config
    what, note = model, "."
    if size is not None:
        what, note = f"BART-{size} size", ", random weights (seed 0): what is shown is cost, not meaning."
    console.print(
        f"{file or 'pydoc_data.topics'}: {len(text)} characters, {ids.shape[1]} tokens. {what}: "
        f"{reader.num_parameters() / 1e6:.0f} million parameters, {config.sparsity_type}, {config.num_global_tokens} "
        f"global, {reader.dtype}, {reader.device}, {torch.get_num_threads()} threads{note}",
        markup=False,
    )
    start = torch.tensor([[config.decoder_start_token_id]])
    with torch.inference_mode():
        _measured(steps, "forward", lambda: reader(input_ids=ids, decoder_input_ids=start))
        summary = _measured(
            steps,
            f"generate {NEW_TOKENS} tokens",
            lambda: reader.generate(
                ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1
            ),
        )
    table = Table("step", "s", "peak memory of the process, GiB")
    for name, seconds, peak in steps:
        table.add_row(name, f"{seconds:.2f}", "n/a" if peak is None else f"{peak / 2**30:.2f}")
    console.print(table)
    got = summary[0].tolist() if tokenizer is None else tokenizer.decode(summary[0], skip_special_tokens=True)
    console.print(f"generated: {got}", markup=False)


def load(path: str, num_tokens: int) -> tuple[Any, Any]:
    """The LSG-BART at a path and its tokenizer; a BART there is converted for documents of ``num_tokens``."""
    if isinstance(AutoConfig.from_pretrained(path), LSGBartConfig):
        return LSGBartForConditionalGeneration.from_pretrained(path), load_tokenizer(path)
    return convert(path, max_length=num_tokens)


def _random_model(size: str, num_tokens: int) -> LSGBartForConditionalGeneration:
    width, layers, heads, feed_forward = SIZES[size]
    torch.manual_seed(0)
    config = LSGBartConfig(
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=feed_forward,
        decoder_ffn_dim=feed_forward,
        max_position_embeddings=num_tokens,
    )
    model: LSGBartForConditionalGeneration = LSGBartForConditionalGeneration(config).eval()
    return model


def encode(text: str, tokenizer: Any, num_tokens: int) -> torch.Tensor:
    """(1, up to num_tokens) token ids, from BOS to EOS."""
    if tokenizer is not None:
        ids: torch.Tensor = tokenizer(text, truncation=True, max_length=num_tokens, return_tensors="pt")["input_ids"]
        return ids
    body = [_BYTES_FROM + byte for byte in text.encode("utf-8")[: num_tokens - 2]]
    return torch.tensor([[0, *body, 2]])


def _measured(steps: list[tuple[str, float, int | None]], name: str, call: Callable[[], Any]) -> Any:
    """The result of a call, whose time and peak memory are added to ``steps``."""
    results: list[Any] = []
    begin = time.perf_counter()
    peak = peak_resident(lambda: results.append(call()))
    steps.append((name, time.perf_counter() - begin, peak))
    return results[0]
