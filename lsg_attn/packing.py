"""Packed calls, taken apart into calls of one sequence each and put together again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from .call import Call


def sequences(call: Call) -> Iterator[tuple[slice, Call]]:
    """The rows and the call of each sequence that is not empty; a call that is not packed is its one sequence.

    It waits for a GPU to tell the lengths.
    """
    if call.cu_seqlens is None:
        yield slice(None), call
        return
    starts: list[int] = call.cu_seqlens.tolist()
    lengths = [stop - start for start, stop in pairwise(starts)]
    # split, as its one backward writes each gradient once
    inputs = zip(*(x.split(lengths, 2) for x in (call.query, call.key, call.value)), strict=True)
    for number, (query, key, value) in enumerate(inputs):
        seed = None if call.seed is None else call.seed + number
        if lengths[number]:
            part = replace(call, query=query, key=key, value=value, seed=seed, cu_seqlens=None, max_seqlen=0)
            yield slice(starts[number], starts[number + 1]), part


def attend_each(attend: Callable[[Call], tuple[Tensor, Tensor]], call: Call) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp that ``attend`` gives for each sequence of a call, as those of the call."""
    parts = [attend(part) for _, part in sequences(call)]
    if call.cu_seqlens is None:
        return parts[0]
    if not parts:
        return call.query.clone(), call.query.sum(-1, dtype=torch.promote_types(call.query.dtype, torch.float32))
    outs, lses = zip(*parts, strict=True)
    # (1, length, heads, head_dim) in memory, as an output projection wants it
    return torch.cat([out.transpose(1, 2) for out in outs], 1).transpose(1, 2), torch.cat(lses, 2)
