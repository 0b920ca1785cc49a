"""Peak memory of a call, for the demo and the bench."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable
from pathlib import Path


def peak_growth(call: Callable[[], object]) -> int | None:
    """Run ``call`` and return by how many bytes the process grew at its peak.

    That is the growth of the resident high-water mark, which only Linux lets us reset; None elsewhere.
    """
    before = _reset_high_water_mark()
    call()
    return None if before is None else max(_status_bytes("VmHWM") - before, 0)


def peak_resident(call: Callable[[], object]) -> int | None:
    """Run ``call`` and return how many bytes the whole process held at its peak; None where that is not known."""
    before = _reset_high_water_mark()
    call()
    return None if before is None else _status_bytes("VmHWM")


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
