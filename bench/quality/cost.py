"""Time and peak memory of reading one document of 4,096 tokens, against the plain model that reads it in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from bench import fresh
from bench.quality.encoder import Encoder, cut, model_path
from bench.quality.retrieval import FIRST_PIECE, PIECES
from bench.quality.settings import LENGTH, Setting
from bench.timing import Clock, Step, interleave, ratio, spread
from lsg_attn.cli.embedding import mean_state
from lsg_attn.memory import peak_memory

_SECONDS, _LEAST = 20.0, 3  # of a group of settings that take turns
Subject = str | Setting  # one of BASELINES, or a conversion


def costs(encoder: Encoder, document: Tensor, subjects: Sequence[Subject]) -> Iterator[dict[str, Any]]:
    """A row for each subject.

    ``ratio`` is the time of the plain model in pieces over the row's own, so above 1 the row is faster: its median and
    20th and 80th percentiles over repetitions. In each, the settings of one type and block size and the plain model
    take turns.

    Args:
        encoder: the plain encoder.
        document: ids (1, tokens), at least 4,096, of which the first 4,096 are read.
        subjects: what reads it.

    Raises:
        ValueError: the document is too short.
    """
    if document.shape[1] < LENGTH:
        raise ValueError(f"document: expected at least {LENGTH} tokens, got {document.shape[1]}")
    ids = cut(document, LENGTH)
    for _, found in groupby(sorted(subjects, key=_group), key=_group):
        group = list(found)
        steps: dict[str, Step] = {PIECES: partial(encoder.mean_of_pieces, ids)}
        steps |= {label_of(x): partial(_reader(encoder, x), ids) for x in group}
        with torch.inference_mode():
            times = interleave(steps, Clock("cpu"), _SECONDS, _LEAST)
        for subject in group:
            label = label_of(subject)
            yield {
                "label": label,
                "ms": [1e3 * x for x in spread(times[label])],
                "ratio": list(ratio(times[PIECES], times[label])),
                "peak_bytes": fresh.call(_peak, subject, ids.tolist()),
            }


def _group(subject: Subject) -> tuple[str, int]:
    """The sparsity type and the block size; nothing for the plain model."""
    return ("", 0) if isinstance(subject, str) else (subject.sparsity_type, subject.block_size)


def label_of(subject: Subject) -> str:
    """The label of its row."""
    return subject if isinstance(subject, str) else subject.label


def _reader(encoder: Encoder, subject: Subject) -> Callable[[Tensor], Tensor]:
    """How a subject embeds ids (1, tokens)."""
    if isinstance(subject, Setting):
        return partial(mean_state, encoder.convert(subject))
    return {FIRST_PIECE: encoder.first_piece, PIECES: encoder.mean_of_pieces}[subject]


def _peak(subject: Subject, ids: list[list[int]]) -> int | None:
    """How far memory grows in this process, which has read nothing but a short text."""
    document, read = torch.tensor(ids), _reader(Encoder(model_path()), subject)
    with torch.inference_mode():
        read(cut(document, 64))  # libraries allocate here what they allocate once
        peak = peak_memory(partial(read, document))
    return None if peak is None else peak.growth
