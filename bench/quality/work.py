"""The rows of retrieval and kept probability, in one process or shared out over several."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from bench.quality.corpus import Document
from bench.quality.encoder import Encoder
from bench.quality.kept import Dense
from bench.quality.retrieval import Reading
from bench.quality.settings import Setting

RETRIEVAL, KEPT = "retrieval", "kept"
Subject = str | Path | Setting
_worker: Worker  # of a process that shares out the rows


class Worker:
    """What a process needs for rows of one part."""

    def __init__(self, part: str, path: str, documents: Sequence[Document]) -> None:
        encoder = Encoder(path)
        if part == RETRIEVAL:
            self._reading = Reading(encoder, documents)
        else:
            self._dense = Dense(encoder, [encoder.ids(document.text) for document in documents])
        self._part = part

    def row(self, subject: Subject) -> dict[str, Any]:
        """The row of a setting; in retrieval also of one of ``BASELINES``, or of a trained model's folder."""
        if isinstance(subject, str):
            return {"label": subject, **self._reading.baseline(subject)}
        if isinstance(subject, Path):
            return self._reading.trained(subject)
        figures = self._reading.setting(subject) if self._part == RETRIEVAL else self._dense.kept(subject)
        return {"label": subject.label, **figures}


def rows(
    part: str, path: str, documents: Sequence[Document], subjects: Sequence[Subject], jobs: int
) -> Iterator[dict[str, Any]]:
    """A row for each subject as it comes; ``jobs`` processes share the threads."""
    if jobs == 1:
        worker = Worker(part, path, documents)
        yield from map(worker.row, subjects)
        return
    threads = max(torch.get_num_threads() // jobs, 1)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _start, (threads, part, path, documents)) as pool:
        for future in as_completed([pool.submit(_row, subject) for subject in subjects]):
            yield future.result()


def _start(threads: int, part: str, path: str, documents: Sequence[Document]) -> None:
    global _worker
    torch.set_num_threads(threads)
    _worker = Worker(part, path, documents)


def _row(subject: Subject) -> dict[str, Any]:
    return _worker.row(subject)
