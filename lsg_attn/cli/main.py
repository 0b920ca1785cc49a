"""The command lsg-attn: `lsg-attn demo`, `convert`, `pattern`, `attention` and `doctor`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import __version__
from ..pattern import SPARSITY_TYPES, LSGPattern
from .attention import add_attention
from .demo import run_demo
from .demo_encoder import run_encoder_demo
from .doctor import run_doctor
from .draw import kinds_of_keys, print_pattern, save_pattern
from .needs import need_matplotlib, need_transformers
from .output import make_console, progress_bar
from .page import is_page
from .pattern_page import save_pattern_page
from .sizes import BART_SIZES

_NEXT = """
Where to go next:
  lsg-attn doctor                      which implementation runs on this machine, and why
  lsg-attn pattern --out pattern.html  a page that shows which keys each query sees
  lsg-attn demo --file FILE            the same with a document of yours
  docs/index.md                        tutorials: load a checkpoint, convert an encoder, use the layer"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with ``arguments``, by default those of the process; bad ones exit with status 2."""
    parser = argparse.ArgumentParser(prog="lsg-attn", description="Local + Sparse + Global attention.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands.add_parser("demo", help="run a long document through an LSG encoder with each sparsity type"))
    _add_convert(commands.add_parser("convert", help="convert a checkpoint to an LSG model for long documents"))
    _add_pattern(commands.add_parser("pattern", help="draw which keys each query sees"))
    add_attention(commands.add_parser("attention", help="draw what a model attends to in a document"))
    _add_doctor(commands.add_parser("doctor", help="say what is installed and which implementation runs; check it"))
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (OSError, ValueError, ImportError) as error:
        parser.exit(2, f"lsg-attn: {' '.join(str(error).split())}\n")  # in one line, as those of transformers are not


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--file", type=Path, help="a text file; by default Python's own language reference")
    parser.add_argument(
        "--tokens", type=int, default=4096, help="how many of its tokens to read (default: %(default)s)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--tokenizer", help="a tokenizer of transformers, by name or folder; by default each byte is a token"
    )
    what.add_argument(
        "--model", help="an LSG-BART or BART, by name or folder, to read the document and begin a summary"
    )
    what.add_argument("--size", choices=tuple(BART_SIZES), help="the same with a random LSG-BART of this BART's size")
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> None:
    if options.model is None and options.size is None:
        console = make_console()
        run_demo(console, options.tokens, options.file, options.tokenizer)
        run_encoder_demo(console, options.tokens, options.file)
        console.print(_NEXT, markup=False, highlight=False)
        return
    need_transformers("--model" if options.size is None else "--size")
    from .demo_model import run_bart_demo

    run_bart_demo(make_console(), options.tokens, options.file, options.model, options.size)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a model, plain or LSG, by name or folder")
    parser.add_argument("destination", metavar="DST", type=Path, help="the folder to create")
    parser.add_argument(
        "--max-length", type=int, default=4096, help="the longest document in tokens (default: %(default)s)"
    )
    parser.add_argument("--tokenizer", help="a tokenizer by name or folder, if SRC has none")
    parser.add_argument("--architecture", help="the class to load SRC as (default: the one that SRC names)")
    parser.add_argument(
        "--random-global-init", action="store_true", help="draw the global tokens' embeddings at random"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of every random number (default: %(default)s)")
    parser.add_argument(
        "--keep-first-global-token",
        action="store_true",
        help="of an LSG model: make all global tokens again except the first",
    )
    parser.add_argument(
        "--resize-lsg",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="of an LSG model: keep the global tokens (default), or make all again",
    )
    parser.add_argument(
        "--use-token-ids",
        action=argparse.BooleanOptionalAction,
        help="add the embedding of segment 0 to the global tokens (default: for BERT, ELECTRA and ALBERT)",
    )
    parser.add_argument(
        "--use-safetensors",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read safetensors alone (default), or a pickle, pytorch_model.bin, of a source that you trust",
    )
    parser.add_argument(
        "--global-positional-stride",
        type=int,
        default=64,
        help="about the distance between global tokens' positions (default: %(default)s)",
    )
    keys = parser.add_argument_group("the encoder", "by default as in SRC, otherwise as in LSGConfig")
    for key in ("block_size", "sparse_block_size", "sparsity_factor", "num_global_tokens", "lsh_num_pre_rounds"):
        keys.add_argument(_flag(key), type=int, default=argparse.SUPPRESS)
    keys.add_argument("--sparsity-type", choices=SPARSITY_TYPES, default=argparse.SUPPRESS)
    for key in ("mask_first_token", "pass_global_tokens_to_decoder", "pool_with_global"):
        keys.add_argument(_flag(key), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)
    parser.set_defaults(run=_convert)


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _convert(options: argparse.Namespace) -> None:
    need_transformers("convert")
    from ..models.checkpoint import CHECKPOINT_STEPS, convert_checkpoint
    from ..models.conversion import load_tokenizer

    arguments = {key: value for key, value in vars(options).items() if key != "run"}
    if options.tokenizer is not None:
        arguments["tokenizer"] = load_tokenizer(options.tokenizer)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was written is removed
    with progress_bar(make_console()) as progress:
        task = progress.add_task("", total=len(CHECKPOINT_STEPS), completed=-1)
        try:
            convert_checkpoint(**arguments, on_step=lambda step: progress.update(task, description=step, advance=1))
        except (TypeError, RuntimeError) as error:  # a key that this family does not have; a file that came out wrong
            raise ValueError(str(error)) from error
        progress.advance(task)
    console = make_console()
    console.print(f"{options.destination}: up to {options.max_length} tokens", markup=False)
    if getattr(options, "num_global_tokens", 1) > 1:
        console.print("Global tokens after the first are untrained, and make results worse until they are trained.")


def _add_pattern(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=48, help="T, tokens after the globals (default: %(default)s)")
    parser.add_argument(
        "--padding", type=int, default=0, help="how many of the last tokens are padding (default: %(default)s)"
    )
    parser.add_argument(
        "--head", type=int, default=0, help="the head to show, for types whose heads differ (default: %(default)s)"
    )
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--sparse-block-size", type=int, default=8)
    parser.add_argument("--sparsity-factor", type=int, default=4)
    parser.add_argument("--sparsity-type", nargs="+", default=["norm"], choices=SPARSITY_TYPES, metavar="TYPE")
    parser.add_argument("--num-global-tokens", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, help="write a PNG, with matplotlib, or an HTML page here, instead of printing text"
    )
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
    what = (options.tokens, options.padding, options.head)
    if options.out is None:
        for pattern in patterns:
            print_pattern(make_console(), pattern, kinds_of_keys(pattern, *what))
    elif is_page(options.out):
        save_pattern_page(options.out, patterns, *what)
    else:
        need_matplotlib("give --out the name of an HTML page, or omit it to print text")
        save_pattern(options.out, patterns, [kinds_of_keys(pattern, *what) for pattern in patterns])


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    for name, default in (("tokens", 4096), ("heads", 16), ("head-dim", 64), ("num-global-tokens", 1)):
        parser.add_argument(f"--{name}", type=int, default=default, help="of the call (default: %(default)s)")
    parser.add_argument("--sparsity-type", default="norm", choices=SPARSITY_TYPES, help="(default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float64", "float32", "bfloat16", "float16"))
    parser.add_argument("--device", help="(default: the first GPU, or the CPU without one)")
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> None:
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # what torch raises for a name, or a device that is not here
        raise ValueError(f"--device: {str(error).splitlines()[0]}") from error
    pattern = LSGPattern(sparsity_type=options.sparsity_type, num_global_tokens=options.num_global_tokens)
    shape = (options.heads, options.tokens, options.head_dim)
    if min(shape) < 1:
        raise ValueError(f"expected --heads, --tokens and --head-dim of at least 1, got {shape}")
    if not run_doctor(make_console(), shape, getattr(torch, options.dtype), device, pattern):
        sys.exit(1)


if __name__ == "__main__":
    main()
