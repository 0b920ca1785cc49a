"""Makes glibc keep freed memory, as jemalloc does, where by default it returns it to the system."""

from __future__ import annotations

import ctypes
import sys

# M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of <malloc.h>: blocks are not mapped separately, the heap does not shrink
_KEEP = ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20))


def keep_freed_memory() -> None:
    """Make this process keep freed memory, so that it need not get it from the system again.

    Raises:
        OSError: the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        raise OSError("only glibc on Linux can be told to keep freed memory")
    libc = ctypes.CDLL("libc.so.6")
    if not all(libc.mallopt(name, value) for name, value in _KEEP):
        raise OSError("mallopt: glibc did not accept these values")
