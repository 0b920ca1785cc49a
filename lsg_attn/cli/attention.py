"""lsg-attn attention: its options, and what it does with them."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..pattern import SPARSITY_TYPES
from .needs import need_matplotlib, need_transformers
from .output import make_console
from .page import is_page

_SIZES = ("block_size", "sparse_block_size", "sparsity_factor")


def add_attention(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument(
        "file", metavar="FILE", nargs="?", type=Path, help="a text file; by default Python's own language reference"
    )
    parser.add_argument("--model", required=True, help="a model, plain or LSG, by name or folder")
    parser.add_argument(
        "--out", required=True, type=Path, help="the file to write: a PNG, with matplotlib, or an HTML page"
    )
    parser.add_argument(
        "--sparsity-type", nargs="+", default=list(SPARSITY_TYPES), choices=SPARSITY_TYPES, metavar="TYPE",
        help="the types to draw (default: all)",
    )  # fmt: skip
    parser.add_argument("--layer", type=int, help="the encoder layer to draw, from 0 (default: the middle one)")
    parser.add_argument(
        "--tokens", type=int, default=512,
        help="how many tokens of FILE to read; a model with fewer positions is extended (default: %(default)s)",
    )  # fmt: skip
    sizes = parser.add_argument_group("the pattern", "by default as in the model, otherwise as in LSGConfig")
    for key in _SIZES:
        sizes.add_argument("--" + key.replace("_", "-"), type=int, default=argparse.SUPPRESS)
    parser.set_defaults(run=_attention)


def _attention(options: argparse.Namespace) -> None:
    page = is_page(options.out)
    need_transformers("attention")
    if not page:
        need_matplotlib("give --out the name of an HTML page")
    from .attention_maps import read_maps
    from .attention_picture import caption, save_maps, save_maps_page

    sizes = {key: getattr(options, key) for key in _SIZES if hasattr(options, key)}
    reading = read_maps(
        options.file, options.model, options.sparsity_type, num_tokens=options.tokens, layer=options.layer, **sizes
    )
    (save_maps_page if page else save_maps)(options.out, reading)
    console = make_console()
    console.print(f"{options.out}: {caption(reading)}", markup=False, soft_wrap=True)
    pattern = reading.maps[0].pattern
    num_tokens = len(reading.pieces) - pattern.num_global_tokens
    if pattern.is_dense(num_tokens):
        console.print(
            f"{num_tokens} tokens are no more than two blocks of {pattern.block_size}, so all see each other, "
            "whatever the type; see --block-size and --tokens."
        )
