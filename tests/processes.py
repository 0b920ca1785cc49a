"""Processes of torch.distributed on this machine, with gloo: each runs one check."""

import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


def run_processes(
    count: int, checks: Sequence[Callable[..., None]], folder: Path, *args: Any, timeout: float = 240.0
) -> None:
    """Run each ``check(mesh, *args)`` in ``count`` processes, with a one-dimensional mesh; raise what one raised.

    They start once for all checks, which takes longer than most of these.
    """
    context = torch.multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    processes = [context.Process(target=_run, args=(i, count, checks, folder, args, errors)) for i in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=timeout)
    is_alive = [process.is_alive() for process in processes]
    for process in processes:
        process.kill()
    assert errors.empty(), errors.get()
    assert not any(is_alive)
    assert [process.exitcode for process in processes] == [0] * count


def _run(
    rank: int, count: int, checks: Sequence[Callable[..., None]], folder: Path, args: tuple[Any, ...], errors: Any
) -> None:
    try:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=count)
        mesh = init_device_mesh("cpu", (count,))
        for check in checks:
            torch.manual_seed(0)
            check(mesh, *args)
        dist.destroy_process_group()
    except BaseException:
        errors.put(traceback.format_exc())
        raise
    # Without the interpreter's own end: gloo's threads now and then outlive it, and abort the process.
    os._exit(0)
