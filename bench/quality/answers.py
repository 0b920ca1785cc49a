"""The answers of docs/quality.md: which type, which sizes, which global tokens, and whether it is worth it."""

from __future__ import annotations

import numpy as np

from bench.quality import cells
from bench.quality.figures import LATE, TITLE, Figures, difference, recall_at, reciprocal
from bench.quality.intervals import Floats
from bench.quality.retrieval import FIRST_PIECE, PIECES
from bench.quality.settings import BLOCKS, DENSE, FACTORS, TYPES, Setting, grid, settings

MEASURES = {"recall@1": recall_at(1), "recall@5": recall_at(5), "MRR": reciprocal}
TASKS = {TITLE: "title", LATE: "late sentence"}
KEPT, COST = ("kept", "or averaged", "error"), ("speed", "MiB")
_MASKED = Setting(TYPES[0], BLOCKS[0], FACTORS[0])  # the default type and sizes
_DEFAULT = Setting(TYPES[0], BLOCKS[0], FACTORS[0], mask_first_token=False)  # what convert makes unless told otherwise


def in_short(figures: Figures) -> list[str]:
    """The answers, one line each."""
    types = {f"`{name}`": figures.mean_score(labels) for name, labels in _by_type().items()}
    blocks = {f"B = {block}": figures.mean_score(labels) for block, labels in _by_block().items()}
    factors = {f"f = {factor}": figures.mean_score(labels) for factor, labels in _by_factor().items()}
    every = figures.mean_score(setting.label for setting in grid())
    masked, kept = _first_token(figures)
    return [
        "## In short",
        "",
        f"- **Types**: {_spread(types)}",
        f"- **Block sizes**: {_spread(blocks)}",
        f"- **Factors**: {_spread(factors)}",
        f"- **First token**: with `mask_first_token=True` the score changes by {cells.against(masked, kept)}. Short "
        "texts are then read exactly as the plain model reads them.",
        f"- **Worth**: the mean of all conversions differs from the plain model's mean of pieces by "
        f"{cells.against(every, figures.score(PIECES))}, and from its first 512 tokens by "
        f"{cells.against(every, figures.score(FIRST_PIECE))}.",
        "",
    ]  # fmt: skip


def _spread(scores: dict[str, Floats]) -> str:
    """The best and the worst of some, and their difference."""
    order = sorted(scores, key=lambda name: -scores[name][0])
    best, worst = order[0], order[-1]
    gap = cells.against(scores[best], scores[worst])
    return f"{best} has the highest score, {worst} the lowest; they differ by {gap}."


def _by_type() -> dict[str, list[str]]:
    """The rows of each type."""
    return {name: [x.label for x in grid() if x.sparsity_type == name] for name in (*TYPES, "none")}


def _by_block() -> dict[int, list[str]]:
    """The rows of each block size, of types with compressed keys."""
    sparse = [setting for setting in grid() if setting.sparsity_factor]
    return {block: [x.label for x in sparse if x.block_size == block] for block in sorted(BLOCKS)}


def _by_factor() -> dict[int, list[str]]:
    """The rows of each factor."""
    return {factor: [x.label for x in grid() if x.sparsity_factor == factor] for factor in FACTORS}


def _first_token(figures: Figures) -> tuple[Floats, Floats]:
    """The mean scores over types with the first token masked, and with it kept."""
    masked = [Setting(name, BLOCKS[0], FACTORS[0]).label for name in TYPES]
    kept = [Setting(name, BLOCKS[0], FACTORS[0], mask_first_token=False).label for name in TYPES]
    return figures.mean_score(masked), figures.mean_score(kept)


def types(figures: Figures) -> list[str]:
    """Means over block sizes and factors, and which types can be told apart."""
    groups = _by_type()
    scores = {name: figures.mean_score(labels) for name, labels in groups.items()}
    order = sorted(groups, key=lambda name: -scores[name][0])
    rows = {}
    for name in order:
        cosines = [x.value for x in map(figures.cosine, groups[name]) if x is not None]
        rows[f"`{name}`"] = [
            cells.score(scores[name]),
            cells.against(scores[name], scores[TYPES[0]]) if name != TYPES[0] else "",
            f"{np.mean(cosines):.3f}",
            *cells.kept(figures, groups[name]),
            *cells.cost(figures, groups[name]),
        ]
    gaps = {name: difference(scores[order[0]], scores[name]) for name in order[1:]}
    alike = [f"`{name}`" for name, gap in gaps.items() if not gap.is_different]
    worse = [f"`{name}`, by {cells.signed(gap)}" for name, gap in gaps.items() if gap.is_different]
    answer = f"**`{order[0]}` has the highest score, {cells.score(scores[order[0]])}.**"
    answer += f" These documents do not tell it apart from {cells.listed(alike)}." if alike else ""
    answer += f" It is better than {'; '.join(worse)}." if worse else ""
    return [
        "## Which sparsity type?",
        "",
        answer,
        "",
        f"Each row is the mean over block sizes {cells.listed(sorted(BLOCKS))} and factors {cells.listed(FACTORS)}, "
        "with one global token and `mask_first_token=True`.",
        "",
        *cells.table(["type", "score", f"against `{TYPES[0]}`", "cosine", *KEPT, *COST], rows),
    ]


def sizes(figures: Figures) -> list[str]:
    """Block sizes and factors: means over everything else."""
    rows = {}
    for what, groups, default in (("B", _by_block(), BLOCKS[0]), ("f", _by_factor(), FACTORS[0])):
        base = figures.mean_score(groups[default])
        for size, labels in groups.items():
            score = figures.mean_score(labels)
            gap = cells.against(score, base) if size != default else "the default"
            shares = [*cells.kept(figures, labels), *cells.cost(figures, labels)]
            rows[f"{what} = {size}"] = [cells.score(score), gap, *shares]
    return [
        "## Which block size and factor?",
        "",
        "Means over the six types, and over the factors or block sizes. s is B.",
        "",
        *cells.table(["", "score", "against the default", *KEPT, *COST], rows),
    ]


def first_tokens(figures: Figures) -> list[str]:
    """What becomes of the first token, and more global tokens."""
    gap = difference(*_first_token(figures))
    verdict = ("better" if gap.value > 0 else "worse") if gap.is_different else "not told apart from the default"
    base = figures.score(_MASKED.label)
    trained = [label for label in figures.labels if label.endswith("trained")]
    more = [setting.label for setting in settings() if setting.num_global_tokens > 1]
    rows = {}
    for label in (_MASKED.label, _DEFAULT.label, *more, *trained):
        score = figures.score(label)
        cosines = (figures.cosine(label, key) for key in ("cosine_128", "cosine_512", "cosine"))
        rows[label] = [
            *map(cells.cosine, cosines),
            cells.score(score),
            cells.against(score, base) if label != _MASKED.label else "",
        ]
    return [
        "## Which global tokens?",
        "",
        f"`mask_first_token=True` is {verdict} in retrieval: {cells.signed(gap)}, the mean over the six types. It is "
        "exact for short texts. The default is not: CLS is there twice, as a token and as a global token.",
        "",
        "Global tokens after the first are untrained. The cosines show what they do to short texts, and so to "
        "questions. With \"plain questions\", the plain model reads the questions, the converted one the documents.",
        "",
        *cells.table(["", "cosine, 128 tokens", "512 tokens", "long", "score", f"against {_MASKED.label}"], rows),
        *[line for label in trained for line in _training(figures, label, more)],
    ]  # fmt: skip


def _training(figures: Figures, label: str, untrained: list[str]) -> list[str]:
    """How a model was trained, and against the same one before."""
    training = figures.training(label)
    before = label.removesuffix(", trained")
    text = (
        f"The last row is of `examples/tune_globals.py`, which trained the global tokens and nothing else on "
        f"{training['documents']} documents of at most {training['max_length']:,} tokens, for {training['epochs']} "
        f"epochs. Its loss, one less the cosine to the mean of pieces, went from {training['losses'][0]:.3f} in the "
        f"first epoch to {training['losses'][-1]:.3f} in the last."
    )
    if before in untrained:
        gap = cells.against(figures.score(label), figures.score(before))
        text += f" Against the untrained tokens the score differs by {gap}."
    return [text, ""]


def against_plain(figures: Figures) -> list[str]:
    """The best conversion and the default beside what the plain model reaches."""
    labels = [setting.label for setting in grid()]
    scores = np.stack([figures.score(label) for label in labels])
    first = int(scores[:, 0].argmax())
    wins = float((scores[:, 1:].argmax(0) == first).mean())
    alike = sum(not difference(scores[first], row).is_different for i, row in enumerate(scores) if i != first)
    rows = {}
    for label in dict.fromkeys((PIECES, FIRST_PIECE, DENSE.label, _DEFAULT.label, _MASKED.label, labels[first])):
        score = figures.score(label)
        rows[label] = [
            *retrieval(figures, label),
            cells.score(score),
            cells.against(score, figures.score(PIECES)) if label != PIECES else "",
            *cells.cost(figures, [label]),
        ]
    every = figures.mean_score(labels)
    return [
        "## Is it worth it?",
        "",
        f"The mean score of all {len(labels)} conversions is {cells.score(every)}. Against the plain model that reads "
        f"a document in pieces, that is {cells.against(every, figures.score(PIECES))}; against the plain model that "
        f"reads the first 512 tokens, {cells.against(every, figures.score(FIRST_PIECE))}.",
        "",
        *cells.table(["", *RETRIEVAL, "score", "against pieces", *COST], rows),
        f"`{labels[first]}` has the highest score of a single conversion, in part by luck: it is first in "
        f"{100 * wins:.0f} % of the resamples, and {alike} of {len(labels) - 1} others cannot be told apart from it.",
        "",
    ]  # fmt: skip


RETRIEVAL = [f"{task}: {name}" for task in TASKS.values() for name in MEASURES]


def retrieval(figures: Figures, label: str) -> list[str]:
    """The cells of ``RETRIEVAL``."""
    return [cells.figure(figures.task(label, task, measure)) for task in TASKS for measure in MEASURES.values()]
