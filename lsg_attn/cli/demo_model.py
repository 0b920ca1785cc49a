"""lsg-attn demo --model and --size: a long document through a whole LSG-BART, and the first tokens of a summary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig

from ..models.bart import LSGBartConfig, LSGBartForConditionalGeneration
from ..models.conversion import convert, load_tokenizer
from .document import read_document
from .measure import measure
from .output import memory_cell, print_table
from .sizes import BART_SIZES

NEW_TOKENS = 16
_FIRST_BYTE_ID = 4  # in a random model a byte's id follows those of BOS, PAD, EOS and UNK


def run_bart_demo(
    console: Console, tokens: int = 4096, file: Path | None = None, model: str | None = None, size: str | None = None
) -> None:
    """Read a document with an LSG-BART, generate a few tokens, and print the time and memory of each step.

    Args:
        console: where to print.
        tokens: how many tokens of the document to read, including BOS and EOS; at least 3.
        file: a text file in UTF-8; by default the language reference in ``pydoc_data``.
        model: name or folder of an LSG-BART, or of a BART, which is converted for this number of tokens.
        size: ``"base"`` or ``"large"`` instead of ``model``: random weights (seed 0), one token per byte.

    Raises:
        OSError: the file or the model cannot be read.
        ValueError: ``tokens`` is below 3 or more than the model reads; neither or both of ``model`` and ``size`` are
            given; ``size`` is unknown; or the folder holds another kind of model.
    """
    if (model is None) == (size is None):
        raise ValueError(f"expected either model or size, got model={model!r} and size={size!r}")
    if size is not None and size not in BART_SIZES:
        raise ValueError(f"size: expected one of {', '.join(BART_SIZES)}, got {size!r}")
    if tokens < 3:
        raise ValueError(f"tokens: expected at least 3, got {tokens}")
    document = read_document(file)
    rows: list[dict[str, str]] = []

    def run_step(name: str, call: Callable[[], Any]) -> Any:
        measured = measure(call)
        peak = None if measured.peak is None else measured.peak.resident
        cells = {"step": name, "s": f"{measured.seconds:.2f}"}
        rows.append(cells | {"peak memory of the process, GiB": memory_cell(peak, 2**30, 2)})
        return measured.result

    if size is not None:
        reader, tokenizer = run_step("build", lambda: (_random_model(size, tokens), None))
    else:
        reader, tokenizer = run_step("load", lambda: load(str(model), tokens))
    ids = encode(document.text, tokenizer, tokens)
    config = reader.config
    what, note = model, "."
    if size is not None:
        what, note = f"BART-{size} size", ", random weights (seed 0): what is shown is cost, not meaning."
    console.print(
        f"{document.source}: {len(document.text)} characters, {ids.shape[1]} tokens. {what}: "
        f"{reader.num_parameters() / 1e6:.0f} million parameters, {config.sparsity_type}, {config.num_global_tokens} "
        f"global, {reader.dtype}, {reader.device}, {torch.get_num_threads()} threads{note}",
        markup=False,
    )
    start = torch.tensor([[config.decoder_start_token_id]])
    greedy = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1}
    with torch.inference_mode():
        run_step("forward", lambda: reader(input_ids=ids, decoder_input_ids=start))
        summary = run_step(f"generate {NEW_TOKENS} tokens", lambda: reader.generate(ids, **greedy))
    print_table(console, rows)
    generated = summary[0].tolist() if tokenizer is None else tokenizer.decode(summary[0], skip_special_tokens=True)
    console.print(f"generated: {generated}", markup=False)


def load(path: str, num_tokens: int) -> tuple[Any, Any]:
    """Load an LSG-BART and its tokenizer from a name or folder; a BART is converted to read ``num_tokens`` tokens."""
    if isinstance(AutoConfig.from_pretrained(path), LSGBartConfig):
        return LSGBartForConditionalGeneration.from_pretrained(path), load_tokenizer(path)
    return convert(path, max_length=num_tokens)


def _random_model(size_name: str, num_tokens: int) -> LSGBartForConditionalGeneration:
    size = BART_SIZES[size_name]
    torch.manual_seed(0)
    config = LSGBartConfig(
        d_model=size.width,
        encoder_layers=size.layers,
        decoder_layers=size.layers,
        encoder_attention_heads=size.heads,
        decoder_attention_heads=size.heads,
        encoder_ffn_dim=size.feed_forward,
        decoder_ffn_dim=size.feed_forward,
        max_position_embeddings=num_tokens,
    )
    model: LSGBartForConditionalGeneration = LSGBartForConditionalGeneration(config).eval()
    return model


def encode(text: str, tokenizer: Any, num_tokens: int) -> torch.Tensor:
    """The ids of at most ``num_tokens`` tokens, BOS and EOS included: (1, tokens), int64.

    Without a tokenizer (None) each byte of the text is a token.
    """
    if tokenizer is not None:
        ids: torch.Tensor = tokenizer(text, truncation=True, max_length=num_tokens, return_tensors="pt")["input_ids"]
        return ids
    body = [_FIRST_BYTE_ID + byte for byte in text.encode("utf-8")[: num_tokens - 2]]
    return torch.tensor([[0, *body, 2]])
