"""Seconds and peak memory of a call, for the demo and the bench."""

from __future__ import annotations

import ctypes
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Measured(Generic[T]):
    """What a call returned, its seconds, and by how many bytes the process grew at its peak (None if unknown)."""

    result: T
    seconds: float
    peak_bytes: int | None


def measure(call: Callable[[], T]) -> Measured[T]:
    """Run ``call`` once. Memory is the process's resident high-water mark, which only Linux lets us reset."""
    before = _reset_high_water_mark()
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    return Measured(result, seconds, None if before is None else max(_status_bytes("VmHWM") - before, 0))


def _reset_high_water_mark() -> int | None:
    """Give freed memory back to the system, set the mark to what is resident now, and return that."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else memory freed earlier would be used again and not be seen
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # another C library, or a sandbox without /proc
        return None
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return 1024 * int(found[1])
