"""Embed one text of any length with an LSG encoder, each process with a share of its tokens.

    lsg-attn convert sentence-transformers/all-MiniLM-L6-v2 lsg-encoder --max-length 1048576 --mask-first-token
    torchrun --nproc-per-node 2 examples/long_document.py book.txt --model lsg-encoder

Without a file, it reads a million bytes of Python's help. Processes talk by gloo on CPUs and by NCCL on GPUs, one
process for each GPU. The embedding is the mean of the last states of all tokens, with length 1.

What a process sends and receives does not depend on the length of the document. On CPUs the weights are mapped from the
file: of the position table, which takes 1.6 GB at a million positions of 384 numbers, a process has only the rows of
its own tokens in memory.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from token_ids import between_special_ids, ids_of, read_text
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from lsg_attn.communication import Group
from lsg_attn.memory import peak_memory
from lsg_attn.models import parallelize

WARM_UP = 1024  # tokens


@torch.inference_mode()
def embed(model: Any, ids: Tensor) -> tuple[Tensor, int]:
    """The embedding (width,) of a document, ids (1, tokens), and how many of its tokens are this process's."""
    states = model(ids).last_hidden_state
    total = states.sum((0, 1), dtype=torch.float64)
    dist.all_reduce(total)
    return normalize(total, dim=0), states.shape[1]


def broadcast_ids(ids: Tensor | None, device: torch.device) -> Tensor:
    """The ids (1, tokens) that the first process has, on all."""
    length = torch.tensor([0 if ids is None else len(ids)], device=device)
    dist.broadcast(length, 0)
    everywhere = torch.empty(int(length), dtype=torch.int64, device=device) if ids is None else ids.to(device)
    dist.broadcast(everywhere, 0)
    return everywhere.unsqueeze(0)


def peak_of(call: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes in use while ``call`` runs: of the GPU's memory, or of this process's; None if unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated()
    peak = peak_memory(call)
    return None if peak is None else peak.resident


def measure(model: Any, ids: Tensor, group: Group) -> tuple[Tensor, dict[str, Any]]:
    """The embedding of ids (1, tokens), and what it took of this process."""
    embed(model, ids[:, :WARM_UP])  # what is compiled or connected once is not measured
    before, found = group.received_bytes, {}

    def step() -> None:
        begin = time.perf_counter()
        found["embedding"], found["tokens"] = embed(model, ids)
        found["numbers"] = found["embedding"].tolist()  # waits for a GPU
        found["seconds"] = time.perf_counter() - begin

    dist.barrier()
    peak = peak_of(step, ids.device)
    row = {"tokens": found["tokens"], "seconds": found["seconds"], "peak": peak}
    return found["embedding"], row | {"received": group.received_bytes - before}


def print_rows(rows: list[dict[str, Any]], what: str) -> None:
    """Print a table with a line for each process."""
    tokens, seconds = sum(row["tokens"] for row in rows), max(row["seconds"] for row in rows)
    print(f"{tokens:,} tokens, {len(rows)} processes, {what}: {seconds:.2f} s, {tokens / seconds:,.0f} tokens/s")
    print(f"{'rank':>4} {'tokens':>11} {'tokens/s':>10} {'peak MiB':>10} {'received bytes':>15}")
    for rank, row in enumerate(rows):
        peak = "n/a" if row["peak"] is None else f"{row['peak'] / 2**20:,.0f}"
        speed = row["tokens"] / row["seconds"]
        print(f"{rank:>4} {row['tokens']:>11,} {speed:>10,.0f} {peak:>10} {row['received']:>15,}")


def main() -> None:
    """Read the text, share it out, and print the embedding and what it took."""
    parser = argparse.ArgumentParser(description="Embed one long text, shared out over the processes of torchrun.")
    parser.add_argument(
        "file", type=Path, nargs="?", help="a text in UTF-8 (default: a million bytes of Python's help)"
    )
    parser.add_argument("--model", required=True, help="name or folder of an LSG encoder, as `lsg-attn convert` writes")
    parser.add_argument("--tokens", type=int, help="read only so many tokens, CLS and SEP included (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error("expected to be started by torchrun, as in torchrun --nproc-per-node 2 examples/long_document.py")
    if options.tokens is not None and options.tokens < 3:
        parser.error(f"--tokens: expected at least 3, got {options.tokens}")
    logging.disable_progress_bar()

    device = torch.device(options.device)
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    group, ids = Group(dist.group.WORLD), None
    if group.rank:
        logging.set_verbosity_error()  # the first process says it
    try:
        model = AutoModel.from_pretrained(options.model, use_safetensors=True)
        parallelize(model, group, gather_outputs=False)
    except (OSError, TypeError, ValueError) as error:
        parser.error(f"--model: expected an LSG encoder, as `lsg-attn convert` writes, got {options.model}: {error}")
    model = model.to(device, torch.float32 if options.device == "cpu" else torch.bfloat16).eval()
    if group.rank == 0:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        try:
            text = read_text(options.file, num_bytes=10**6)
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"expected a text file in UTF-8 at {options.file}: {error}")
        ids = between_special_ids(ids_of(text, tokenizer)[: options.tokens and options.tokens - 2], tokenizer)
        if options.tokens is not None and len(ids) < options.tokens:
            parser.error(f"--tokens: expected at most {len(ids)}, as the text has no more, got {options.tokens}")
    ids = broadcast_ids(ids, device)

    try:
        model.check_length(ids.shape[1], model.config.max_position_embeddings - model.position_offset())
    except ValueError as error:
        parser.error(str(error))
    embedding, row = measure(model, ids, group)
    rows: list[Any] = [None] * group.size
    dist.all_gather_object(rows, row)
    if group.rank == 0:
        print_rows(rows, f"{options.device}, {model.dtype}")
        print("embedding:", *(f"{x:+.7f}" for x in embedding[:8].tolist()), "...")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
