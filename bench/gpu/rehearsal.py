"""python -m bench.gpu.rehearsal MODULE ...: runs a program for a GPU on the CPU, its kernels executed by ttsem."""

from __future__ import annotations

import runpy
import sys
import time
from functools import partial
from typing import Any

import torch
from triton import knobs


class Event:
    """A CUDA event with the clock of the CPU, which ttsem lacks."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self._at = 0.0

    def record(self) -> None:
        """Note the time."""
        self._at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        """The milliseconds from this event to another."""
        return 1e3 * (end._at - self._at)


def main() -> None:
    """Run the module with the arguments that follow its name."""
    from ttsem.sanitize import session  # which a GPU does without

    sys.argv = sys.argv[1:]
    torch.cuda.Event = Event  # type: ignore[assignment, misc]
    with session():
        # ttsem executes the compiler's first stage; the others would take most of the time.
        knobs.runtime.add_stages_inspection_hook = partial(stop_after, "ttir")
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def stop_after(last: str, *arguments: Any) -> tuple[str, str] | None:
    """Triton's hook, after ``last``: without arguments it returns a cache key, else it removes the later stages."""
    if not arguments:
        return f"{last} is last", f"{last} is last"
    _, stages, *_ = arguments
    names = list(stages)
    for name in names[names.index(last) + 1 :]:
        del stages[name]
    stages["cubin"] = _no_binary
    return None


def _no_binary(module: Any, metadata: dict[str, Any]) -> bytes:
    metadata.update(name="not compiled", shared=0)
    return b""


if __name__ == "__main__":
    main()
