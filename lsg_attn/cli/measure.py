"""Time and peak memory of a call, for the demos."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..memory import Peak, peak_memory

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Measured(Generic[_Result]):
    """What a call returned and what it took."""

    result: _Result  # of the last repetition
    seconds: float  # of the fastest repetition
    peak: Peak | None  # over all repetitions; None where the system does not report it


def measure(call: Callable[[], _Result], repetitions: int = 1) -> Measured[_Result]:
    """Run ``call`` as often as asked, at least once, and measure it."""
    results: list[_Result] = []
    seconds: list[float] = []

    def repeat() -> None:
        for _ in range(repetitions):
            results.clear()  # else the next call would need memory for two results
            begin = time.perf_counter()
            results.append(call())
            seconds.append(time.perf_counter() - begin)

    peak = peak_memory(repeat)
    return Measured(results[-1], min(seconds), peak)
