"""Calls in a process of their own: no heap of an earlier case, whose holes would slow down whoever allocates most."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

import torch

_Result = TypeVar("_Result")
# What a child needs and has not run yet; where transformers is not installed its modules are passed over.
_MODELS = ("bart", "bigbird_pegasus", "big_bird", "led", "longformer")
_PRELOADED = ["bench.measure", "lsg_attn.bart", *(f"transformers.models.{x}.modeling_{x}" for x in _MODELS)]


def call(function: Callable[..., _Result], *arguments: Any) -> _Result:
    """The result of a function of a module, called with arguments that can be pickled, with as many threads as here.

    Raises:
        concurrent.futures.process.BrokenProcessPool: the process was killed, as where memory runs out.
        Exception: what the function raises.
    """
    with ProcessPoolExecutor(1, mp_context=_context()) as pool:
        return pool.submit(_call, torch.get_num_threads(), function, arguments).result()


class Worker:
    """One process for call after call, as on a GPU, where to begin takes seconds; :meth:`stop` is for a fresh one.

    It is spawned: a fork of a process that has asked how many GPUs there are, as imports do, can not use them.
    """

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def call(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """As :func:`call`; after a process was killed the next call has another."""
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
    """Children of a process that has imported what they need, and computed nothing."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    result: BaseContext = context
    return result
