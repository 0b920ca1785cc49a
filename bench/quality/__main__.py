"""python -m bench.quality: measures what conversions of a real encoder lose and gain; writes the page and the picture.

The encoder is all-MiniLM-L6-v2 (6 layers, 384 wide, 512 positions). It is converted to 4,096 tokens without training.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import transformers

from bench.quality import page, work
from bench.quality.corpus import digest, documents
from bench.quality.cost import costs
from bench.quality.encoder import Encoder, model_path
from bench.quality.figures import Figures
from bench.quality.plot import draw
from bench.quality.results import FOLDER, Results
from bench.quality.retrieval import BASELINES
from bench.quality.settings import DENSE, Setting, grid, settings

COST = "cost"
PARTS = (work.RETRIEVAL, work.KEPT, COST)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the files lack; or write the page's part, or the picture, from them.

    Returns:
        0; 2 if the model is missing, an argument is wrong, or a file is missing or of another run.
    """
    options = _parse(arguments)
    transformers.logging.set_verbosity_error()
    try:
        if options.plot is not None:
            draw(Figures(options.folder), options.plot)
        if options.page is not None:
            text = options.page.read_text(encoding="utf-8")
            options.page.write_text(page.with_figures(text, options.folder), encoding="utf-8")
        if options.plot is None and options.page is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for part in options.only:
                    _measure(part, options)
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        print(f"bench.quality: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="the parts to measure (default: all)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the results; rows that are there are kept")
    parser.add_argument("--documents", type=int, default=40, help="of each source at most (default: %(default)s)")
    parser.add_argument("--settings", nargs="+", metavar="LABEL", help="only these conversions, by their rows' names")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share out the rows (default: %(default)s)")
    parser.add_argument("--trained", type=Path, help="retrieval by this folder of examples/tune_globals.py, too")
    parser.add_argument(
        "--page", type=Path, help="measure nothing; write the sections of this page that are made of the results"
    )
    parser.add_argument("--plot", type=Path, help="measure nothing; write this picture of the results")
    options = parser.parse_args(arguments)
    labels = [setting.label for setting in settings()]
    if unknown := [label for label in options.settings or () if label not in labels]:
        parser.error(f"--settings: expected some of {'; '.join(labels)}, got {'; '.join(unknown)}")
    return options


def _measure(part: str, options: argparse.Namespace) -> None:
    """Add the rows that a part's file lacks."""
    path = model_path()
    encoder = Encoder(path)
    chosen = documents(encoder.count_tokens, options.documents)
    corpus = {"documents": [x.name for x in chosen], "late": [len(x.late) for x in chosen], "digest": digest(chosen)}
    corpus["tokens"] = [encoder.count_tokens(x.text) for x in chosen]
    results = Results(options.folder / f"{part}.jsonl", {} if part == COST else corpus)
    every: list[Setting] = settings() if part == work.RETRIEVAL else [DENSE, *grid()]
    named = [x for x in every if options.settings is None or x.label in options.settings]
    missing = [x for x in named if x.label not in results.labels]
    plain = [x for x in BASELINES if part != work.KEPT and x not in results.labels]
    trained = [options.trained] if part == work.RETRIEVAL and options.trained is not None else []
    found: Iterable[dict[str, Any]] = ()
    if part == COST:
        found = costs(encoder, encoder.ids("\n".join(x.text for x in chosen)), [*plain, *missing])
    elif plain or missing or trained:
        found = work.rows(part, path, chosen, [*plain, *missing, *trained], options.jobs)
    for row in found:
        if row["label"] not in results.labels:
            results.add(row)
        print(f"{part}: {row['label']}", flush=True)
    results.close()


if __name__ == "__main__":
    raise SystemExit(main())
