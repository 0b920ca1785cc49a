"""What the files of results say: figures of rows and of groups of rows, over the resamples that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bench.quality.intervals import Floats, Interval, interval, means, resample
from bench.quality.results import read_rows, read_run
from bench.quality.retrieval import short_texts

TITLE, LATE = "title", "late"  # the two tasks
Measure = Callable[[int], float]  # of a rank, counted from 0


def recall_at(count: int) -> Measure:
    """Whether a document is among the first ``count``."""
    return lambda rank: float(rank < count)


def reciprocal(rank: int) -> float:
    """1 for the first, 1/2 for the second, 1/3 for the third."""
    return 1 / (1 + rank)


class Figures:
    """The rows of a folder.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not that of one run.
    """

    def __init__(self, folder: Path) -> None:
        paths = {part: folder / f"{part}.jsonl" for part in ("retrieval", "kept", "cost")}
        self.runs = {part: read_run(path) for part, path in paths.items()}
        self._rows = {part: {row["label"]: row for row in read_rows(path)} for part, path in paths.items()}
        corpus: dict[str, Any] = self.runs["retrieval"]["arguments"]
        self.names: list[str] = corpus["documents"]
        self.tokens: list[int] = corpus["tokens"]
        self._about = {
            TITLE: list(range(len(self.names))),
            LATE: [index for index, count in enumerate(corpus["late"]) for _ in range(count)],
        }
        self._weights = resample(len(self.names))
        self.score = cache(self._score)

    @property
    def labels(self) -> list[str]:
        """The rows whose retrieval was measured."""
        return list(self._rows["retrieval"])

    def questions(self, task: str) -> int:
        """How many questions a task has."""
        return len(self._about[task])

    def kept(self, label: str) -> dict[str, float] | None:
        """What a pattern keeps of dense attention, as :class:`bench.recall.Recall` has it."""
        return self._rows["kept"].get(label)

    def cost(self, label: str) -> dict[str, Any] | None:
        """Time and memory of a row."""
        return self._rows["cost"].get(label)

    def training(self, label: str) -> dict[str, Any]:
        """How the model of a row was trained."""
        training: dict[str, Any] = self._rows["retrieval"][label]["training"]
        return training

    def task(self, label: str, task: str, measure: Measure) -> Floats:
        """The mean of a measure of the ranks of a task, in each resample."""
        values = [measure(rank) for rank in self._rows["retrieval"][label][task]]
        return means(self._weights, values, self._about[task])

    def _score(self, label: str) -> Floats:
        """What settings are compared by: the mean of both tasks' mean reciprocal ranks."""
        return (self.task(label, TITLE, reciprocal) + self.task(label, LATE, reciprocal)) / 2

    def mean_score(self, labels: Iterable[str]) -> Floats:
        """The mean of several rows' scores."""
        result: Floats = np.mean([self.score(label) for label in labels], axis=0)
        return result

    def cosine(self, label: str, key: str = "cosine") -> Interval | None:
        """A mean cosine: ``"cosine"`` to the mean of pieces; ``"cosine_128"``, ``"cosine_512"`` to the plain model."""
        values = self._rows["retrieval"][label].get(key)
        if values is None:
            return None
        about = self._about[TITLE] if key == "cosine" else list(short_texts(len(self.names)))
        return interval(means(self._weights, values, about))


def difference(left: Floats, right: Floats) -> Interval:
    """A paired difference."""
    return interval(left - right)
