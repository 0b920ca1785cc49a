"""Context parallelism: one sequence shared out over processes of torch.distributed, each with some of its blocks.

Every process has the global tokens and a span of whole blocks. Gradients follow the convention of data parallelism: the
loss is the mean of all processes' losses, so those of parameters are to be averaged, as DistributedDataParallel and
FSDP do by themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .checks import type_name
from .communication import Group, group_of
from .dispatch import Answer, answered_by
from .pattern import LSGPattern
from .sections import Span, shares, spans_of
from .sharded import sharded_attention

Mesh = DeviceMesh | dist.ProcessGroup


@contextlib.contextmanager
def context_parallel(mesh: Mesh | Group) -> Iterator[Group]:
    """Within it, :func:`lsg_attn.lsg_attention` and all that calls it works on shards of one sequence.

    Its inputs are then this process's rows, those that :func:`shard` gives: queries, keys and values (batch, heads,
    G + n, head_dim) of the globals, alike on all processes, and of n tokens; and the mask (batch, n) or (batch, G + n).
    The outputs are these rows of what one process computes of the whole; with ``dropout_p`` too, by the seed of the
    first process. All processes must call alike. A backward that runs the forward again, as activation checkpointing
    has it, belongs into the context as well.

    Args:
        mesh: a one-dimensional DeviceMesh, or a ProcessGroup, or what this gave before.

    Yields:
        The :class:`.communication.Group`, which counts what this process gets from others.

    Raises:
        TypeError, ValueError: ``mesh`` is something else. Of the attention: ValueError if processes ask for different
            things or their tokens are not whole blocks; RuntimeError if a process is lost, naming it.
    """
    group = group_of(mesh)
    with answered_by(answers_of(group)):
        yield group


def answers_of(group: Group) -> Answer:
    """What answers calls of the attention together with the other processes of a group."""
    return partial(_answer, group)


_answer = torch.compiler.disable(sharded_attention)


def shard(x: Tensor, mesh: Mesh | Group, *, pattern: LSGPattern, dim: int, has_globals: bool = True) -> Tensor:
    """This process's rows of a tensor that all processes have: the globals, and its share of whole blocks.

    Processes have as many blocks each, or one less. If there are fewer blocks than processes, the last ones have none.

    Args:
        x: (..., G+T, ...), or (..., T, ...), the same on all processes.
        mesh: as in :func:`context_parallel`.
        pattern: of the attention.
        dim: the dimension of positions.
        has_globals: whether the globals' positions come first. Tokens' ids and masks (batch, T) have none.

    Returns:
        (..., G + n, ...), or (..., n, ...). Its gradient is that of the mean of all processes' losses.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    group, dim, count = _checked(x, mesh, pattern, dim, has_globals)
    spans = shares(x.shape[dim] - count, group.size, pattern.block_size)
    out: Tensor = _Shard.apply(x, group, spans, dim, count)  # type: ignore[no-untyped-call]
    return out


def gather(x: Tensor, mesh: Mesh | Group, *, pattern: LSGPattern, dim: int, has_globals: bool = True) -> Tensor:
    """The whole tensor, on every process, of which each has the rows that :func:`shard` gives.

    Arguments are those of :func:`shard`; the rows of the globals are taken as this process has them. All processes must
    compute the same loss from the result: its gradient is not exchanged.

    Raises:
        TypeError, ValueError: an argument is not as above, or processes do not have whole blocks.
    """
    group, dim, count = _checked(x, mesh, pattern, dim, has_globals)
    size = torch.tensor([x.shape[dim] - count], device=group.device_of_numbers(x.device))
    sizes = group.all_gather(size)()[:, 0].tolist()
    out: Tensor = _Gather.apply(x, group, spans_of(sizes, pattern.block_size), dim, count)  # type: ignore[no-untyped-call]
    return out


def first_rows(x: Tensor, group: Group, count: int) -> Tensor:
    """The first ``count`` rows (batch, count, width) of x (batch, rows, width) as the first process has them.

    x may have fewer rows on others. Its gradient is the sum of all processes' there, and 0 elsewhere.
    """
    out: Tensor = _FirstRows.apply(x, group, count)  # type: ignore[no-untyped-call]
    return out


def _checked(
    x: Tensor, mesh: Mesh | Group, pattern: LSGPattern, dim: int, has_globals: bool
) -> tuple[Group, int, int]:  # fmt: skip
    """The group, the dimension from 0 on, and how many rows of globals there are."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type_name(x)}")
    if not isinstance(pattern, LSGPattern):
        raise TypeError(f"pattern: expected an LSGPattern, got {type_name(pattern)}")
    if not isinstance(dim, int) or not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim: expected a dimension of a tensor of shape {tuple(x.shape)}, got {dim!r}")
    dim, count = dim % x.dim(), pattern.num_global_tokens if has_globals else 0
    if x.shape[dim] < count:
        raise ValueError(f"x: expected at least the {count} rows of globals, got shape {tuple(x.shape)} with dim={dim}")
    return group_of(mesh), dim, count


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, spans: list[Span], dim: int, count: int) -> Tensor:
        ctx.options = (group, spans, dim, count)
        globals_, tokens = x.split([count, x.shape[dim] - count], dim)
        return torch.cat([globals_, tokens.narrow(dim, spans[group.rank].start, spans[group.rank].size)], dim)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        group, spans, dim, count = ctx.options
        globals_, tokens = dout.split([count, dout.shape[dim] - count], dim)
        of_globals = group.all_gather(globals_.contiguous())().sum(0)
        return torch.cat([of_globals, _whole(tokens, group, spans, dim)], dim) / group.size, None, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, spans: list[Span], dim: int, count: int) -> Tensor:
        ctx.options = (group, spans, dim, count)
        globals_, tokens = x.split([count, x.shape[dim] - count], dim)
        return torch.cat([globals_, _whole(tokens, group, spans, dim)], dim)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        group, spans, dim, count = ctx.options
        globals_, tokens = dout.split([count, dout.shape[dim] - count], dim)
        own = tokens.narrow(dim, spans[group.rank].start, spans[group.rank].size)
        return torch.cat([globals_, own * group.size], dim), None, None, None, None


class _FirstRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, count: int) -> Tensor:
        ctx.group, ctx.shape = group, x.shape
        batch, _, width = x.shape
        out = x[:, :count].contiguous() if group.rank == 0 else x.new_empty(batch, count, width)
        group.broadcast(out)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        total, dx = ctx.group.all_gather(dout.contiguous())().sum(0), dout.new_zeros(ctx.shape)
        if ctx.group.rank == 0:
            dx[:, : dout.shape[1]] = total
        return dx, None, None


def _whole(tokens: Tensor, group: Group, spans: list[Span], dim: int) -> Tensor:
    """The tokens of all processes, one after the other, of which each has its span."""
    longest = max(span.size for span in spans)
    rows = tokens.movedim(dim, 0)
    padded = torch.nn.functional.pad(rows, [0, 0] * (rows.dim() - 1) + [0, longest - len(rows)])
    found = group.all_gather(padded.contiguous())()
    return torch.cat([x[: span.size] for x, span in zip(found, spans, strict=True)]).movedim(0, dim)
