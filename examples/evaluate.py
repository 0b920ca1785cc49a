"""Summarize the documents of a file with an LSG encoder-decoder, and compare with their summaries by ROUGE.

    python examples/evaluate.py test.jsonl --model ccdv/lsg-bart-base-4096-arxiv --document article --summary abstract

Each line of the data is a JSON object with a document and its summary. Beams and lengths are those of the checkpoint's
generation config, unless an option says otherwise. They are printed: compare them with the model card's. The summaries
are written as they come.

ROUGE is that of rouge-score (`pip install rouge-score`), with stems, as on model cards: F1 times 100, the median of
1,000 bootstrap samples of the documents, and the interval that 95 % of them are in. ROUGE-Lsum compares sentences, and
ROUGE-L takes a summary for one sentence; papers call either of them ROUGE-L. Sentences end at the end of a line, and
where nltk's Punkt ends them without its trained model, which it would download: also after most abbreviations.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pairs import read_pairs
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging

from lsg_attn.models.configuration import LSGSeq2SeqConfig

try:
    from nltk.tokenize.punkt import PunktSentenceTokenizer
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.scoring import BootstrapAggregator
except ModuleNotFoundError:
    sys.exit("evaluate.py needs rouge-score: pip install rouge-score")

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
LENGTHS = ("max_length", "max_new_tokens")
SETTINGS = (*LENGTHS, "num_beams", "min_length", "length_penalty", "early_stopping", "no_repeat_ngram_size")


class Rouge:
    """ROUGE of the summaries that were added, with intervals."""

    def __init__(self) -> None:
        self._scorer, self._scores = RougeScorer(KINDS, use_stemmer=True), BootstrapAggregator()
        self._sentences = PunktSentenceTokenizer()

    def add(self, reference: str, prediction: str) -> dict[str, float]:
        """The F1 of one summary by kind, between 0 and 1."""
        scores = self._scorer.score(*("\n".join(self._sentences.tokenize(text)) for text in (reference, prediction)))
        self._scores.add_scores(scores)
        return {kind: scores[kind].fmeasure for kind in KINDS}

    def intervals(self) -> dict[str, tuple[float, float, float]]:
        """The lower bound, the median and the upper bound of the mean F1 by kind, the same in each call."""
        np.random.seed(0)  # rouge-score draws from numpy's global generator
        found = self._scores.aggregate()
        return {kind: tuple(bound.fmeasure for bound in found[kind]) for kind in KINDS}


def settings_of(model: Any, max_new_tokens: int | None, num_beams: int | None) -> dict[str, Any]:
    """What the model generates with: the options that are given, else what its generation config sets."""
    changed = model.generation_config.to_diff_dict()
    settings = {"num_beams": 1, **{key: changed[key] for key in SETTINGS if key in changed}}
    if max_new_tokens is None and not settings.keys() & set(LENGTHS):
        max_new_tokens = 256
    if max_new_tokens is not None:
        settings.pop("max_length", None)
        settings["max_new_tokens"] = max_new_tokens
    if num_beams is not None:
        settings["num_beams"] = num_beams
    return settings


def main() -> None:
    """Read the data, summarize, write the summaries and print the scores."""
    parser = argparse.ArgumentParser(description="Summarize documents and compare with their summaries by ROUGE.")
    parser.add_argument("data", type=Path, help="JSON lines")
    parser.add_argument("--model", required=True, help="name or folder of an LSG encoder-decoder")
    parser.add_argument("--document", default="document", help="the documents' key (default: %(default)s)")
    parser.add_argument("--summary", default="summary", help="the summaries' key (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="read only so many documents (default: all)")
    parser.add_argument("--max-length", type=int, help="how many tokens to read (default: as many as the model can)")
    parser.add_argument("--max-new-tokens", type=int, help="(default: the generation config's length, or 256)")
    parser.add_argument("--num-beams", type=int, help="(default: the generation config's)")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="a new file for the summaries, as JSON lines (default: print them)")
    options = parser.parse_args()
    for name in ("limit", "max_length", "max_new_tokens", "num_beams", "batch_size"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    try:
        pairs = read_pairs(options.data, options.document, options.summary)[: options.limit]
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"expected a text file in UTF-8 at {options.data}: {error}")
    except ValueError as error:
        parser.error(str(error))

    logging.disable_progress_bar()
    try:
        model = AutoModelForSeq2SeqLM.from_pretrained(options.model, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    except (OSError, ValueError) as error:
        parser.error(f"--model: {str(error).splitlines()[0]}")
    if not isinstance(model.config, LSGSeq2SeqConfig):
        parser.error(f"--model: expected an LSG encoder-decoder, got {options.model}; see `lsg-attn convert`")
    limit = model.config.max_position_embeddings
    if options.max_length is not None and options.max_length > limit:
        parser.error(f"--max-length: expected at most {limit}, the length of {options.model}, got {options.max_length}")
    longest = options.max_length or limit
    model = model.to(options.device, torch.float32 if options.device == "cpu" else torch.bfloat16).eval()
    settings = settings_of(model, options.max_new_tokens, options.num_beams)
    print(
        f"{len(pairs)} documents of up to {longest} tokens, batches of {options.batch_size}, {model.dtype}, "
        f"{options.device}; generation: {', '.join(f'{key}={value}' for key, value in settings.items())}"
    )

    rouge, num_cut, start = Rouge(), 0, time.perf_counter()
    with contextlib.ExitStack() as stack:
        try:
            out = sys.stdout if options.out is None else stack.enter_context(options.out.open("x", encoding="utf-8"))
        except OSError as error:
            parser.error(f"--out: expected a file that can be made, got {options.out}: {error.strerror}")
        for first in range(0, len(pairs), options.batch_size):
            batch = pairs[first : first + options.batch_size]
            texts = [text for text, _ in batch]
            num_cut += sum(len(ids) > longest for ids in tokenizer(texts, verbose=False)["input_ids"])
            inputs = tokenizer(texts, truncation=True, max_length=longest, padding=True, return_tensors="pt")
            inputs = {name: inputs[name].to(options.device) for name in ("input_ids", "attention_mask")}
            with torch.inference_mode():
                ids = model.generate(**inputs, **settings)
            predictions = tokenizer.batch_decode(ids, skip_special_tokens=True)
            for (_, summary), prediction in zip(batch, predictions, strict=True):
                line = {"prediction": prediction, "summary": summary, **rouge.add(summary, prediction)}
                print(json.dumps(line, ensure_ascii=False), file=out, flush=True)
            if options.out is not None:
                print(f"{first + len(batch)} of {len(pairs)}, {time.perf_counter() - start:.0f} s", flush=True)
    print(f"{num_cut} of {len(pairs)} documents are longer than {longest} tokens, their rest was left out")
    print("F1 x 100, and the interval of 95 %")
    for kind, (low, median, high) in rouge.intervals().items():
        print(f"{kind:9} {100 * median:6.2f}  [{100 * low:.2f}, {100 * high:.2f}]")


if __name__ == "__main__":
    main()
