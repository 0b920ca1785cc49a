"""The command lsg-attn: `lsg-attn demo` and `lsg-attn pattern`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from . import __version__
from .demo import run_demo
from .draw import kinds_of_keys, print_pattern, save_pattern
from .pattern import SPARSITY_TYPES, LSGPattern


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; ``arguments`` are those of the process by default. Bad ones end it with status 2."""
    parser = argparse.ArgumentParser(prog="lsg-attn", description="Local + Sparse + Global attention.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands.add_parser("demo", help="run a long document through an LSG encoder, each sparsity type"))
    _add_pattern(commands.add_parser("pattern", help="draw which keys each query sees"))
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        parser.exit(2, f"lsg-attn: {error}\n")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--file", type=Path, help="a text file; by default Python's own language reference")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens to take of it (default: %(default)s)")
    parser.add_argument("--tokenizer", help="a tokenizer for transformers, by name or folder; by default bytes")
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> None:
    run_demo(_console(), options.tokens, options.file, options.tokenizer)


def _add_pattern(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=48, help="T, tokens after the globals (default: %(default)s)")
    parser.add_argument("--padding", type=int, default=0, help="how many of the last tokens are padding")
    parser.add_argument("--head", type=int, default=0, help="which head, for types that differ between heads")
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--sparse-block-size", type=int, default=8)
    parser.add_argument("--sparsity-factor", type=int, default=4)
    parser.add_argument("--sparsity-type", nargs="+", default=["norm"], choices=SPARSITY_TYPES, metavar="TYPE")
    parser.add_argument("--num-global-tokens", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write a PNG there, with matplotlib, instead of text to the terminal")
    parser.set_defaults(run=_pattern)


def _pattern(options: argparse.Namespace) -> None:
    patterns = [
        LSGPattern(
            block_size=options.block_size,
            sparse_block_size=options.sparse_block_size,
            sparsity_factor=options.sparsity_factor,
            sparsity_type=sparsity_type,
            num_global_tokens=options.num_global_tokens,
        )
        for sparsity_type in options.sparsity_type
    ]
    kinds = [kinds_of_keys(pattern, options.tokens, options.padding, options.head) for pattern in patterns]
    if options.out is None:
        for pattern, matrix in zip(patterns, kinds, strict=True):
            print_pattern(_console(), pattern, matrix)
        return
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("--out needs matplotlib: pip install 'lsg-attn[plot]', or leave --out away for text")
    save_pattern(options.out, patterns, kinds)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=120)  # a pipe has no width of its own


if __name__ == "__main__":
    main()
