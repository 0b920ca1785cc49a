"""Calls in a process of their own: holes in the heap of earlier cases would slow down peers that allocate much."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

import torch

from bench import peers

_Result = TypeVar("_Result")


def call(function: Callable[..., _Result], *arguments: Any) -> _Result:
    """Call a module's function with arguments that can be pickled, in a process with as many threads as this one.

    Raises:
        concurrent.futures.process.BrokenProcessPool: the process was killed, for example because memory ran out.
        Exception: what the function raises.
    """
    with ProcessPoolExecutor(1, mp_context=_context()) as pool:
        return pool.submit(_call, torch.get_num_threads(), function, arguments).result()


class Worker:
    """One process for many calls, for a GPU, where a start takes seconds; after :meth:`stop` the next call has another.

    It is spawned: imports ask for the number of GPUs, and a fork of a process that has asked cannot use them.
    """

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def call(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """As :func:`call`. If the process is killed, the next call has another."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        try:
            return self._pool.submit(_call, torch.get_num_threads(), function, arguments).result()
        except BrokenProcessPool:
            self.stop()
            raise

    def stop(self) -> None:
        """End the process; the next call has another."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _call(threads: int, function: Callable[..., _Result], arguments: tuple[Any, ...]) -> _Result:
    torch.set_num_threads(threads)
    return function(*arguments)


@lru_cache(maxsize=1)
def _context() -> BaseContext:
    """Fork children from a process that has imported what they need and has computed nothing."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.measure", *peers.PRELOAD])  # modules that are not installed are skipped
    result: BaseContext = context
    return result
