"""Peak memory of a call, for the demos and the bench."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Peak(NamedTuple):
    """The memory of the whole process during a call, in bytes."""

    resident: int  # the most that was resident at once
    growth: int  # the same, less what was resident before the call


def peak_memory(call: Callable[[], object]) -> Peak | None:
    """Run ``call`` and return the peak memory of the process.

    The peak is the high-water mark of resident memory. It is None except on Linux, where a process can reset the mark.
    """
    before = _reset_high_water_mark()
    call()
    if before is None:
        return None
    resident = _status_bytes("VmHWM")
    return Peak(resident, max(resident - before, 0))


def _reset_high_water_mark() -> int | None:
    """Give freed memory back to the system, set the mark to the resident memory, and return it."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # otherwise the call could reuse freed memory without raising the mark
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # another C library, or a sandbox without /proc
        return None
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return 1024 * int(found[1])
