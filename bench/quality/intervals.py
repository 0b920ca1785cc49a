"""Confidence intervals by bootstrap over documents: what would other documents of this kind have given?

A resample draws as many documents as there are, with replacement. All that is asked about a document goes with it. All
rows share the resamples, so that differences are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES, _LEVEL = 4000, 95  # per cent


class Interval(NamedTuple):
    """A figure of the documents themselves, and the interval that 95 % of the resamples' figures are in."""

    value: float
    low: float
    high: float

    @property
    def is_different(self) -> bool:
        """Whether a difference is not zero, as far as these documents tell."""
        return self.low > 0 or self.high < 0


def resample(documents: int, seed: int = 0) -> Floats:
    """How often each document is drawn: (1 + RESAMPLES, documents). In the first row each is there once."""
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(documents, np.full(documents, 1 / documents), size=RESAMPLES)
    return np.concatenate([np.ones((1, documents)), drawn])


def means(weights: Floats, values: Sequence[float], about: Sequence[int]) -> Floats:
    """The mean of the values in each resample, (1 + RESAMPLES,).

    Args:
        weights: as :func:`resample` gives them.
        values: one for each question.
        about: the index of the document that each question is about.
    """
    sums, counts = np.zeros(weights.shape[1]), np.zeros(weights.shape[1])
    np.add.at(sums, np.asarray(about), np.asarray(values, dtype=float))
    np.add.at(counts, np.asarray(about), 1.0)
    result: Floats = (weights @ sums) / (weights @ counts)
    return result


def interval(figures: Floats) -> Interval:
    """The interval of figures (1 + RESAMPLES,), or of the difference of two rows' figures."""
    tail = (100 - _LEVEL) / 2
    low, high = np.percentile(figures[1:], (tail, 100 - tail))
    return Interval(float(figures[0]), float(low), float(high))
