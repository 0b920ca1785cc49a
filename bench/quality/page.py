"""The sections of docs/quality.md that are made of the files of results: answers, every row, what was read."""

from __future__ import annotations

import csv
from pathlib import Path

from bench.quality import answers, cells
from bench.quality.figures import LATE, TITLE, Figures
from bench.quality.intervals import RESAMPLES
from bench.quality.retrieval import FIRST_PIECE, PIECES
from bench.quality.settings import DENSE, TYPES, Setting, settings
from bench.report import with_section

COMMAND = "python -m bench.quality --page docs/quality.md"
_PUBLISHED = "published.csv"


def with_figures(text: str, folder: Path) -> str:
    """A page's text with the sections that the files of a folder give: the answers in short, and everything else.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not that of one run, or the text lacks a section's marks.
    """
    figures = Figures(folder)
    text = with_section(text, answers.in_short(figures), marks("in short"))
    return with_section(text, _tables(figures, folder), marks("tables"))


def marks(section: str) -> tuple[str, str]:
    """What stands before and after a section."""
    return f"<!-- begin {section}: {COMMAND} -->\n", f"<!-- end {section}: {COMMAND} -->\n"


def _tables(figures: Figures, folder: Path) -> list[str]:
    return [
        *answers.types(figures),
        *_PICTURE,
        *answers.sizes(figures),
        *answers.first_tokens(figures),
        *answers.against_plain(figures),
        *_every_row(figures),
        *_what_was_read(figures),
        *_published(folder / _PUBLISHED),
    ]


_PICTURE = [
    "![Score against speed, both relative to the mean of pieces. Types by colour, block sizes by shape](quality.png)",
    "",
    "*A mark is a mean over the factors, the line through it the interval of its difference from the mean of pieces. "
    "A dot is one factor, larger for a larger one. Drawn by `python -m bench.quality --plot docs/quality.png`.*",
    "",
]  # fmt: skip


def _every_row(figures: Figures) -> list[str]:
    """All figures of all rows."""
    pieces = figures.score(PIECES)
    rows = {}
    for label in sorted(figures.labels, key=_place):
        cosines = (figures.cosine(label, key) for key in ("cosine_128", "cosine_512", "cosine"))
        rows[label] = [
            *map(cells.cosine, cosines),
            *answers.retrieval(figures, label),
            cells.against(figures.score(label), pieces) if label != PIECES else "",
            *cells.kept(figures, [label]),
            *cells.cost(figures, [label]),
        ]
    columns = ["", "cosine, 128 tokens", "512 tokens", "long", *answers.RETRIEVAL, "score against pieces"]
    return [
        "## Every row",
        "",
        "A row is named by type, block size and factor.",
        "",
        *cells.table([*columns, *answers.KEPT, *answers.COST], rows),
    ]


def _place(label: str) -> tuple[object, ...]:
    """Where a row stands: the plain model, dense attention, the grid by type and sizes, the others."""
    first = [FIRST_PIECE, PIECES, DENSE.label]
    if label in first:
        return (0, first.index(label))
    found = next((setting for setting in settings() if setting.label == label), None)
    if found is None or found != Setting(found.sparsity_type, found.block_size, found.sparsity_factor):
        return (2, label)
    return (1, [*TYPES, "none"].index(found.sparsity_type), found.block_size, found.sparsity_factor)


def _what_was_read(figures: Figures) -> list[str]:
    """Counts, versions and machine."""
    run, cost = figures.runs["retrieval"], figures.runs["cost"]
    sources = [name.split(":")[0] for name in figures.names]
    versions = ", ".join(f"{name} {run['versions'][name]}" for name in ("torch", "transformers", "numpy"))
    return [
        "## What was read and asked",
        "",
        f"- {len(figures.names)} documents: {sources.count('help')} topics of Python's help, {sources.count('module')} "
        f"modules in packages of the standard library, {sources.count('numpy')} functions and classes of numpy. "
        f"Without their questions they have {min(figures.tokens):,} to {max(figures.tokens):,} tokens, "
        f"{sum(figures.tokens):,} in all.",
        f"- {figures.questions(TITLE)} questions by title, {figures.questions(LATE)} by a sentence of the last third.",
        f"- Intervals: {RESAMPLES:,} resamples of the documents.",
        f"- Retrieval: {run['date'][:10]}, commit {run['commit']}, Python {run['python']}, {versions}.",
        f"- Time and memory: {cost['date'][:10]}, commit {cost['commit']}, {cost['device']}, {cost['threads']} "
        f"{'thread' if cost['threads'] == 1 else 'threads'}.",
        "",
    ]


def _published(path: Path) -> list[str]:
    """The figures of the original's authors."""
    with path.open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    models = [row for row in found if row["table"] == "models"]
    by_type = [row for row in found if row["table"] == "types"]
    rouge = ("rouge1", "rouge2", "rougeLsum")
    rows = {_card(row): [row["dataset"], row["global_tokens"], *(row[name] for name in rouge)] for row in models}
    datasets = list(dict.fromkeys(row["dataset"] for row in by_type))
    types: dict[str, list[str]] = {}
    for row in by_type:
        types.setdefault(f"`{row['sparsity_type']}`", []).append(" / ".join(row[name] for name in rouge))
    return [
        "## Published figures of trained models",
        "",
        "Figures of the original's authors, as the cards of their models give them. They were not measured here, where "
        "no weights can be downloaded. The models are BART-base, converted and trained on the dataset, with local and "
        "global attention alone (`sparsity_type=\"none\"`, B = 256). The last column is ROUGE-Lsum, the ROUGE-L of a "
        "summary whose sentences are lines.",
        "",
        *cells.table(["", "dataset", "global tokens", "ROUGE-1", "ROUGE-2", "ROUGE-Lsum"], rows),
        "The newest cards of the 4,096-token models also compare types, at B = 128 and f = 4 (ROUGE-1 / ROUGE-2 / "
        "ROUGE-Lsum):",
        "",
        *cells.table(["type", *datasets], types),
        "Where the weights can be downloaded, these commands measure them. The first of each pair gives the checkpoint "
        "the pattern of its row. The file has a JSON object per line, with a `document` and a `summary`, here of the "
        "dataset's test split.",
        "",
        "```text",
        *dict.fromkeys(command for row in models for command in _commands(row)),
        "```",
        "",
    ]  # fmt: skip


def _card(row: dict[str, str]) -> str:
    return f"[{row['model']}, {row['revision']}](https://huggingface.co/ccdv/{row['model']}/blob/{row['revision']}/README.md)"


def _commands(row: dict[str, str]) -> list[str]:
    name = row["model"]
    pattern = f"--block-size {row['block_size']} --sparsity-type {row['sparsity_type']}"
    sizes = f"--max-length {name.split('-')[3]} --num-global-tokens {row['global_tokens']} {pattern}"
    return [
        f"lsg-attn convert ccdv/{name} {name} {sizes}",
        f"python examples/evaluate.py {row['dataset'].lower()}-test.jsonl --model {name}",
    ]
