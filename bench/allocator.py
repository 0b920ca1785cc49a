"""What is measured with an allocator that keeps freed memory, as jemalloc does, where glibc gives it back."""

from __future__ import annotations

import ctypes
import sys

# M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD of <malloc.h>: nothing is mapped apart, and the heap does not shrink
_KEEP = ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20))


def keep_freed_memory() -> None:
    """Have this process keep what is freed, rather than fetch it afresh from the system.

    Raises:
        OSError: the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        raise OSError("only glibc can be told to keep freed memory")
    libc = ctypes.CDLL("libc.so.6")
    if not all(libc.mallopt(name, value) for name, value in _KEEP):
        raise OSError("mallopt: glibc does not take these values")
