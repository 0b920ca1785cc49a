"""Times interleaved repetitions and summarizes them: medians, percentiles, ratios."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

Step = Callable[[], object]
MAX_REPETITIONS = 21
SHORT = 2.5  # seconds: a shorter step is warmed up before each repetition
LONG = 60.0  # seconds: after so long two repetitions are enough
_FLUSHED = 256 << 20  # bytes: more than a GPU's cache


class StepError(Exception):
    """The step of that name failed."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Spread(NamedTuple):
    """A median, and the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float


def spread(values: list[float]) -> Spread:
    """The median and percentiles of values."""
    low, middle, high = np.percentile(values, (20, 50, 80))
    return Spread(float(middle), float(low), float(high))


def ratio(above: list[float], below: list[float]) -> Spread:
    """The ratios within repetitions: a slowdown that hits both sides cancels out."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


class Clock:
    """Times a step on a CPU, or with events on a GPU, whose cache is overwritten first."""

    def __init__(self, device: str) -> None:
        self._flushed = torch.empty(_FLUSHED, dtype=torch.uint8, device=device) if device == "cuda" else None

    def seconds(self, step: Step) -> float:
        """Run a step to its end and return its seconds."""
        if self._flushed is None:
            begin = time.perf_counter()
            step()
            return time.perf_counter() - begin
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.zero_()
        first.record()
        step()
        last.record()
        torch.cuda.synchronize()
        milliseconds: float = first.elapsed_time(last)
        return milliseconds / 1e3


def interleave(steps: dict[str, Step], clock: Clock, seconds: float, least: int) -> dict[str, list[float]]:
    """The seconds of each step in each repetition A B C A B C ...: a drift of the machine hits all steps alike.

    There are as many repetitions as fit into ``seconds``, at least ``least`` and at most ``MAX_REPETITIONS``; after
    ``LONG`` seconds two are enough. A short step also runs right before it is timed, as in a user's loop. Otherwise the
    steps in between would have taken its memory and caches; and if a virtual machine has returned freed pages to its
    host, large allocations are several times slower.

    Raises:
        StepError: a step failed; the cause is its exception.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    last = dict.fromkeys(steps, 0.0)
    begin = time.perf_counter()
    for repetition in range(1, MAX_REPETITIONS + 1):
        for name, step in steps.items():
            try:
                if last[name] < SHORT:
                    step()
                last[name] = clock.seconds(step)
            except Exception as error:
                raise StepError(name) from error
            times[name].append(last[name])
        spent = time.perf_counter() - begin
        is_enough = repetition >= (least if spent < LONG else min(least, 2))
        if is_enough and spent + spent / repetition > seconds:
            break
    return times
